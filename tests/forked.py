"""`rcpo` commands as processes of their own, forked from one that has done their imports: seconds of each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# what most commands import sooner or later; none of it starts a thread or asks where it runs
IMPORTED = [
    *(
        "rcpo.cli",
        "rcpo.commands.train",
        "rcpo.commands.sweep",
        "rcpo.launch.run",
        "rcpo.training.trainer",
        "rcpo.commands.data",
        "rcpo.commands.report",
    ),
    *("rcpo.evaluation.run", "rcpo.evaluation.heldout", "rcpo.evaluation.probes", "rcpo.commands.plan"),
    *("transformers.models.llama.modeling_llama", "datasets", "peft"),
]
_context = multiprocessing.get_context("forkserver")


def rcpo(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float = 250
) -> subprocess.CompletedProcess[str]:
    """What `rcpo WORDS` says in a folder, and its exit code; its PYTHONPATH is importable."""
    _context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = _context.Process(target=_run, args=(list(words), cwd, dict(environment), said))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout, *(path.read_bytes() for path in said))
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            list(words), process.exitcode, *(path.read_text(encoding="utf-8") for path in said)
        )


def _run(words: list[str], cwd: Path, environment: dict[str, str], said: list[Path]) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.argv = ["rcpo", *words]
    from rcpo.cli import main

    main()
