"""A run's log file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rcpo.runs.folder import LOG_FILE
from rcpo.system.text import os_message


class LogFile(logging.FileHandler):
    """Reports once, in one line, that its file cannot be written, as on a full disk; the run goes on."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            print(f"rcpo: {self.baseFilename} misses lines: {os_message(error)}", file=sys.stderr)


def close_log() -> None:
    """End what Hydra's composition of a sweep leaves: the root logger writing to one run's log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()


def configure_log(run_dir: Path, *, file: bool) -> None:
    """Warnings to standard error, everything to the run's log; `file` on rank 0 only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.WARNING)
    if file:
        handlers.append(LogFile(run_dir / LOG_FILE, encoding="utf-8"))
    layout = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, handlers=handlers, force=True)
