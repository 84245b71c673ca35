"""Runs as processes of their own, some at a time, so that one run's end cannot take the others along."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from rcpo.launch.local import forward_signals, run_command
from rcpo.launch.outcomes import Outcome, outcome_of, size_of
from rcpo.runs.folder import CONSOLE_FILE, LOG_FILE
from rcpo.system.machine import cores
from rcpo.system.signals import STOPPED

_POLL_SECONDS = 0.5

NEVER = Outcome(STOPPED, "not started: the sweep was stopped before")


def slots(parallel: int | None, processes: int) -> list[dict[str, str]]:
    """What each of `parallel` runs at a time finds in its environment: its GPUs, its share of the cores.

    `processes` GPUs belong to a run; None gives every such group a run, and a machine without GPUs one run.
    More runs than groups share them.
    """
    if parallel == 1:
        return [{}]
    devices = _devices()
    groups = [devices[i : i + processes] for i in range(0, len(devices) - processes + 1, processes)]
    count = parallel or max(1, len(groups))
    if groups:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(groups[i % len(groups)])} for i in range(count)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * count
    return [{"OMP_NUM_THREADS": str(max(1, cores() // (count * processes)))}] * count


def _devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


class Pool:
    """Starts runs, as many at a time as there are slots. A context manager; only the main thread enters it.

    Stop signals reach the runs that are under way, and no run starts after one. Runs that share the machine
    write what they say to `console.log` in their folders.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self.slots = len(slots)
        self._free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(len(slots))
        self._running: set[int] = set()
        self._received: list[int] = []
        self._stopped = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> Pool:
        self._received = self._stack.enter_context(forward_signals(lambda: sorted(self._running)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stopped.set()
            for pid in sorted(self._running):
                os.kill(pid, signal.SIGTERM)
        self._threads.shutdown(cancel_futures=error is not None)
        self._stack.close()

    @property
    def stopped(self) -> bool:
        """Whether a signal came, or a run was stopped by one of its own: nothing is started any more."""
        return bool(self._received) or self._stopped.is_set()

    def start(self, run_dir: Path, given_up: Callable[[], bool] | None = None) -> Future[Outcome]:
        """Train RUN_DIR as its config.yaml says, when a slot is free; its outcome is left there too.

        `given_up` is asked twice a second and stops the run, with a checkpoint, when it says yes.
        """
        return self._threads.submit(self._run, run_dir, given_up)

    def _run(self, run_dir: Path, given_up: Callable[[], bool] | None) -> Outcome:
        if self.stopped:
            return NEVER
        slot = self._free.get()
        try:
            outcome, gave_up = self._wait(run_dir, slot, given_up)
        finally:
            self._free.put(slot)
        if outcome.code == STOPPED and not gave_up:
            self._stopped.set()
        with suppress(OSError):  # a full disk ends one run, not those beside it; the outcome is reported
            outcome.write(run_dir)
        return outcome

    def _wait(
        self, run_dir: Path, slot: Mapping[str, str], given_up: Callable[[], bool] | None
    ) -> tuple[Outcome, bool]:
        before = size_of(run_dir / LOG_FILE)
        with ExitStack() as stack:
            console = None
            if self.slots > 1:
                console = stack.enter_context((run_dir / CONSOLE_FILE).open("ab"))
            process = subprocess.Popen(
                run_command(run_dir),
                start_new_session=True,
                env={**os.environ, **slot},
                stdout=console,
                stderr=subprocess.STDOUT if console else None,
            )
            self._running.add(process.pid)
            try:
                if self.stopped:  # the signal came before there was a process to hand it to
                    process.send_signal(signal.SIGTERM)
                gave_up = _wait_or_give_up(process, given_up)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait()
                self._running.discard(process.pid)
        return outcome_of(process.returncode, run_dir, before), gave_up


def _wait_or_give_up(process: subprocess.Popen[bytes], given_up: Callable[[], bool] | None) -> bool:
    """Wait for the end of a process; True where `given_up` had it stopped."""
    while given_up is not None:
        try:
            process.wait(_POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            if given_up():
                process.send_signal(signal.SIGTERM)
                process.wait()
                return True
    process.wait()
    return False


def run_process(run_dir: Path) -> Outcome:
    """Train RUN_DIR in a process of its own and wait for it; stop signals are handed on."""
    with Pool([{}]) as pool:
        return pool.start(run_dir).result()
