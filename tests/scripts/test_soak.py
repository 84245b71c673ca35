"""The fault campaign's short form."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import pytest

SOAK = Path(__file__).resolve().parents[2] / "scripts" / "endurance/main.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_fault_loses_anything() -> None:
    command = [sys.executable, str(SOAK), "--kills", "4", "--faults", "--steps", "12", "--seed", "3"]
    result = forked.run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    table = {line[:48].strip(): line[48:] for line in result.stdout.splitlines()}
    assert table["moments killed"] == "4" and table["checkpoints lost"] == "0"
