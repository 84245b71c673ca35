"""What all caches share: their folder, hashes of files, a lock between processes, files written whole.

Hashing 16 GB takes half a minute, so a file's hash is remembered by path, inode, size and both times of
change; it is remembered only where the file was at rest for a while, for a change within the clock's grain
would not show in them (the "racy" files of git's index).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path

OFF = ("off", "false")  # YAML reads an unquoted off as false
AT_REST = 2.0  # seconds; the coarsest clock of a common file system (FAT) counts in these
_BLOCK = 1 << 20


def cache_folder(setting: str | None) -> Path | None:
    """The folder that a `…cache` key means: its own, or the user's for None; None for `off`."""
    if setting is not None and setting.lower() in OFF:
        return None
    if setting is not None:
        return Path(setting).expanduser()
    if own := os.environ.get("RCPO_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rcpo"


def file_hash(path: Path, memo: Path | None) -> str:
    """SHA-256 of a file's contents, computed or remembered."""
    before = _state(path)
    note = None if memo is None else memo / hashlib.sha256(before.encode()).hexdigest()
    if note is not None:
        with contextlib.suppress(OSError):  # nothing is remembered
            remembered = note.read_text(encoding="ascii", errors="replace")
            if len(remembered) == 2 * hashlib.sha256().digest_size:
                return remembered
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if note is not None and _state(path) == before and _at_rest(path):
        with contextlib.suppress(OSError):  # a full disk: it is hashed again next time
            write_atomically(note, digest.hexdigest().encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return json.dumps([str(path.resolve()), status.st_ino, status.st_size, *times])


def _at_rest(path: Path) -> bool:
    status = path.stat()
    return time.time() - max(status.st_mtime, status.st_ctime) > AT_REST


class Lock:
    """A lock between processes by key, which ends with its holder; its file stays.

    Where the file system knows no locks every process gets it: then the same values are computed twice.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        with contextlib.suppress(OSError):  # a read-only folder: nothing is written there either
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.exclusive = False

    def acquire(self) -> bool:
        """Whether the holder is now this process; does not wait. `exclusive`: nobody else is it."""
        if self._descriptor < 0:
            return True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR)
        self.exclusive = True
        return True

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_atomically(path: Path, content: bytes) -> None:
    """A small file, whole or not at all; raises OSError."""
    temporary, descriptor = new_file(path)
    try:
        write_all(descriptor, content, 0)
        os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def write_privately(path: Path, text: str) -> None:
    """A file that its owner alone may read, from its first byte on; raises OSError."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk: secrets are not left lying about


def new_file(path: Path) -> tuple[Path, int]:
    """A file beside `path`, open for writing, whose name marks it as unfinished; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem}.{uuid.uuid4().hex}.tmp"
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, content: bytes, offset: int) -> None:
    """All of `content` from `offset` on; raises OSError."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(scratch: Path, folder: Path) -> None:
    """Give a folder its name once all that is in it is on the disk, in place of an older one."""
    for path in scratch.rglob("*"):
        _sync(path)
    _sync(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    _sync(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a whole file so that a reader, or a crash, sees the old content or the new, nothing between.

    Processes that write the same file do not disturb each other: the last one's content stays. Half of a
    surrogate pair, which UTF-8 cannot hold, becomes its escape: JSON reads it as the same again.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)  # of a full disk
