"""`rcpo evaluate`: a run's final weights, or a model without a run."""

from __future__ import annotations

from collections.abc import Sequence

from rcpo.commands.compose import command
from rcpo.config.composition import resolved_dir, user_part
from rcpo.config.parsing import parse
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.folder import keeping, ready_folder
from rcpo.launch.outcomes import DONE
from rcpo.launch.ranks import world_size
from rcpo.launch.run import TASKS, launch
from rcpo.runs.folder import CONFIG_FILE, METRICS_FILE


def evaluate(arguments: Sequence[str]) -> int:
    """`rcpo evaluate ARGUMENTS`: a finished run (`run=DIR`) with overrides, or a model given by keys.

    Returns the exit code; raises ConfigError for what is refused beforehand.
    """
    with command(arguments, own=("run",), alone="evaluate takes one model at a time, without -m") as call:
        if call.shown:
            return DONE
        if "run" in call.own:
            run_dir = call.folder("run")
            if (run_dir / CONFIG_FILE).exists() and not (run_dir / METRICS_FILE).exists():
                raise ConfigError(f"run={run_dir} was never trained: it has no metrics.jsonl")
            config = call.config_of(run_dir)
        else:
            cfg = call.compose()
            given = any(word.startswith("hydra.run.dir=") for word in call.overrides)
            config, run_dir = parse(user_part(cfg)), resolved_dir(cfg, None if given else "evaluation")
            if (run_dir / METRICS_FILE).exists():
                raise ConfigError(
                    f"hydra.run.dir={run_dir} is a run's folder; evaluate the run with run={run_dir}, or "
                    "name another folder for a model without a run"
                )
    # nothing is trained, so the global batch need not fit this number of processes
    config.train.batch_size = (config.train.micro_batch_size or 1) * world_size(config)
    check(config, world_size(config))
    task = TASKS["evaluate"]
    end = keeping(run_dir / task.record / CONFIG_FILE)  # what the figures there were measured with
    return end(launch(config, ready_folder(config, run_dir, task.record), task))
