"""Runs with `checkpoint.best`, on the ranks of one group, that leave each step's weights beside."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from tiny import held_out

from rcpo.config.schema import RunConfig
from rcpo.evaluation.heldout import evaluate_in_training
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.system.signals import STOPPED
from rcpo.training.session import Session
from rcpo.training.trainer import train

STEPS, NEVER = 8, -1


def configuration(model: str, pairs: str) -> RunConfig:
    config = RunConfig()
    config.resume = "auto"
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, held_out(pairs)
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 8, 4, STEPS
    config.optim.lr, config.optim.schedule = 3e-2, "constant"
    config.engine.stage, config.reference.cache = 3, "off"
    config.eval.every, config.eval.generate_examples, config.eval.max_examples = 1, 0, 8
    config.checkpoint.every, config.checkpoint.keep = 1, 1
    config.checkpoint.best, config.checkpoint.best_mode = "eval/logratios/chosen", "max"
    return config


def observer(folder: Path, stop: int, session: Session, _resume_step: int | None) -> Callable[..., None]:
    """Keeps `folder`/STEP.safetensors of each step; in the step `stop` this rank is asked to stop."""

    def look(step: int, _tracker: Tracker) -> None:
        weights = session.engine.state_dict()
        if distributed.is_main():
            assert weights is not None
            save_file(
                {name: value.contiguous() for name, value in weights.items()}, folder / f"{step}.safetensors"
            )
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return look


def as_killed(whole: Path, run_dir: Path) -> None:
    """A copy of a finished run as it lies there where it is killed in its last evaluation."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "best")
    *rows, last = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(rows))
    state = json.loads((run_dir / "finished.json").read_text())
    row = {name: value for name, value in json.loads(last).items() if not name.startswith("eval/")}
    state |= {"evaluated": False, "last_row": row}
    (run_dir / "finished.json").write_text(json.dumps(state))


def runs(model: str, pairs: str, folder: Path, stop: int) -> None:
    """`whole`; `parts`, which is stopped after the step that follows `stop` and continued; and `killed`."""
    for name, place, code in (("whole", NEVER, 0), ("parts", stop, STOPPED), ("parts", NEVER, 0)):
        run_dir = folder / name
        run_dir.mkdir(exist_ok=True)
        watch = partial(observer, folder, place)
        assert train(configuration(model, pairs), run_dir, evaluate_in_training, watch) == code
    if distributed.is_main():
        as_killed(folder / "whole", folder / "killed")
    distributed.barrier()
    assert train(configuration(model, pairs), folder / "killed", evaluate_in_training) == 0
