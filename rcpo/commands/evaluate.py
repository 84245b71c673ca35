"""`rcpo evaluate`: a run's final weights, or a model without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcpo.commands.compose import show, shows
from rcpo.config.composition import (
    PRIMARY,
    compose_with,
    hydra_session,
    over_run,
    resolved_dir,
    split_arguments,
    user_part,
)
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.parsing import parse, read_tree, save_run_config, structure, to_container
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.logs import configure_log
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.launch.run import launch
from rcpo.runs.folder import CONFIG_FILE, EVALUATION, METRICS_FILE


def evaluate(arguments: Sequence[str]) -> int:
    """`rcpo evaluate ARGUMENTS`: a finished run (`run=DIR`) with overrides, or a model given by keys.

    Returns the exit code; raises ConfigError for what is refused beforehand.
    """
    flags = split_arguments(arguments)
    name = flags.config_name or PRIMARY
    runs = [override.removeprefix("run=") for override in flags.overrides if override.startswith("run=")]
    overrides = [override for override in flags.overrides if not override.startswith("run=")]
    if flags.multirun:
        raise ConfigError("command line: evaluate takes one model at a time, without -m")
    refuse_command_keys(overrides)
    with hydra_session(flags.config_dir, flags.config_path) as hydra:
        if shows(flags):
            return show(hydra, name, flags, overrides)
        if runs:
            run_dir = Path(runs[0])
            if (run_dir / CONFIG_FILE).exists() and not (run_dir / METRICS_FILE).exists():
                raise ConfigError(f"run={run_dir} was never trained: it has no metrics.jsonl")
            base = to_container(structure(read_tree(run_dir / CONFIG_FILE)))
            config = parse(over_run(hydra, base, overrides))
        else:
            cfg = compose_with(hydra, name, overrides)
            config, run_dir = parse(user_part(cfg)), resolved_dir(cfg, "evaluation")
    # nothing is trained, so the global batch need not fit this number of processes
    config.train.batch_size = (config.train.micro_batch_size or 1) * world_size(config)
    check(config, world_size(config))
    ranks = external_ranks()
    main_rank = ranks is None or ranks.rank == 0
    if main_rank:
        (run_dir / EVALUATION).mkdir(parents=True, exist_ok=True)
        save_run_config(config, run_dir / EVALUATION / CONFIG_FILE)
    configure_log(run_dir, file=main_rank)
    return launch(config, run_dir if main_rank else None, "evaluate")
