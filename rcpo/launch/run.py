"""A validated configuration becomes a run: in this process, or in local ranks that it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.launch import meeting
from rcpo.launch.heartbeat import Heartbeat
from rcpo.launch.local import launch_workers, run_command
from rcpo.launch.outcomes import FAILED, REFUSED, report_failure, report_refusal, tell_agent
from rcpo.launch.ranks import export_ranks, external_ranks
from rcpo.runs.folder import EVALUATION
from rcpo.system.text import os_message

if TYPE_CHECKING:
    from rcpo.training.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a process does in a run's folder, to its exit code; `command` starts a local rank that does it."""

    run: Callable[[RunConfig, Path], int]
    command: Callable[[Path], list[str]]
    record: str = "."  # where in the folder the resolved config.yaml is


def train(config: RunConfig, run_dir: Path) -> int:
    """The trainer with its held-out evaluation, imported when they are needed; then the model card."""
    from rcpo.evaluation.heldout import evaluate_in_training
    from rcpo.evaluation.probes import Probe
    from rcpo.evaluation.run import show
    from rcpo.training import trainer

    last: dict[str, Any] = {}

    def held_out(session: Session) -> dict[str, Any]:
        last.clear()
        last.update(evaluate_in_training(session))
        return last

    try:
        code = trainer.train(config, run_dir, held_out, Probe if config.probe.size else None)
    except RunError:
        _renew_card(run_dir)  # of weights whose evaluation failed
        raise
    show(last, config.objective.reduction)
    _renew_card(run_dir)
    return code


def evaluate(config: RunConfig, run_dir: Path) -> int:
    """The evaluation of a finished run or a model, imported when it is needed."""
    from rcpo.evaluation.run import evaluate_run

    code = evaluate_run(config, run_dir)
    _renew_card(run_dir)
    return code


def _renew_card(run_dir: Path) -> None:
    """Rank 0 writes the model card of the folder's final/, where there is one."""
    from rcpo.report.card import renew_card
    from rcpo.system import distributed

    if distributed.is_main():
        renew_card(run_dir, print)


# what a process may do in a run's folder, by the names that `python -m rcpo.launch` takes
TASKS = {
    "train": Task(train, run_command),
    "evaluate": Task(evaluate, partial(run_command, task="evaluate"), EVALUATION),
}


def launch(config: RunConfig, run_dir: Path | None, task: Task = TASKS["train"]) -> int:
    """Run a task, as this process's rank or in local ranks, and return its exit code.

    0 done, 1 failed, 2 refused, 75 stopped with a checkpoint saved; failures go to the log and to standard
    error. `run_dir` holds the resolved config.yaml; ranks other than 0 pass None and get rank 0's.
    """
    if external_ranks() is None and config.launch.processes > 1:
        assert run_dir is not None
        return launch_workers(config.launch.processes, task.command(run_dir))
    name, heartbeat = task.run.__name__, Heartbeat(config.launch.lost_after)
    try:
        from rcpo.system import distributed

        _join(config, heartbeat)
        folder = meeting.share_folder(run_dir)
        if distributed.is_main():
            print(f"{name}: {folder}", flush=True)
            log.info("%s: %s", name, to_container(config))
        code = task.run(config, folder)
        _leave(heartbeat)
        return code
    except ConfigError as error:  # of all ranks alike, or of one that the others wait for
        report_refusal(error)
        _leave(heartbeat, in_order=False)
        return REFUSED
    except (RunError, OSError) as error:
        # the message says what happened (a full disk, a number that is not finite); the log has where
        log.info("%s failed", name, exc_info=True)
        report_failure(error)
        return FAILED
    except Exception as error:
        # the process ends here: the log keeps the traceback, the caller gets a code
        log.exception("%s failed", name)
        tell_agent(error)
        return FAILED


def _join(config: RunConfig, heartbeat: Heartbeat) -> None:
    """Connect this process to the other ranks, where an outer launcher started some."""
    from rcpo.system import distributed

    ranks = external_ranks()
    if ranks is None:
        distributed.initialize()
        return
    export_ranks(ranks, os.environ)
    seconds = config.launch.meeting_seconds
    store = meeting.meet(ranks, meeting.this_rank(ranks, config), seconds)
    with meeting.connecting(seconds):
        distributed.initialize(config.launch.timeout_minutes, store)
        distributed.barrier()
    heartbeat.begin(ranks, store)


def _leave(heartbeat: Heartbeat, *, in_order: bool = True) -> None:
    """Leave the other ranks: a group that is left to the interpreter's end at times aborts it."""
    from rcpo.system import distributed

    heartbeat.stop(in_order=in_order)
    distributed.shutdown()


def failed(error: OSError) -> int:
    """The exit code after an operation on files that failed before the ranks met."""
    log.info("failed", exc_info=error)
    report_failure(RunError(os_message(error)))
    return FAILED


def refused(error: ConfigError) -> int:
    """The exit code after what was refused before the ranks met, which the other ranks are told."""
    try:
        ranks = external_ranks()
        if ranks is not None:
            export_ranks(ranks, os.environ)
            error = meeting.refuse(ranks, str(error))
    except ConfigError as unreachable:
        log.info("the other ranks were not told: %s", unreachable)
    report_refusal(error)
    return REFUSED
