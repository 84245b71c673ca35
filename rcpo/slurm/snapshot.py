"""A copy of the code, so that a job that waits for days runs what was submitted."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

from rcpo.config.paths import conf_dir
from rcpo.runs.environment import COPIED_FILE, git_state
from rcpo.system.files import replace_text

PACKAGE = Path(__file__).resolve().parents[1]


def snapshot(folder: Path, modules: set[str], cwd: Path) -> None:
    """Copy rcpo, its conf/ and the user's `modules` that lie in `cwd` into a new or renewed `folder`.

    The commit goes with them, for a copy is in no checkout.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, folder / "rcpo", ignore=ignored)
    if conf_dir().parent != PACKAGE:
        shutil.copytree(conf_dir(), folder / "conf", ignore=ignored)
    replace_text(folder / COPIED_FILE, json.dumps({"git": git_state(PACKAGE / "__init__.py")}) + "\n")
    for name in modules:
        source = _source(name.partition(".")[0], cwd)
        if source is not None and source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=ignored)
        elif source is not None:
            shutil.copy2(source, folder / source.name)


def _source(module: str, cwd: Path) -> Path | None:
    """The file or package folder of a module in `cwd`; None for one that is installed."""
    sys.path += [] if str(cwd) in sys.path else [str(cwd)]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(cwd.resolve()):
        return None
    file = Path(spec.origin)
    return file.parent if file.name == "__init__.py" else file
