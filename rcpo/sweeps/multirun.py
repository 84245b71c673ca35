"""Many runs from one command line: Hydra composes them, each is a process of its own."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rcpo.config.composition import compose_with, user_part
from rcpo.config.parsing import parse, save_run_config
from rcpo.config.refusals import refusals_explained
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.folder import make_folder, refuse_named_run, refuse_other
from rcpo.launch.logs import close_log
from rcpo.launch.outcomes import DONE, FAILED, REFUSED, Outcome
from rcpo.launch.pool import Pool, run_process, slots
from rcpo.launch.ranks import external_ranks
from rcpo.runs.folder import CONFIG_FILE, LOG_FILE, sweeping
from rcpo.runs.inputs import completed
from rcpo.sweeps.naming import refuse_shared_folders
from rcpo.sweeps.settings import sweep_config
from rcpo.system.signals import STOPPED
from rcpo.system.text import os_message

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.utils import JobReturn

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True)
class RunJob:
    """A run of many: its folder, and what becomes of it."""

    run_dir: Path
    outcome: Future[Outcome] | Outcome

    def result(self) -> Outcome:
        """Wait for the run's end."""
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
    """What the runs share, with the `hydra` node; raises ConfigError for what no run of several can do."""
    if external_ranks() is not None:
        raise ConfigError(
            "several runs start processes of their own; leave the outer launcher out, or give it one run"
        )
    cfg = compose_with(hydra, name, overrides, multirun=True)
    refuse_named_run(cfg.get("resume"))
    return cfg


def multirun(hydra: Hydra, name: str, overrides: Sequence[str], cfg: DictConfig) -> dict[Path, Outcome]:
    """Start a run for each combination, by Hydra's launcher; the outcomes by folder.

    `cfg` is what they share. Raises ConfigError for what Hydra refuses.
    """
    sweep_dir = Path(cfg.hydra.sweep.dir)
    pinned = [*overrides, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(str(sweep_dir))}"]
    make_folder(sweep_dir, "hydra.sweep.dir")
    with refusing_leaves_nothing(sweep_dir), refusals_explained(hydra, name, overrides):
        planned = list(_flatten(_first_pass(hydra, name, pinned, cfg)))
        close_log()
        refuse_shared_folders((each.run_dir, each.overrides) for each in planned)
        if cfg.hydra.launcher._target_ != BASIC_LAUNCHER:
            jobs = list(_flatten(hydra.multirun(name, remote_job, pinned)))
        else:
            parallel = slots(sweep_config(cfg).parallel, cfg.launch.processes)
            with sweeping(sweep_dir), Pool(parallel) as pool:
                jobs = [local_job(pool, each) for each in planned]
                for job in jobs:
                    job.result()
    return {job.run_dir: job.result() for job in jobs}


@dataclass(frozen=True)
class Planned:
    """A run that has not begun: its folder, the overrides that make it, and its configuration or refusal."""

    run_dir: Path
    overrides: str
    config: RunConfig | ConfigError


def _first_pass(hydra: Hydra, name: str, overrides: Sequence[str], cfg: DictConfig) -> Any:
    """The runs of a sweep as Hydra composes them here, whatever launcher will start them."""
    if cfg.hydra.launcher._target_ != BASIC_LAUNCHER:  # the other launcher's settings are unknown to this one
        settings = re.compile(r"[+~]*hydra[/.]launcher\b")
        overrides = [*(each for each in overrides if not settings.match(each)), "hydra/launcher=basic"]
    return hydra.multirun(name, planned_job, list(overrides))


def planned_job(cfg: DictConfig) -> Planned:
    """Hydra's task in the first pass over a sweep: nothing is started."""
    from hydra.core.hydra_config import HydraConfig

    config: RunConfig | ConfigError
    try:
        config = parse(user_part(cfg))
    except ConfigError as error:
        config = error
    job = HydraConfig.get()
    return Planned(Path(job.runtime.output_dir), " ".join(map(str, job.overrides.task)), config)


def local_job(pool: Pool, planned: Planned) -> RunJob:
    """Begin a run of many on this machine; it waits for its turn."""
    run_dir = planned.run_dir
    return RunJob(run_dir, start(run_dir, planned.config, lambda: _reported(pool, run_dir)))


def _reported(pool: Pool, run_dir: Path) -> Future[Outcome]:
    future = pool.start(run_dir)
    future.add_done_callback(lambda done: None if done.cancelled() else report(run_dir, done.result()))
    return future


def remote_job(cfg: DictConfig) -> RunJob:
    """Hydra's task for one run of many on another machine: it returns at the run's end."""
    planned = planned_job(cfg)
    run_dir = planned.run_dir
    outcome = start(run_dir, planned.config, lambda: run_process(run_dir))
    assert isinstance(outcome, Outcome)
    report(run_dir, outcome)
    return RunJob(run_dir, outcome)


Started = Future[Outcome] | Outcome


def start(run_dir: Path, config: RunConfig | ConfigError, begin: Callable[[], Started]) -> Started:
    """Write the run's configuration into its folder and begin it, unless it is refused or complete.

    What fails for one run does not end the others.
    """
    try:
        if isinstance(config, ConfigError):
            raise config
        if config.resume is not None and completed(run_dir, config):
            print(f"rcpo: {run_dir.name}: complete before", flush=True)
            return Outcome(DONE)
        refuse_other(run_dir, config)
        save_run_config(config, run_dir / CONFIG_FILE)
    except ConfigError as error:
        outcome = Outcome(REFUSED, str(error))
    except OSError as error:  # a full disk
        outcome = Outcome(FAILED, os_message(error))
    else:
        return begin()
    report(run_dir, outcome)
    with suppress(OSError):
        outcome.write(run_dir)
    return outcome


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


def _flatten(results: Any) -> Iterator[Any]:
    """What the tasks returned, from whatever nesting of results a sweeper returns; some return none."""
    if isinstance(results, list | tuple):
        for entry in results:
            yield from _flatten(entry)
    elif results is not None:
        returned: JobReturn = results
        yield returned.return_value


@contextmanager
def refusing_leaves_nothing(sweep_dir: Path) -> Iterator[None]:
    """Where a sweep is refused, empty folders go, and its own if it has Hydra's record alone."""
    record = sweep_dir / "multirun.yaml"
    try:
        yield
    except ConfigError:
        if sweep_dir.is_dir():
            for folder in filter(Path.is_dir, sweep_dir.iterdir()):
                if all(entry.name == LOG_FILE and not entry.stat().st_size for entry in folder.iterdir()):
                    shutil.rmtree(folder)
            if all(entry == record for entry in sweep_dir.iterdir()):
                record.unlink(missing_ok=True)
                sweep_dir.rmdir()
        raise


def quoted(text: str) -> str:
    """A path as a Hydra value: quoted, so that commas and brackets in it mean nothing."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
