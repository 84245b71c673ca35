"""What a pass that did not come to its end leaves of an entry: parts beside it, where the next one goes on.

A part is a file of pieces, in any order, of any number of ranks: a SHA-256 of the entry's key and all that
follows, the number m of pieces, their places and lengths (m, 2), all int64, and their float32 values,
little-endian. It gets its name only when it is whole and on the disk. Only who holds the entry's lock alone
reads, writes or removes parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rcpo.reference.entry import VALUES, DamagedEntry, Sink
from rcpo.system.files import sync_folder, write_atomically

SUFFIX = ".part"
_COUNTS = np.dtype("<i8")
_DIGEST = hashlib.sha256().digest_size
Piece = tuple[int, np.ndarray]
"""A place in the entry, and the values (m,) from there on."""


class ResumableSink(Sink):
    """A sink whose values outlive a pass that is stopped or killed; `tell` takes lines for the user.

    For a pass that begins with `restore`: of one that does not, nothing is held or kept.
    """

    def __init__(self, path: Path, total: int, key: str, tell: Callable[[str], None]) -> None:
        super().__init__(path, total)
        self._folder = path.parent
        self._key = key
        self._tell = tell
        self._pending: list[Piece] = []  # taken in since the last part
        self._keeps = False

    def write(self, place: int, values: np.ndarray) -> None:
        super().write(place, values)
        if self._keeps:
            self._pending.append((place, values))

    def restore(self) -> np.ndarray:
        self._keeps = True
        places, count = list[int](), 0
        for path in self._parts():
            try:
                pieces = _pieces(path.read_bytes(), self._key)
            except (DamagedEntry, OSError) as error:
                self._tell(f"{path} is not used, {error}")
                if isinstance(error, DamagedEntry):  # what cannot be read now may be whole
                    _remove(path)
                continue
            for place, values in pieces:
                super().write(place, values)
                places.append(place)
                count += len(values)
        if places:
            self._tell(f"{count / self.total:.0%} found, computed by a pass that did not come to its end")
        return np.array(places, np.int64)

    def keep(self) -> None:
        """Write what was taken in since the last call as one part; stop keeping values where that fails."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        path = self._folder / f"{self._key}.{uuid.uuid4().hex}{SUFFIX}"
        try:
            write_atomically(path, _content(pending, self._key))
            sync_folder(self._folder)
        except OSError as error:
            self._keeps = False
            self._tell(f"no longer kept while they are computed: {path.parent}: {error.strerror}")

    def publish(self, key: str, ingredients: dict[str, str]) -> np.ndarray | None:
        memory = super().publish(key, ingredients)
        if memory is None:
            for path in self._parts():
                _remove(path)
        return memory

    def _parts(self) -> list[Path]:
        return list(self._folder.glob(f"{self._key}.*{SUFFIX}"))


def _content(pieces: list[Piece], key: str) -> bytes:
    table = np.array([(place, len(values)) for place, values in pieces], _COUNTS)
    values = np.concatenate([values for _, values in pieces]).astype(VALUES)
    body = np.array(len(pieces), _COUNTS).tobytes() + table.tobytes() + values.tobytes()
    return _digest(body, key) + body


def _pieces(content: bytes, key: str) -> Iterator[Piece]:
    """The pieces of a part; raises DamagedEntry where it is not whole, or not one of the entry `key`."""
    digest, body = content[:_DIGEST], content[_DIGEST:]
    if digest != _digest(body, key):
        raise DamagedEntry("its checksum is wrong")
    (count,) = np.frombuffer(body, _COUNTS, 1).tolist()
    places, lengths = np.frombuffer(body, _COUNTS, 2 * count, _COUNTS.itemsize).reshape(count, 2).T
    values = np.frombuffer(body, VALUES, offset=(1 + 2 * count) * _COUNTS.itemsize)
    return zip(places.tolist(), np.split(values, np.cumsum(lengths)[:-1]), strict=True)


def _digest(body: bytes, key: str) -> bytes:
    return hashlib.sha256(b"part 1 of " + key.encode() + body).digest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another user's: who publishes the entry has its values
        path.unlink()
