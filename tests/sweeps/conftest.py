"""An empty folder whose runs take no time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from imitation import Runs

from rcpo.launch.pool import Pool


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runs]:
    """Every run of this test is of no time, in an empty folder; log handlers are then as before."""
    found = Runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pool, "_wait", lambda pool, run_dir, slot, given_up: found.process(run_dir, given_up))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield found
    root.handlers[:], root.level = handlers, level
