"""Writes checkpoints while training goes on: copied, written beside, hashed, moved into place, pruned.

Each rank writes its tensors in a thread, from a copy in the host's memory. When all are on the disk, the
checkpoint gets its name, at the end of a later step, by all ranks together.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from rcpo import distributed
from rcpo.caching import sync_folder
from rcpo.checkpoint import FORMAT, MANIFEST, TENSORS
from rcpo.config import CheckpointConfig, ConfigError, RunConfig, RunError
from rcpo.config.validation import BEST_METRICS
from rcpo.engine import Engine
from rcpo.runfolder import CHECKPOINTS, STATE_FILE, checkpoint_folders
from rcpo.tensorfiles import Written, hash_file, write_tensors
from rcpo.tracking.jsonl import replace_text

log = logging.getLogger(__name__)

LATEST = "latest"
SHARE = 0.05  # of the time between two checkpoints that training may be held up by them


class SaveClock:
    """Says when a checkpoint is due: `seconds` after the last one (0: never), later where that is costly.

    It counts by a clock that nobody sets.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held_up = 0.0
        self.start()

    def start(self) -> None:
        """Counts from now."""
        self._last = time.monotonic()

    def saved(self, held_up: float) -> None:
        """A checkpoint was taken now, and training was held up by it for so many seconds."""
        self._held_up = held_up
        self.start()

    @property
    def due(self) -> bool:
        if not self._seconds:
            return False
        return time.monotonic() - self._last >= max(self._seconds, self._held_up / SHARE)


class BestStep:
    """The step whose evaluation had the best value of `checkpoint.best` so far."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._metric = config.best
        self._sign = -1 if config.best_mode == "min" else 1
        self.step: int | None = None
        self._value = 0.0

    def __str__(self) -> str:
        return f"{self._metric} {self._value:.4g}"

    @property
    def steps(self) -> list[int]:
        """The one step, or none."""
        return [] if self.step is None else [self.step]

    def improved(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether an evaluation is the best so far; raises ConfigError where it has no such metric."""
        if self._metric is None:
            return False
        if self._metric not in values:
            names = ", ".join(name for name in BEST_METRICS if name in values)
            raise ConfigError(
                f"checkpoint.best={self._metric} is not measured in this run; there are: {names}"
            )
        value = float(values[self._metric])
        if math.isnan(value) or (self.step is not None and self._sign * (value - self._value) <= 0):
            return False
        self.step, self._value = step, value
        return True

    def state_dict(self) -> dict[str, Any] | None:
        """Ready for JSON."""
        if self.step is None:
            return None
        return {"metric": self._metric, "sign": self._sign, "step": self.step, "value": self._value}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on, unless another metric or direction is asked for now."""
        if state is not None and (state["metric"], state["sign"]) == (self._metric, self._sign):
            self.step, self._value = state["step"], state["value"]


class _Part(Thread):
    """Writes this rank's tensors; afterwards `written`, or the `problem`."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.path = path
        self.written: Written | None = None
        self.problem: str | None = "its writer failed"
        self._tensors = tensors

    def run(self) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)  # a network's folder may not show here yet
            self.written, self.problem = write_tensors(self.path, self._tensors), None
        except OSError as error:
            self.problem = error.strerror
        finally:
            self._tensors = {}


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    rng: dict[str, Any]
    kept: Collection[int]
    part: _Part


