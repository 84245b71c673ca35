"""`rcpo evaluate`: a run's final weights, each of its checkpoints, or a model without a run."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rcpo.checkpoint.read import checkpoint_weights
from rcpo.config.model import holds_adapter
from rcpo.config.schema import RunConfig
from rcpo.engine.load import policy_source
from rcpo.errors import ConfigError
from rcpo.evaluation.harness import Harness, flat_record, write_results
from rcpo.evaluation.heldout import MERGED, evaluate, merge_record
from rcpo.evaluation.judge.inputs import Judging
from rcpo.evaluation.judge.record import judge_pairs
from rcpo.evaluation.judge.winrate import PREFIX as JUDGED
from rcpo.evaluation.summary import describe, judge_table, summary_table, task_table
from rcpo.models.loading import load_tokenizer, load_whole
from rcpo.runs.folder import (
    CHECKPOINT_RECORDS,
    EVALUATION,
    FINAL,
    METRICS_FILE,
    STATE_FILE,
    checkpoint_folders,
    finished_state,
)
from rcpo.runs.inputs import JUDGE, PAIRS, TASKS, write_evaluation_settings
from rcpo.runs.jsonl import clean_row, write_lines
from rcpo.system import distributed
from rcpo.system.distributed import say
from rcpo.training.objective import restore_objective
from rcpo.training.session import Session


def evaluate_run(config: RunConfig, run_dir: Path) -> int:
    """Evaluate what the configuration asks for; return the exit code. Collective.

    Raises ConfigError where the run has no final weights, or no checkpoint where those are asked for, where
    nothing is held out, and for tasks that cannot be run.
    """
    settings = config.eval
    if not (settings.preferences or settings.tasks or settings.judge):
        raise ConfigError(
            "nothing to evaluate: eval.preferences=false, eval.judge=false, and eval.tasks is empty"
        )
    trained = (run_dir / METRICS_FILE).exists()
    final = run_dir / FINAL
    whole = trained and ((final / "config.json").is_file() or holds_adapter(final))
    saved = checkpoints(run_dir) if settings.checkpoints == "all" else []
    if trained and not (whole or saved):
        raise ConfigError(f"run={run_dir} has no final/ yet; finish it with resume={run_dir}")
    if settings.judge and trained and not whole:
        raise ConfigError(f"eval.judge=true: run={run_dir} has no final/ to be judged yet")
    judging = Judging.prepare(config, run_dir, final if whole else None) if settings.judge else None
    harness = Harness.prepare(config) if settings.tasks else None
    if settings.preferences:
        evaluate_pairs(config, run_dir, final if whole else None, saved, unfinished=trained and not whole)
    if harness is not None:
        evaluate_tasks(harness, run_dir, final if whole else None)
    if judging is not None:
        evaluate_by_judge(judging, run_dir)
    return 0


def evaluate_pairs(
    config: RunConfig, run_dir: Path, final: Path | None, saved: list[tuple[int, Path]], *, unfinished: bool
) -> None:
    """evaluation.json for `final`, or the configured model where the run is not `unfinished`; checkpoints."""
    if config.eval.kl_examples:
        config.reference.mode = "model"  # it has to score what the policy says, which no cache holds
    session = Session(config, run_dir, training=False, final=final)
    if session.datasets.evaluation is None:
        raise ConfigError("nothing is held out; set data.eval_path, or data.eval_fraction above 0")
    session.prepare_reference(say)
    record = None
    if not unfinished:
        restore_objective(session.objective, finished_state(run_dir))
        record = evaluate(session, parameters_geometry=config.eval.parameters_geometry)
        if distributed.is_main():
            merge_record(run_dir, record, kept=MERGED)
            write_evaluation_settings(run_dir, config, PAIRS)
        show(record, config.objective.reduction)
    if saved:
        evaluate_checkpoints(session, saved, record)
    session.engine.close()
    gc.collect()  # the engine refers to itself, and what comes next may load the model anew


def evaluate_tasks(harness: Harness, run_dir: Path, final: Path | None) -> None:
    """The harness's tasks on the whole model, an adapter merged into it; adds to evaluation.json."""
    config = harness.config
    source = policy_source(config, run_dir, final)
    tokenizer = load_tokenizer(source.tokenizer, config.model)
    load = partial(load_whole, source, config.model, config.train.dtype, config.seed)
    results = harness.run(source, tokenizer, load)
    for spec, reason in harness.skipped.items():
        say(f"left out: {spec} ({reason})")
    record = flat_record(results)
    if distributed.is_main():
        write_results(run_dir / EVALUATION, results)
        merge_record(run_dir, record, kept=("eval/",))
        write_evaluation_settings(run_dir, config, TASKS)
        Console().print(task_table(record))


def evaluate_by_judge(judging: Judging, run_dir: Path) -> None:
    """The judge's verdicts on the answers, for which rank 0 asks; adds to evaluation.json."""
    pairs = judging.pairs(run_dir)

    def ask() -> None:
        record = judge_pairs(judging.config, judging.endpoint, pairs, run_dir / EVALUATION, say)
        merge_record(run_dir, record, kept=("eval/",), renewed=JUDGED)
        write_evaluation_settings(run_dir, judging.config, JUDGE)
        Console().print(judge_table(record))

    distributed.on_main_alone(ask)


def evaluate_checkpoints(
    session: Session, saved: list[tuple[int, Path]], final: dict[str, Any] | None
) -> None:
    """evaluation/checkpoints.jsonl: a record for each checkpoint and for the `final` weights, by step."""
    run_dir = session.run_dir
    records = []
    for step, folder in saved:
        session.engine.load_weights(checkpoint_weights(folder))
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        restore_objective(session.objective, state)
        record = evaluate(
            session,
            examples=f"examples-step-{step}.jsonl",
            parameters_geometry=session.config.eval.parameters_geometry,
        )
        say(f"step {step}: {describe(record, session.config.objective.reduction)}")
        records.append({"step": step, **record})
    end = finished_state(run_dir)
    if final is not None and end is not None and end["step"] not in [record["step"] for record in records]:
        records.append({"step": end["step"], **final})
    if distributed.is_main():
        write_lines(run_dir / CHECKPOINT_RECORDS, [clean_row(record) for record in records])


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, oldest first; raises ConfigError where there is none."""
    found = distributed.broadcast_object(checkpoint_folders(run_dir))
    if not found:
        raise ConfigError(
            f"eval.checkpoints=all: {run_dir} holds no checkpoint; "
            "train with checkpoint.every=N and checkpoint.keep above the number of them"
        )
    return list(reversed(found))


def show(record: dict[str, Any], reduction: str | None) -> None:
    """The record as a table and one plain sentence, on the main rank's terminal."""
    if record and distributed.is_main():
        console = Console()
        console.print(summary_table(record))
        console.print(describe(record, reduction))
