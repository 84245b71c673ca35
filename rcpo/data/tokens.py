"""A source's tokens as files: written a piece at a time, checked, and mapped, so that ranks share one copy.

A folder holds `tokens` (int32), `offsets`, `numbers`, `contexts` (int64), `prompts` (uint64) and `values`
(float64), little-endian, and `meta.json`, which says what they are and holds their checksums; its own is its
last line.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from rcpo.data.encode import Encoded
from rcpo.data.records import VALUES
from rcpo.data.store import TokenStore

META = "meta.json"
ARRAYS = {
    "tokens": "<i4", "offsets": "<i8", "numbers": "<i8", "prompts": "<u8", "values": "<f8", "contexts": "<i8"
}  # fmt: skip
_BLOCK = 1 << 20


class Damaged(Exception):
    """Files that are not what they should be; the message says how it was found out."""


@dataclass
class Meta:
    """What the files hold: `rows` usable ones of each part in order, `form` how they were
    read, `bad` reasons with their first place and count in the order in which they occurred, `counts` as in
    `Tally`, `arrays` with size and checksum.
    """

    key: str
    ingredients: dict[str, str]
    labels: list[str]
    rows: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    form: str = ""
    bad: dict[str, tuple[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, tuple[int, str]] = field(default_factory=dict)


class TokenWriter:
    """Writes arrays into a new folder, or keeps them in memory where `folder` is None."""

    def __init__(self, folder: Path | None, meta: Meta) -> None:
        self.meta = meta
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {
            name: io.BytesIO() if folder is None else (folder / name).open("wb") for name in ARRAYS
        }
        self._hashes = {name: hashlib.sha256() for name in ARRAYS}
        self._end = 0
        self._counts: Counter[str] = Counter()
        self._write("offsets", np.zeros(1, np.int64))

    def begin_part(self) -> None:
        """The pieces that follow are of the next part."""
        self.meta.rows.append(0)

    def add(self, encoded: Encoded, place: str) -> None:
        """Take a piece of the current part in; `place` names the part to the user."""
        self._write("contexts", self._end + encoded.contexts.ravel())
        ends = self._end + np.cumsum(encoded.lengths.ravel(), dtype=np.int64)
        if len(ends):
            self._end = int(ends[-1])
        for name, values in (
            ("tokens", encoded.tokens),
            ("offsets", ends),
            ("numbers", encoded.numbers),
            ("prompts", encoded.prompts),
            ("values", encoded.values.ravel()),
        ):
            self._write(name, values)
        self.meta.rows[-1] += len(encoded.numbers)
        self.meta.kinds = sorted({*self.meta.kinds, *encoded.kinds})
        for number, reason in encoded.tally.bad:
            first, count = self.meta.bad.get(reason, (f"{place}:{number}", 0))
            self.meta.bad[reason] = first, count + 1
        self._counts.update(encoded.tally.counts)
        self.meta.counts = dict(self._counts)

    def finish(self) -> TokenStore:
        """Close the files, meta.json last; the store of what was written."""
        self.meta.arrays = {
            name: (file.tell(), self._hashes[name].hexdigest()) for name, file in self._files.items()
        }
        if self._folder is None:
            arrays = {
                name: np.frombuffer(file.getvalue(), ARRAYS[name])  # type: ignore[attr-defined]
                for name, file in self._files.items()
            }
            return _store(self.meta, arrays)
        self.close()
        text = json.dumps(asdict(self.meta), ensure_ascii=True, indent=1)
        (self._folder / META).write_text(f"{text}\n{_text_hash(text)}", encoding="ascii")
        return open_tokens(self._folder, self.meta.key, verify=False)[0]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, ARRAYS[name]).tobytes()
        self._files[name].write(content)
        self._hashes[name].update(content)


def open_tokens(folder: Path, key: str, *, verify: bool) -> tuple[TokenStore, Meta]:
    """The store in a folder, mapped; with `verify` all of it is read once and its checksums compared.

    Raises FileNotFoundError where there is none, Damaged where it is not whole or not this one.
    """
    text, _, checksum = (folder / META).read_text(encoding="latin-1").rpartition("\n")
    if checksum != _text_hash(text):
        raise Damaged("the checksum of its meta.json is wrong")
    meta = Meta(**json.loads(text))
    if meta.key != key or set(meta.arrays) != set(ARRAYS):
        raise Damaged("its meta.json is that of something else")
    arrays = {name: _mapped(folder / name, name, meta.arrays[name], verify=verify) for name in ARRAYS}
    return _store(meta, arrays), meta


def _mapped(path: Path, name: str, known: Sequence[Any], *, verify: bool) -> np.ndarray:
    size, checksum = known
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    if found != size:
        raise Damaged(f"{name} has {found} bytes instead of {size}")
    if verify and _hash(path) != checksum:
        raise Damaged(f"the checksum of {name} is wrong")
    return np.memmap(path, ARRAYS[name], "r") if size else np.zeros(0, ARRAYS[name])


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("latin-1")).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _store(meta: Meta, arrays: dict[str, np.ndarray]) -> TokenStore:
    ids = _Numbered(meta.labels, meta.rows, arrays["numbers"])
    sized = (name for name in ARRAYS if name != "contexts" or meta.arrays[name][0])
    fixed = [meta.labels, meta.rows, *(meta.arrays[name][1] for name in sized)]
    digest = hashlib.sha256(repr(fixed).encode()).hexdigest()
    values = arrays["values"].reshape(-1, len(VALUES))
    contexts = arrays["contexts"].reshape(-1, 2)
    return TokenStore(arrays["tokens"], arrays["offsets"], arrays["prompts"], ids, values, contexts, digest)


class _Numbered(Sequence[str]):
    """Ids `label:number` of rows that lie part after part."""

    def __init__(self, labels: Sequence[str], rows: Sequence[int], numbers: np.ndarray) -> None:
        self._labels = labels
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        label = self._labels[int(np.searchsorted(self._ends, row, "right"))]
        return f"{label}:{int(self._numbers[row])}"

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))
