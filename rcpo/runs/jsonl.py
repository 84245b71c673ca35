"""Rows of named scalars as JSON lines: one object a line, never NaN or Infinity."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from rcpo.system.files import replace_text

Scalar = float | int | bool | None


def clean_row(row: Mapping[str, Any]) -> dict[str, Scalar]:
    """The row as plain Python scalars that JSON can hold.

    NaN and the infinities become None and are counted under `nonfinite`, a key that exists only when the
    count is positive. NumPy scalars are accepted. Raises TypeError, naming the key, for a value that is not
    a number.
    """
    cleaned = {key: _scalar(key, value) for key, value in row.items()}
    lost = [key for key, value in cleaned.items() if isinstance(value, float) and not math.isfinite(value)]
    for key in lost:
        cleaned[key] = None
    if lost:
        cleaned["nonfinite"] = len(lost)
    return cleaned


def _scalar(key: str, value: Any) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__module__ == "numpy" and type(value).__name__ == "bool":
        return bool(value)
    raise TypeError(f"metric {key!r} is a {type(value).__name__}; a float, int, bool or None is expected")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a flat record of scalars as one JSON object (evaluation.json), by the rules of `clean_row`."""
    replace_text(path, json.dumps(clean_row(values), indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, already free of NaN, as JSON lines."""
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records))


def truncate_after(path: Path, step: int) -> int:
    """Cut the rows of steps after `step`, which a run resumed from that step is going to take again.

    An unfinished last line, left by a killed process, goes too. Returns the number of lines removed; a
    missing file has none. Raises ValueError where a finished line is not a JSON object with a `step`.
    """
    if not path.exists():
        return 0
    with path.open(encoding="utf-8") as file:  # cuts at line ends alone, not at U+2028 inside a string
        lines = list(file)
    kept = [
        line
        for number, line in enumerate(lines, 1)
        if line.endswith("\n") and _step_of(path, number, line) <= step
    ]
    if len(kept) < len(lines):
        replace_text(path, "".join(kept))
    return len(lines) - len(kept)


def _step_of(path: Path, number: int, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number} is not a metrics row with a step; repair or delete it"
        ) from error


class JsonLines:
    """An append-only file of rows, flushed one by one so that a killed run keeps all it logged."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, row: Mapping[str, Scalar]) -> None:
        """Append one row that `clean_row` made; raises OSError, naming the file, where the disk is full."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._named():
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        with self._named():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raise OSError too where a row that failed before fails again."""
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An OSError names the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
