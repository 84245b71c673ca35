"""The fault campaign's short form: `scripts/soak` with few kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "scripts" / "soak"


@pytest.mark.slow
@pytest.mark.serial
def test_kills_at_random_moments_lose_nothing() -> None:
    command = [sys.executable, str(SOAK), "--kills", "6", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "moments killed                        6" in result.stdout
