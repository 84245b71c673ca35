"""The engine's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcpo.engine import load_cpu_op


@pytest.mark.skipif(torch.cuda.is_available(), reason="the op is for the CPU")
def test_what_a_killed_process_left_of_a_build_stops_nobody() -> None:
    load_cpu_op()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    load_cpu_op()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder), "the folder nests"
    (guard,) = (entry for entry in folder.iterdir() if entry.is_dir())
    (guard / "lock").touch()  # torch waits for ever while it is there
    program = "from rcpo.engine import load_cpu_op; load_cpu_op()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert not (guard / "lock").exists()
