"""One entry of the cache: a file of float32 log-probs behind a header that says what they are.

A header of 4,096 bytes (JSON, filled up with spaces) holds the key, what went into it, the number of values
and the SHA-256 of their bytes; the values follow, little-endian. A file gets its name only when it is whole
and on the disk; an incomplete one has another name and is removed by the next process that holds the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rcpo.errors import RunError
from rcpo.system.files import new_file, sync_folder, write_all

HEADER = 4096
SUFFIX = ".logps"
VALUES = np.dtype("<f4")
_BLOCK = 1 << 20


class DamagedEntry(Exception):
    """A file of the cache that is not what its name says; the message says how it was found out."""


class Stored:
    """The values of an open entry, verified: `values` (T,) are mapped, not read."""

    def __init__(self, path: Path, key: str, total: int) -> None:
        """Raise FileNotFoundError where there is none, DamagedEntry where it is not whole or not this one."""
        self.path = path
        self._file = path.open("rb")
        try:
            self._state = self._status()
            _verify(self._file.fileno(), key, total)
        except DamagedEntry:
            self._file.close()
            raise
        mapped = np.memmap(self._file, VALUES, "r", offset=HEADER, shape=(total,)) if total else None
        self.values: np.ndarray = np.zeros(0, VALUES) if mapped is None else mapped

    def check(self) -> None:
        """Raise RunError where the file was written to since it was opened; deleting it does no harm."""
        if self._status() != self._state:
            raise RunError(
                f"{self.path} was changed while this run reads its reference log-probs from it; delete the "
                "file and start the run again (resume=auto continues it)"
            )

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


class Sink:
    """Takes in the T values of an entry piece by piece, in any order, into a file beside the entry's.

    Where the file cannot be written (`failure` says why), or `path` is None, they are kept in memory.
    """

    def __init__(self, path: Path | None, total: int) -> None:
        self.total = total
        self.failure: OSError | None = None
        self._path = path
        self._temporary: Path | None = None
        self._descriptor = -1
        self._memory: np.ndarray | None = None
        if path is None:
            self._memory = np.zeros(total, VALUES)
            return
        try:
            self._temporary, self._descriptor = new_file(path)
        except OSError as error:
            self._to_memory(error)

    def write(self, place: int, values: np.ndarray) -> None:
        """Values (m,) for places `place` .. `place` + m."""
        assert place >= 0 and place + len(values) <= self.total, (place, len(values), self.total)
        if self._memory is None:
            try:
                content = values.astype(VALUES).tobytes()
                write_all(self._descriptor, content, HEADER + place * VALUES.itemsize)
                return
            except OSError as error:
                self._to_memory(error)
        assert self._memory is not None
        self._memory[place : place + len(values)] = values

    def restore(self) -> np.ndarray:
        """Take in what an earlier pass computed, and return the places of its pieces. Here there are none."""
        return np.zeros(0, np.int64)

    def keep(self) -> None:
        """Bring what was taken in to the disk, for a later pass to restore. Here nothing is."""

    def publish(self, key: str, ingredients: dict[str, str]) -> np.ndarray | None:
        """Move the file to its place; the values where they are in memory instead."""
        if self._memory is None:
            try:
                self._finish(key, ingredients)
            except OSError as error:
                self._to_memory(error)
        return self._memory

    def _finish(self, key: str, ingredients: dict[str, str]) -> None:
        assert self._path is not None and self._temporary is not None
        os.ftruncate(self._descriptor, HEADER + self.total * VALUES.itemsize)
        digest = _values_hash(self._descriptor)
        write_all(self._descriptor, _header(key, self.total, digest, ingredients), 0)
        os.fchmod(self._descriptor, os.fstat(self._descriptor).st_mode & 0o444)
        os.fsync(self._descriptor)
        os.replace(self._temporary, self._path)
        self._temporary = None
        sync_folder(self._path.parent)

    def _to_memory(self, error: OSError) -> None:
        """Go on in memory, with what was written so far."""
        self.failure = error
        self._memory = np.zeros(self.total, VALUES)
        if self._descriptor >= 0:
            size = os.fstat(self._descriptor).st_size - HEADER
            for start in range(0, max(size, 0), _BLOCK):
                block = os.pread(self._descriptor, min(_BLOCK, size - start), HEADER + start)
                self._memory.view(np.uint8)[start : start + len(block)] = np.frombuffer(block, np.uint8)
        self.close()

    def close(self) -> None:
        """Remove the file where it was not moved to its place."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of this entry; only for the exclusive holder of its lock."""
    for left in path.parent.glob(f".{path.stem}.*.tmp"):
        left.unlink(missing_ok=True)


def _values_hash(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), HEADER
    while block := os.pread(descriptor, _BLOCK, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def _header(key: str, total: int, digest: str, ingredients: dict[str, str]) -> bytes:
    fields = {"key": key, "values": total, "sha256": digest, "ingredients": ingredients}
    text = json.dumps(fields, sort_keys=True).encode()
    assert len(text) < HEADER, "the ingredients are hashes and short names"
    return text.ljust(HEADER - 1) + b"\n"


def _verify(descriptor: int, key: str, total: int) -> None:
    """Raise DamagedEntry for what is not the entry `key`, whole; read the file once, a block at a time."""
    size, wanted = os.fstat(descriptor).st_size, HEADER + total * VALUES.itemsize
    if size != wanted:
        raise DamagedEntry(f"it has {size} bytes instead of {wanted}")
    try:
        fields: Any = json.loads(os.pread(descriptor, HEADER, 0))
    except ValueError as error:
        raise DamagedEntry("its header is not readable") from error
    if not isinstance(fields, dict) or (fields.get("key"), fields.get("values")) != (key, total):
        raise DamagedEntry("its header is that of something else")
    if fields.get("sha256") != _values_hash(descriptor):
        raise DamagedEntry("its checksum is wrong")
