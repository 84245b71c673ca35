"""An empty folder whose runs take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
from imitation import Runs

from rcpo.launch.pool import Pool


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """Every run of this test is of no time, in an empty folder."""
    found = Runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pool, "_wait", lambda pool, run_dir, slot, given_up: found.process(run_dir, given_up))
    return found