class CheckpointWriter:
    """Writes the checkpoints of a run, of which the last ones stay.

    In the background, or while training waits; then no copy is held in memory.
    """

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        settings = config.checkpoint
        self.run_dir = run_dir
        self.folder = run_dir / CHECKPOINTS
        self.clock = SaveClock(60 * settings.minutes)
        self._keep = settings.keep
        roomy = not config.engine.offload_optimizer
        self._background = roomy if settings.background is None else settings.background
        self._pending: _Pending | None = None

    def place(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def save(self, engine: Engine, state: dict[str, Any], kept: Collection[int] = ()) -> None:
        """Starts to write the checkpoint of `state["step"]`, JSON that is the same on all ranks. Collective.

        The one before is finished first. Checkpoints of the steps `kept` are not pruned. Raises RunError on
        all ranks where any cannot write; earlier checkpoints are then as they were.
        """
        began = time.monotonic()
        self.finish()
        step = state["step"]
        scratch = self._scratch(step)
        self._on_main(lambda: _empty(scratch), step)
        tensors = engine.tensors()
        if self._background:
            tensors = {label: tensor.to("cpu", copy=True) for label, tensor in tensors.items()}
        rank, ranks = distributed.rank(), distributed.world_size()
        part = _Part(scratch / TENSORS / f"{rank:05d}-of-{ranks:05d}.safetensors", tensors)
        part.start()
        state = {**state, "engine": engine.record()}
        self._pending = _Pending(step, state, distributed.rng_state(), kept, part)
        if not self._background:
            self.finish()
        waited = time.monotonic() - began
        log.info("checkpoint of step %d: training waited %.3f s for it", step, waited)
        self.clock.saved(waited)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not finished: the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of a pending checkpoint is on the disk, or failed. Not collective."""
        return self._pending is not None and not self._pending.part.is_alive()

    def finish(self) -> None:
        """Waits for a pending checkpoint and gives it its name. Collective.

        Raises RunError where it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.part.join()
        try:
            self._finish(pending)
        except RunError:
            if distributed.is_main():  # what it took of a full disk is given back
                shutil.rmtree(self._scratch(pending.step), ignore_errors=True)
            raise

    def _finish(self, pending: _Pending) -> None:
        part = pending.part
        entry = None if part.written is None else asdict(part.written)
        ranks = distributed.gather_objects((part.problem, part.path.name, entry, pending.rng))
        self._refuse(pending.step, next((problem for problem, *_ in ranks if problem), None))
        files = {f"{TENSORS}/{name}": entry for _, name, entry, _ in ranks}
        state = {**pending.state, "rng": [rng for *_, rng in ranks]}
        self._on_main(lambda: self._move(pending.step, state, files, pending.kept), pending.step)

    def _move(self, step: int, state: dict[str, Any], files: dict[str, Any], kept: Collection[int]) -> None:
        """Rank 0: from the scratch folder with all tensors to the checkpoint in its place."""
        scratch, place = self._scratch(step), self.place(step)
        for name in files:
            if not (scratch / name).is_file():
                raise FileNotFoundError(0, f"{name} of another process is not there: share the folder", name)
        replace_text(scratch / STATE_FILE, json.dumps(state, allow_nan=False) + "\n")
        files[STATE_FILE] = asdict(hash_file(scratch / STATE_FILE))
        manifest = {"format": FORMAT, "step": step, "files": files}
        replace_text(scratch / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync_folder(scratch / TENSORS)
        sync_folder(scratch)
        old = place.with_name(f".{place.name}.old")
        if place.exists():  # a run that went back takes this step again
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        scratch.rename(place)
        sync_folder(self.folder)
        replace_text(self.folder / LATEST, place.name + "\n")
        shutil.rmtree(old, ignore_errors=True)
        for number, superseded in checkpoint_folders(self.run_dir)[self._keep :]:
            if number not in kept:
                shutil.rmtree(superseded)

    def _scratch(self, step: int) -> Path:
        return self.folder / f".step-{step}.new"

    def _on_main(self, work: Callable[[], None], step: int) -> None:
        """Lets rank 0 work on the file system; raises RunError on all ranks where it failed."""
        problem = None
        if distributed.is_main():
            try:
                work()
            except OSError as error:
                problem = error.strerror
        self._refuse(step, distributed.broadcast_object(problem))

    def _refuse(self, step: int, problem: str | None) -> None:
        if problem is not None:
            raise RunError(
                f"the checkpoint {self.place(step)} could not be written: {problem}; earlier ones are intact"
            )


def _empty(folder: Path) -> None:
    """Makes an empty folder; unfinished ones of earlier, killed runs go."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    (folder / TENSORS).mkdir(parents=True)
