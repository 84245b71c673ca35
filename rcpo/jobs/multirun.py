"""Many runs from one command line: Hydra composes them, each is a process of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rcpo.config import ConfigError, parse, save_run_config
from rcpo.config.composition import compose_with, refusals_explained
from rcpo.jobs.folders import job_dir, refuse_other
from rcpo.launch import DONE, FAILED, LOG_FILE, REFUSED, external_ranks, run_process
from rcpo.signals import STOPPED

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.utils import JobReturn

log = logging.getLogger(__name__)

# the run of this process's multirun that a signal reached: none is started after it
_stopped: list[Path] = []


def multirun(hydra: Hydra, name: str, overrides: Sequence[str]) -> int:
    """Starts the runs one after another; a failed one is reported and the rest goes on.

    Returns the exit code of the whole; raises ConfigError for what is refused beforehand.
    """
    if external_ranks() is not None:
        raise ConfigError(
            "-m starts the runs itself; leave the outer launcher out, or give it one run at a time"
        )
    cfg = compose_with(hydra, name, overrides, multirun=True)
    sweep_dir = Path(cfg.hydra.sweep.dir)
    pinned = [*overrides, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(str(sweep_dir))}"]
    _stopped.clear()
    try:
        with refusals_explained(hydra, name, overrides):
            results = hydra.multirun(name, _sweep_job, pinned)
    except ConfigError:
        _remove_empty(sweep_dir)
        raise
    codes = [int(job.return_value) for job in _flatten(results)]
    if codes:
        print(f"rcpo: {codes.count(DONE)} of {len(codes)} runs done, in {sweep_dir}")
    return summary_code(codes)


def _sweep_job(cfg: DictConfig) -> int:
    """Hydra's task for one run of many: a process of its own, whose end cannot take the others along."""
    run_dir = job_dir()
    if _stopped:
        return STOPPED
    try:
        config = parse(cfg)
        refuse_other(run_dir, config)
        save_run_config(config, run_dir / "config.yaml")
    except ConfigError as error:
        print(f"rcpo: {run_dir.name}: {error}", file=sys.stderr)
        log.info("refused: %s", error)
        return REFUSED
    code, signalled = run_process(run_dir)
    if code != DONE:
        print(f"rcpo: {run_dir.name} ended with exit code {code}; see {run_dir / LOG_FILE}", file=sys.stderr)
    if signalled or code == STOPPED:
        _stopped.append(run_dir)
    return code


def summary_code(codes: Sequence[int]) -> int:
    """A multirun's exit code: 0 all done, 75 one was stopped, 2 all were refused, else 1."""
    if STOPPED in codes:
        return STOPPED
    if all(code == DONE for code in codes):
        return DONE
    return REFUSED if all(code == REFUSED for code in codes) else FAILED


def _flatten(results: Any) -> Iterable[JobReturn]:
    """Job results from whatever nesting a sweeper returns; some return none."""
    if isinstance(results, list | tuple):
        for entry in results:
            yield from _flatten(entry)
    elif results is not None:
        yield results


def _remove_empty(sweep_dir: Path) -> None:
    """Removes a sweep's folder that holds nothing but Hydra's record of the command."""
    record = sweep_dir / "multirun.yaml"
    if sweep_dir.is_dir() and all(entry == record for entry in sweep_dir.iterdir()):
        record.unlink(missing_ok=True)
        sweep_dir.rmdir()


def quoted(text: str) -> str:
    """A path as a Hydra value: quoted, so that commas and brackets in it mean nothing."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
