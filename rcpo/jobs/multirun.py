"""Many runs from one command line: Hydra composes them, each is a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rcpo.config import ConfigError, RunConfig, parse, save_run_config
from rcpo.config.changes import changes
from rcpo.config.commands import sweep_config
from rcpo.config.composition import compose_with, refusals_explained, user_part
from rcpo.jobs import naming  # noqa: F401 - a job elsewhere resolves its folder's name with it
from rcpo.jobs.folders import job_dir, refuse_other
from rcpo.launch import DONE, FAILED, REFUSED, external_ranks
from rcpo.launch.outcomes import Outcome
from rcpo.launch.pool import Pool, run_process, slots
from rcpo.runfolder import finished_state
from rcpo.signals import STOPPED

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.utils import JobReturn

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True)
class Job:
    """A run of many: its folder, and what becomes of it."""

    run_dir: Path
    outcome: Future[Outcome] | Outcome

    def result(self) -> Outcome:
        """Waits for the run's end."""
        return self.outcome.result() if isinstance(self.outcome, Future) else self.outcome


def train_many(hydra: Hydra, name: str, overrides: Sequence[str]) -> int:
    """`rcpo train -m`: a run for each combination; a failed one is reported and the rest goes on.

    Returns the exit code of the whole; raises ConfigError for what is refused beforehand.
    """
    cfg = compose_many(hydra, name, overrides)
    outcomes = multirun(hydra, name, overrides, cfg)
    codes = [outcome.code for outcome in outcomes.values()]
    if codes:
        print(f"rcpo: {codes.count(DONE)} of {len(codes)} runs done, in {cfg.hydra.sweep.dir}")
    return summary_code(codes)


def compose_many(hydra: Hydra, name: str, overrides: Sequence[str]) -> DictConfig:
    """What the runs share, with the `hydra` node; raises ConfigError under an outer launcher."""
    if external_ranks() is not None:
        raise ConfigError(
            "several runs start processes of their own; leave the outer launcher out, or give it one run"
        )
    return compose_with(hydra, name, overrides, multirun=True)


def multirun(hydra: Hydra, name: str, overrides: Sequence[str], cfg: DictConfig) -> dict[Path, Outcome]:
    """Starts a run for each combination, by Hydra's launcher; the outcomes by folder.

    `cfg` is what they share. Raises ConfigError for what Hydra refuses.
    """
    sweep_dir = Path(cfg.hydra.sweep.dir)
    pinned = [*overrides, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(str(sweep_dir))}"]
    with refusing_leaves_nothing(sweep_dir), refusals_explained(hydra, name, overrides):
        if cfg.hydra.launcher._target_ != BASIC_LAUNCHER:
            jobs = list(_flatten(hydra.multirun(name, remote_job, pinned)))
        else:
            with Pool(slots(sweep_config(cfg).parallel, cfg.launch.processes)) as pool:
                jobs = list(_flatten(hydra.multirun(name, lambda job: local_job(pool, job), pinned)))
                for job in jobs:
                    job.result()
    return {job.run_dir: job.result() for job in jobs}


def local_job(pool: Pool, cfg: DictConfig) -> Job:
    """Hydra's task for one run of many on this machine: it returns while the run waits for its turn."""
    run_dir = job_dir()
    return Job(run_dir, start(run_dir, cfg, lambda: _reported(pool, run_dir)))


def _reported(pool: Pool, run_dir: Path) -> Future[Outcome]:
    future = pool.start(run_dir)
    future.add_done_callback(lambda done: None if done.cancelled() else report(run_dir, done.result()))
    return future


def remote_job(cfg: DictConfig) -> Job:
    """Hydra's task for one run of many on another machine: it returns at the run's end."""
    run_dir = job_dir()
    outcome = start(run_dir, cfg, lambda: run_process(run_dir))
    assert isinstance(outcome, Outcome)
    report(run_dir, outcome)
    return Job(run_dir, outcome)


Started = Future[Outcome] | Outcome


def start(run_dir: Path, cfg: DictConfig, begin: Callable[[], Started]) -> Started:
    """Writes the run's configuration into its folder and begins it, unless it is refused or complete."""
    try:
        config = parse(user_part(cfg))
        if is_complete(run_dir, config):
            print(f"rcpo: {run_dir.name}: complete before", flush=True)
            return Outcome(DONE)
        refuse_other(run_dir, config)
    except ConfigError as error:
        outcome = Outcome(REFUSED, str(error))
        report(run_dir, outcome)
        outcome.write(run_dir)
        return outcome
    save_run_config(config, run_dir / "config.yaml")
    return begin()


def is_complete(run_dir: Path, config: RunConfig) -> bool:
    """Whether the folder holds this very run, at its end, and it is to be continued."""
    state = None if config.resume is None else finished_state(run_dir)
    return state is not None and not changes(state["config"], config)


def report(run_dir: Path, outcome: Outcome) -> None:
    """A line for a run's end, on standard error where it did not get there."""
    if outcome.code == DONE:
        print(f"rcpo: {run_dir.name}: done", flush=True)
    else:
        line = f"rcpo: {run_dir.name}: exit code {outcome.code}: {outcome.reason}"
        print(line, file=sys.stderr, flush=True)


def summary_code(codes: Sequence[int]) -> int:
    """A multirun's exit code: 0 all done, 75 one was stopped, 2 all were refused, else 1."""
    if STOPPED in codes:
        return STOPPED
    if all(code == DONE for code in codes):
        return DONE
    return REFUSED if all(code == REFUSED for code in codes) else FAILED


def _flatten(results: Any) -> Iterator[Job]:
    """Jobs from whatever nesting of results a sweeper returns; some return none."""
    if isinstance(results, list | tuple):
        for entry in results:
            yield from _flatten(entry)
    elif results is not None:
        returned: JobReturn = results
        yield returned.return_value


@contextmanager
def refusing_leaves_nothing(sweep_dir: Path) -> Iterator[None]:
    """Where a sweep is refused, its folder goes if it holds nothing but Hydra's record of the command."""
    record = sweep_dir / "multirun.yaml"
    try:
        yield
    except ConfigError:
        if sweep_dir.is_dir() and all(entry == record for entry in sweep_dir.iterdir()):
            record.unlink(missing_ok=True)
            sweep_dir.rmdir()
        raise


def quoted(text: str) -> str:
    """A path as a Hydra value: quoted, so that commas and brackets in it mean nothing."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
