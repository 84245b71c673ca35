"""A run's folder: who trains in it, which checkpoints it holds. Nothing here imports torch.

The lock is the kernel's: it goes when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcpo.config import ConfigError

LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"  # in a checkpoint: the run's own state
FINISHED_FILE = "finished.json"  # the same, of a run that came to its end
_NAME = re.compile(r"step-(\d+)")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the folder's lock; raises ConfigError, naming the holder, where another process has it.

    A file system without locks (some network ones) gives none, and two runs are then not kept apart.
    """
    path = run_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{run_dir} is in use: {holder} trains in it; wait for it, or choose another hydra.run.dir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def refuse_locked(run_dir: Path) -> None:
    """Raises ConfigError where a process trains in the folder at this moment."""
    if (run_dir / LOCK_FILE).exists():
        with locked(run_dir):
            pass


def checkpoint_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint there, newest first, unverified."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    entries = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(((int(match[1]), entry) for match, entry in entries if match), reverse=True)


def stored_state(run_dir: Path) -> dict[str, Any] | None:
    """The run's state in the newest readable checkpoint, unverified, or at its end; None without either."""
    for _, folder in checkpoint_folders(run_dir):
        try:
            state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged: the trainer will say so
            continue
        return state
    return finished_state(run_dir)


def finished_state(run_dir: Path) -> dict[str, Any] | None:
    """The state in which a run came to its end; None where it has not."""
    path = run_dir / FINISHED_FILE
    if not path.exists():
        return None
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state
