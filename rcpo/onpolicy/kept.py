"""Rows that were made at some cost, under keys, each written as it is made: a killed process loses none.

Each rank appends to a file of its own, so that ranks never share one; all files of the folder are read, so
that a restart may have other ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rcpo.runs.jsonl import JsonLines
from rcpo.system import distributed

Row = dict[str, Any]


class Kept:
    """The rows of a folder by `key`; a context manager while this rank adds some."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"rank-{distributed.rank()}.jsonl"
        self._file: JsonLines | None = None

    def read(self) -> dict[str, Row]:
        """All whole rows of all ranks, by key."""
        files = sorted(self._folder.glob("rank-*.jsonl"))
        return {str(row["key"]): row for path in files for row in whole_rows(path)}

    def __enter__(self) -> Kept:
        self._folder.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self._own)
        self._file = JsonLines(self._own)
        return self

    def write(self, row: Row) -> None:
        assert self._file is not None, "entered before it is written to"
        self._file.write(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()


def whole_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON-lines file, its last line only where it was finished."""
    for line in path.read_bytes().split(b"\n")[:-1]:  # bytes: what is unfinished may end within a character
        yield json.loads(line)


def drop_torn_line(path: Path) -> None:
    """Cut what follows the last line's end: a row that a killed process left unfinished."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
