"""The engine's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny import tiny_llama

PROGRAM = """
import sys
from pathlib import Path
from rcpo import distributed
from rcpo.config import RunConfig
from rcpo.engine import Engine
from rcpo.models import Policy, load_model

distributed.initialize()
Engine(Policy(load_model(Path(sys.argv[1]), RunConfig())), RunConfig(), total_steps=1)
"""


def test_starting_compiles_nothing(tmp_path: Path) -> None:
    model, extensions = tiny_llama(tmp_path / "model"), tmp_path / "extensions"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    command = [sys.executable, "-c", PROGRAM, model]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    assert not extensions.exists() or not any(extensions.iterdir())
