"""Checkpoints of a run: written beside, hashed, moved into place; found again, verified, pruned.

`checkpoints/step-N/` holds DeepSpeed's shards (`engine/`), the run's own state as JSON (`state.json`) and the
size and SHA-256 of each file (`manifest.json`). A folder of that name is whole: it was synced to disk under
another name first. `latest` names the newest one, for people; resuming looks at the folders themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcpo import distributed
from rcpo.config import ConfigError, RunError
from rcpo.engine import Engine, Written
from rcpo.runfolder import CHECKPOINTS, STATE_FILE, checkpoint_folders
from rcpo.tracking.jsonl import replace_text

LATEST, MANIFEST, SHARDS = "latest", "manifest.json", "engine"
FORMAT = 1
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the step after which it was taken, the run's state."""

    folder: Path
    step: int
    state: dict[str, Any]

    def load(self, engine: Engine) -> None:
        """Restores the engine and this rank's random state. Collective."""
        engine.load_checkpoint(str(self.folder), SHARDS)
        distributed.set_rng_state(self.state["rng"][distributed.rank()])


class Checkpoints:
    """The checkpoints in a run's folder, of which the last `keep` stay. Its methods are collective."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / CHECKPOINTS
        self.keep = keep

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> Path:
        """Writes the checkpoint of a step and prunes; `state` is JSON and the same on all ranks.

        Raises RunError on all ranks where any cannot write; earlier checkpoints are then as they were.
        """
        try:
            return self._save(engine, step, state)
        except RunError:
            if distributed.is_main():  # what it took of a full disk is given back
                shutil.rmtree(self.folder / f".step-{step}.new", ignore_errors=True)
            raise

    def _save(self, engine: Engine, step: int, state: dict[str, Any]) -> Path:
        place, scratch = self.folder / f"step-{step}", self.folder / f".step-{step}.new"
        self._on_main(lambda: _empty(scratch), place)
        problem, files = None, {}
        try:
            written = engine.save_checkpoint(str(scratch), SHARDS)
            files = {str(Path(path).relative_to(scratch)): asdict(size) for path, size in written.items()}
        except OSError as error:
            problem = error.strerror
        ranks = distributed.gather_objects((problem, files, distributed.rng_state()))
        _refuse(place, next((problem for problem, _, _ in ranks if problem), None))
        everything = {name: entry for _, files, _ in ranks for name, entry in files.items()}
        state = {**state, "rng": [rng for _, _, rng in ranks]}
        self._on_main(lambda: self._finish(scratch, place, state, everything), place)
        return place

    def _finish(self, scratch: Path, place: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
        for name in files:
            if not (scratch / name).is_file():
                raise FileNotFoundError(0, f"{name} of another process is not there: share the folder", name)
        replace_text(scratch / STATE_FILE, json.dumps(state, allow_nan=False) + "\n")
        files[STATE_FILE] = asdict(_hash(scratch / STATE_FILE))
        manifest = {"format": FORMAT, "step": state["step"], "files": files}
        replace_text(scratch / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _sync(scratch / SHARDS)
        _sync(scratch)
        old = place.with_name(f".{place.name}.old")
        if place.exists():  # a run that went back takes this step again
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        scratch.rename(place)
        _sync(self.folder)
        replace_text(self.folder / LATEST, place.name + "\n")
        shutil.rmtree(old, ignore_errors=True)
        for _, superseded in checkpoint_folders(self.run_dir)[self.keep :]:
            shutil.rmtree(superseded)

    def _on_main(self, work: Callable[[], None], place: Path) -> None:
        """Lets rank 0 work on the file system; raises RunError on all ranks where it failed."""
        problem = None
        if distributed.is_main():
            try:
                work()
            except OSError as error:
                problem = error.strerror
        _refuse(place, distributed.broadcast_object(problem))

    def exist(self) -> bool:
        """Whether there is any. Collective."""
        return bool(distributed.broadcast_object(checkpoint_folders(self.run_dir)))

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files are what was written, or None where the folder has none.

        Newer damaged ones are said and set aside as `step-N.damaged`. Raises ConfigError where none is good.
        """
        damaged: list[Path] = []
        found = distributed.broadcast_object(checkpoint_folders(self.run_dir))
        for step, folder in found:
            problem = self._verify(folder)
            if problem is None:
                self._set_aside(damaged)
                return Checkpoint(folder, step, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
            say(f"{folder} is damaged and left out: {problem}")
            damaged.append(folder)
        if found:
            raise ConfigError(
                f"resume: no checkpoint in {self.folder} is whole; to start afresh, remove that folder"
            )
        return None

    def _set_aside(self, folders: list[Path]) -> None:
        if distributed.is_main():
            for folder in folders:
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

    def _verify(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, each rank hashing its share of the files; None if nothing."""
        shares = distributed.gather_objects(
            first_problem(folder, distributed.rank(), distributed.world_size())
        )
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
            if _hash(folder / name) != listed[name]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _refuse(place: Path, problem: str | None) -> None:
    if problem is not None:
        raise RunError(f"the checkpoint {place} could not be written: {problem}; earlier ones are intact")


def _empty(folder: Path) -> None:
    """Makes an empty folder; unfinished ones of earlier, killed runs go."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)


def _hash(path: Path) -> Written:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def _sync(folder: Path) -> None:
    """Makes the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
