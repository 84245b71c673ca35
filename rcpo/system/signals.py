"""Stop signals: what asks a run to save a checkpoint and leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75  # the exit code of a run that a signal stopped, with its checkpoint saved
# schedulers send one of these some time before they kill; SIGHUP is a closed terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def signal_name(number: int) -> str:
    """A signal as people call it; real-time ones have no name of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Stopped(Exception):
    """A signal ended the run; the message says where."""


class StopRequest:
    """Remembers, while entered, that this process got a stop signal; the training loop asks it each step.

    A signal that the process ignores on entry (SIGHUP under nohup) stays ignored. Further signals change
    nothing: what is being saved is saved. Only the main thread can enter it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
