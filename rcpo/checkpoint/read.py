"""Checkpoints of a run as they lie on the disk: found, verified, loaded.

`checkpoints/step-N/` holds the ranks' tensors (`tensors/`), the run's own state as JSON (`state.json`) and
the size and SHA-256 of each file (`manifest.json`). A folder of that name is whole: it was synced to disk
under another name first. `latest` names the newest one, for people; resuming looks at the folders themselves.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rcpo.checkpoint.tensors import PieceFiles, Written, hash_file
from rcpo.engine.pieces import WEIGHT
from rcpo.engine.zero import Engine
from rcpo.errors import ConfigError
from rcpo.runs.folder import CHECKPOINTS, DAMAGED, STATE_FILE, checkpoint_folders
from rcpo.system import distributed

MANIFEST, TENSORS = "manifest.json", "tensors"
EXTRA = "extra"  # the key of tensors that belong to no parameter
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the step after which it was taken, the run's state."""

    folder: Path
    step: int
    state: dict[str, Any]

    def load(self, engine: Engine) -> None:
        """Restore a new engine and this rank's random state. Collective."""
        engine.restore(checkpoint_tensors(self.folder), self.state["engine"])
        states = self.state["rng"]
        distributed.set_rng_state(states[distributed.rank() % len(states)])

    @property
    def tensors(self) -> PieceFiles:
        """What all ranks wrote."""
        return checkpoint_tensors(self.folder)

    def extra(self, name: str) -> Tensor | None:
        """A tensor (elements,) that was saved beside the engine's; None where there is none of that name."""
        return checkpoint_tensors(self.folder).whole(name, EXTRA)


def checkpoint_tensors(folder: Path) -> PieceFiles:
    """What all ranks wrote; raises ConfigError for a foreign file."""
    return PieceFiles(sorted((folder / TENSORS).iterdir()))


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights in fp32 by their names in the policy, whole, from `checkpoints/step-N/`.

    Raises ConfigError for a damaged checkpoint.
    """
    problem = first_problem(folder)
    if problem is not None:
        raise ConfigError(f"{folder} is damaged: {problem}; take another checkpoint")
    tensors = checkpoint_tensors(folder)
    shapes = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["engine"]["shapes"]
    found = {name: tensors.values(name, WEIGHT, 0, math.prod(shape)) for name, shape in shapes.items()}
    return {name: flat.view(shapes[name]) for name, flat in found.items() if flat is not None}


def any_checkpoint(run_dir: Path) -> bool:
    """Whether a run's folder has checkpoints. Collective."""
    return bool(distributed.broadcast_object(checkpoint_folders(run_dir)))


def newest(run_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what was written, or None where the folder has none. Collective.

    Newer damaged ones are said and set aside as `step-N.damaged`. Raises ConfigError where none is good.
    """
    damaged: list[Path] = []
    found = distributed.broadcast_object(checkpoint_folders(run_dir))
    for step, folder in found:
        problem = verify(folder)
        if problem is None:
            _set_aside(damaged)
            return Checkpoint(folder, step, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        say(f"{folder} is damaged and left out: {problem}")
        damaged.append(folder)
    if found:
        raise ConfigError(
            f"resume: no checkpoint in {run_dir / CHECKPOINTS} is whole; to start afresh, remove that folder"
        )
    return None


def _set_aside(folders: list[Path]) -> None:
    if distributed.is_main():
        for folder in folders:
            aside = folder.with_name(f"{folder.name}{DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; each rank hashes a share of its files. Collective."""
    shares = distributed.gather_objects(first_problem(folder, distributed.rank(), distributed.world_size()))
    return next((problem for problem in shares if problem), None)


def first_problem(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """The first difference between the manifest and every `ranks`-th of the files it lists, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format {manifest['format']} is not the one of this version, {FORMAT}"
        listed = {name: Written(**entry) for name, entry in sorted(manifest["files"].items())}
        if STATE_FILE not in listed:
            return f"{MANIFEST} does not list {STATE_FILE}"
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name in list(listed)[rank::ranks]:
        try:
            size = (folder / name).stat().st_size
            if size != listed[name].size:
                return f"{name} has {size} bytes instead of {listed[name].size}"
            if hash_file(folder / name) != listed[name]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
