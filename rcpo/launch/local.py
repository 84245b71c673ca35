"""Processes on this machine: the ranks of a run, or a whole run; their signals and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.launch.outcomes import DONE, FAILED, REFUSED, WORKER
from rcpo.runs.folder import LOG_FILE
from rcpo.system.machine import cores
from rcpo.system.signals import STOP_SIGNALS, STOPPED, signal_name

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

log = logging.getLogger(__name__)
LEEWAY = 5  # seconds in which the others notice that a rank was killed


@dataclass(frozen=True)
class Node:
    """This node's place among those that start their ranks for themselves, and where they meet."""

    rank: int
    count: int
    address: str


def launch_workers(processes: int, command: list[str], node: Node | None = None) -> int:
    """Start `command` as local ranks under PyTorch's elastic agent; return the exit code of the whole.

    Without a `node` they are all there is.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the agent's own reports would come beside ours; failures come as an exception anyway
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    ranks_share = {"OMP_NUM_THREADS": str(max(1, cores() // processes)), WORKER: "1"}
    with tempfile.TemporaryDirectory(prefix="rcpo-launch-") as folder:
        agent = LaunchConfig(
            **_meeting(node, Path(folder).name),
            nproc_per_node=processes,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="",  # forwarded below: the agent would kill ranks that are saving a checkpoint
        )
        with _environment(ranks_share), forward_signals(_children_of_this()) as received:
            try:
                elastic_launch(agent, command[0])(*command[1:])
            except ChildFailedError as error:
                return _outcome(list(error.failures.values()), stopping=bool(received))
    return STOPPED if received else DONE


def _meeting(node: Node | None, name: str) -> dict[str, Any]:
    """How the elastic agents of a run's nodes find each other."""
    if node is None:
        endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
        return {"min_nodes": 1, "max_nodes": 1, "run_id": name, **endpoint}
    static = {"rdzv_backend": "static", "rdzv_endpoint": node.address, "rdzv_configs": {"rank": node.rank}}
    return {"min_nodes": node.count, "max_nodes": node.count, "run_id": "rcpo", **static}


def _children_of_this() -> Callable[[], list[int]]:
    """List the ids of this process's children: the ranks (multiprocessing's tracker ignores signals).

    Its import is done when this returns: in a signal's handler, a second signal would find it half done.
    """
    import psutil  # type: ignore[import-untyped]

    this = psutil.Process()
    return lambda: [child.pid for child in this.children()]


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """`extra` in os.environ for a while; what the user set already stays as it is."""
    added = {key: value for key, value in extra.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def forward_signals(children: Callable[[], list[int]]) -> Iterator[list[int]]:
    """Hand stop signals on to the processes that `children` lists, and yield the list of those received.

    A signal that this process ignores (SIGHUP under nohup) stays ignored, as the children ignore it too.
    """
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for pid in children():
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it left by itself in between
                continue

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _outcome(failures: list[ProcessFailure], *, stopping: bool) -> int:
    """The exit code that a set of failed ranks stands for, and one message for a failure."""
    codes = [failure.exitcode for failure in failures]
    first = min(failures, key=lambda failure: (failure.exitcode < 0 and REFUSED in codes, _since(failure)))
    # a rank that was stopped before it could listen has nothing to save
    if STOPPED in codes or (stopping and -first.exitcode in STOP_SIGNALS):
        return STOPPED
    message = _message(first)
    if REFUSED in codes:
        print(f"rcpo: {message}", file=sys.stderr)
        log.info("refused: %s", message)
        return REFUSED
    end = f"; its traceback is in the run's {LOG_FILE}"
    if first.exitcode < 0:
        name = signal_name(-first.exitcode)
        why = " while it was being stopped" if stopping else ""
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        message, end = f"it was ended by {name}{why}{hint}", ""
    log.info("rank %s failed: %s", first.local_rank, message)
    print(
        f"rcpo: rank {first.local_rank} failed (exit code {first.exitcode}): {message}{end}", file=sys.stderr
    )
    return FAILED


def _since(failure: ProcessFailure) -> tuple[int, bool]:
    """When a rank failed, in seconds. One that was killed comes before those that wrote of its silence.

    The agent sends SIGTERM to the ranks that are left, so one that it ended comes after the others.
    """
    told = failure.exitcode == -signal.SIGTERM
    killed = failure.exitcode < 0 and not told
    return failure.timestamp - (LEEWAY if killed else 0), told


def _message(failure: ProcessFailure) -> str:
    """The last line of what a rank recorded, without the exception's name where it was a ConfigError."""
    recorded = failure.error_file_data.get("message", "")
    text = recorded.get("message", "") if isinstance(recorded, dict) else recorded
    return str(text).removeprefix("ConfigError: ") or "no message"


def run_command(run_dir: Path, task: str = "train") -> list[str]:
    """The command that trains, or evaluates, RUN_DIR as the configuration in it says."""
    return [*python(), "-m", "rcpo.launch", str(run_dir), task]


def python() -> list[str]:
    """This interpreter, which imports nothing from the working folder: a `random.py` there is the user's own.

    Only where rcpo itself is found there alone, as in a checkout that is not installed, the folder counts.
    """
    root = Path(__file__).resolve().parents[2]
    elsewhere = any(Path(entry or ".").resolve() == root for entry in sys.path[1:])
    return [sys.executable] if root == Path.cwd() and not elsewhere else [sys.executable, "-P"]
