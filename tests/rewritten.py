"""What pytest makes of the tests' assertions, made once, before its workers are forked.

It takes four seconds, which each worker would spend in a clone whose tests have no bytecode yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

from _pytest.assertion import rewrite

PLAIN = rewrite._rewrite_test


def keep(files: Iterable[Path]) -> None:
    """From here on, pytest rewrites none of these files that have no bytecode."""
    kept: dict[Path, tuple[bytes, CodeType]] = {}

    def rewrite_test(file: Path, config: Any) -> tuple[bytes, CodeType]:
        return kept.get(file) or PLAIN(file, config)

    for file in files:
        bytecode = rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(file, bytecode) is None:
            kept[file] = PLAIN(file, None)  # type: ignore[arg-type]
    rewrite._rewrite_test = rewrite_test


if __name__ == "<run_path>":  # in the process that forks the workers: see forked.py
    keep(Path(__file__).resolve().parent.rglob("test_*.py"))
