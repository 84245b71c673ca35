"""TRL in several versions, each in a folder of its own before this environment's packages."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

ROOT = Path(__file__).resolve().parents[2]
# DPO of TRL before 0.29 cannot be imported beside transformers 5, which needs other versions of these
OLD = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "datasets==4.8.4")
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.24.0": OLD,
    "0.28.0": OLD,
    "0.29.1": (),
    "1.0.0": (),
    "1.8.0": (),
    "1.12.0": (),
    "1.14.2": (),
}
ALWAYS = ("0.24.0",)  # with the newest, which is this environment's own; the others with RCPO_TRL=all
WORKER = ROOT / "tests" / "workers" / "trl_versions.py"


def packages(version: str) -> Path:
    """A folder with this version of TRL and what it needs in place of newer packages; made once.

    It lies in the virtual environment, which git ignores.
    """
    folder = Path(sys.prefix) / "trl" / version
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f".{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        unfinished = folder.with_name(f"{version}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        words = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--disable-pip-version-check",
        ]
        command = [sys.executable, *words, "--target", str(unfinished), f"trl=={version}", *VERSIONS[version]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        if done.returncode and "Failed to establish a new connection" in done.stderr + done.stdout:
            pytest.skip(f"TRL {version}: pip reaches no package index")
        assert done.returncode == 0, done.stderr
        unfinished.rename(folder)
    return folder


def logs(version: str | None, folder: Path) -> dict[str, Any]:
    """The version and the logs of `workers/trl_versions.py`; None: with this environment's TRL."""
    first = [] if version is None else [packages(version)]
    paths = [*first, ROOT / "tests" / "integrations", ROOT / "tests", ROOT]
    alone = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}  # of an earlier test
    environment = {**alone, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONWARNINGS": "ignore"}
    output = folder / f"{version}.json"
    command = [sys.executable, str(WORKER), str(folder), str(output)]
    if version is None:
        done = forked.run(command, imports=["trl.trainer.dpo_trainer"], timeout=280, env=environment)
    else:  # other versions of what was imported
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found
