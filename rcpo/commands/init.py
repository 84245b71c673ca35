"""`rcpo init`: a folder for a project of one's own, whose commands work before anything in it is changed."""

from __future__ import annotations

import shlex
import shutil
from importlib import resources
from pathlib import Path

from rcpo.errors import ConfigError

# the next commands, inside the folder, and what each is for
COMMANDS = (
    ("rcpo data --config-dir conf experiment=mine", "see the pairs as the model will"),
    ("rcpo plan --config-dir conf experiment=mine", "estimate memory and time"),
    ("rcpo train --config-dir conf experiment=mine rc=loop hydra.run.dir=outputs/first", "train"),
    ("rcpo evaluate run=outputs/first", "evaluate the trained model"),
    ("rcpo report outputs/first", "draw what happened: outputs/first/report.html"),
    ("rcpo submit train --config-dir conf experiment=mine slurm=mine --dry-run", "show the script for SLURM"),
)
_FILES = "project"  # in the package's assets


def init(folder: Path) -> int:
    """Make a project in a new or empty folder and print the next commands; returns the exit code.

    Raises ConfigError for a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"init {folder}: it is not an empty folder; give the name of a new one")
    with resources.as_file(resources.files("rcpo") / "assets" / _FILES) as source:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text(_readme(folder.resolve().name), encoding="utf-8")
    (folder / ".gitignore").write_text("outputs/\n", encoding="utf-8")
    print(f"rcpo: made a project in {folder}: conf/, data/pairs.jsonl, README.md. Next:\n")
    print(f"  cd {shlex.quote(str(folder))}")
    print("\n".join(f"  {line}" for line in _lines()))
    return 0


def _lines() -> list[str]:
    wide = max(len(command) for command, _ in COMMANDS)
    return [f"{command:<{wide}}  # {purpose}" for command, purpose in COMMANDS]


def _readme(name: str) -> str:
    block = "\n".join(_lines())
    return f"""# {name}

Preference optimization with rcpo. The commands run as they are, on the packaged model and twelve pairs:

```bash
{block}
```

1. Put your pairs into `data/pairs.jsonl`, or name a file, a folder, or a set of the hub as `data.path`.
2. Name your model in `conf/experiment/mine.yaml`, and the GPUs and partition of your cluster in
   `conf/slurm/mine.yaml`; `rcpo submit train` without `--dry-run` submits the job.
3. `rcpo train help=optim` explains the keys of a group, `rcpo list objectives` names the objectives.
"""
