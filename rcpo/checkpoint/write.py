"""Writes checkpoints while training goes on: copied, written beside, hashed, moved into place, pruned.

Each rank writes its tensors in a thread, from a copy in the host's memory, and a record of them beside. When
all are on the disk, the checkpoint gets its name, at the end of a later step, by all ranks together; after a
failure, when the ranks cannot meet any more, by rank 0, which sees from the records that all is there.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from torch import Tensor

from rcpo.checkpoint.read import EXTRA, FORMAT, MANIFEST, TENSORS
from rcpo.checkpoint.tensors import hash_file, write_tensors
from rcpo.config.schema import RunConfig
from rcpo.engine.pieces import Piece
from rcpo.engine.zero import Engine
from rcpo.errors import RunError
from rcpo.runs.folder import (
    CHECKPOINTS,
    DAMAGED,
    STATE_FILE,
    checkpoint_folder,
    checkpoint_folders,
    damaged_folders,
)
from rcpo.system import distributed
from rcpo.system.files import replace_text, sync_folder

log = logging.getLogger(__name__)

LATEST = "latest"
# that a failed run waits for other ranks' parts while none grows: less than the 30 that the elastic agent of
# PyTorch leaves the others once a rank is lost
RESCUE_SECONDS = 20.0
_RECORDS = "records"  # in an unfinished checkpoint: what each rank wrote
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
        """Count from now."""
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


class _Part(Thread):
    """Writes this rank's tensors and then a record of them; afterwards `problem` is None, or why not."""

    def __init__(self, scratch: Path, name: str, tensors: Mapping[str, Tensor], rng: dict[str, Any]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.problem: str | None = "its writer failed"
        self._scratch, self._name, self._tensors, self._rng = scratch, name, tensors, rng

    def run(self) -> None:
        try:
            for folder in (TENSORS, _RECORDS):  # a network's folder may not show here yet
                (self._scratch / folder).mkdir(exist_ok=True)
            written = write_tensors(self._scratch / TENSORS / self._name, self._tensors)
            record = {"file": self._name, "written": asdict(written), "rng": self._rng}
            replace_text(_record(self._scratch, self._name), json.dumps(record))
            self.problem = None
        except OSError as error:
            self.problem = error.strerror
        finally:
            self._tensors = {}


def _part_name(rank: int, ranks: int) -> str:
    return f"{rank:05d}-of-{ranks:05d}.safetensors"


def _record(scratch: Path, name: str) -> Path:
    return scratch / _RECORDS / f"{name}.json"


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    kept: Collection[int]
    part: _Part


_writers: weakref.WeakSet[CheckpointWriter] = weakref.WeakSet()


def rescue_all() -> None:
    """Finish the checkpoints that this process is writing, before it ends for want of the other ranks."""
    for writer in list(_writers):
        writer.rescue()


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
        self._background = config.saves_in_background
        self._pending: _Pending | None = None
        self._moving = Lock()  # the heartbeat's thread may end the run
        _writers.add(self)

    def save(
        self,
        engine: Engine,
        state: dict[str, Any],
        kept: Collection[int] = (),
        extra: Mapping[str, Tensor] | None = None,
        shares: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start to write the checkpoint of `state["step"]`, JSON that is the same on all ranks. Collective.

        The one before is finished first. Checkpoints of the steps `kept` are not pruned. `extra` are more
        tensors of one axis, the same on all ranks, `shares` this rank's parts of others by their labels.
        Raises RunError on all ranks where any cannot write; earlier checkpoints are then as they were.
        """
        began = time.monotonic()
        self.finish()
        step = state["step"]
        scratch = self._scratch(step)
        self._on_main(lambda: _empty(scratch), step)
        tensors = engine.tensors() | _shares(extra or {}) | dict(shares or {})
        if self._background:
            tensors = {label: tensor.to("cpu", copy=True) for label, tensor in tensors.items()}
        name = _part_name(distributed.rank(), distributed.world_size())
        part = _Part(scratch, name, tensors, distributed.rng_state())
        part.start()
        whole = deepcopy({**state, "engine": engine.record()})  # written when later steps have moved it
        self._pending = _Pending(step, whole, kept, part)
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
        """Wait for a pending checkpoint and give it its name. Collective.

        Raises RunError where it could not be written.
        """
        pending = self._pending
        if pending is None:
            return
        pending.part.join()
        try:
            problems = distributed.gather_objects(pending.part.problem)
            self._refuse(pending.step, next((problem for problem in problems if problem), None))
            self._on_main(lambda: self._move(pending), pending.step)
        except RunError:
            if distributed.is_main():  # what it took of a full disk is given back
                shutil.rmtree(self._scratch(pending.step), ignore_errors=True)
            self._pending = None
            raise
        self._pending = None

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish the checkpoint that is being written, whatever ends the block."""
        try:
            yield
            self.finish()
        except BaseException:
            self.rescue()
            raise

    def rescue(self) -> None:
        """Finish a pending checkpoint after a failure, which other ranks may not have had. Not collective."""
        pending = self._pending
        if pending is None:
            return
        pending.part.join()
        if not distributed.is_main():
            return
        try:
            self._wait_for_all(pending)
            self._move(pending)
            log.info("the checkpoint of step %d was finished after the failure", pending.step)
        except OSError as error:
            log.warning("the checkpoint of step %d could not be finished: %s", pending.step, error)

    def _wait_for_all(self, pending: _Pending) -> None:
        if pending.part.problem is not None:
            raise OSError(pending.part.problem)
        scratch, size, since = self._scratch(pending.step), -1, 0.0
        while any(not path.is_file() for path in self._records(pending.step)):
            if (now := sum(file.stat().st_size for file in (scratch / TENSORS).iterdir())) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > RESCUE_SECONDS:
                raise OSError("a rank's part is missing")
            time.sleep(0.1)

    def _records(self, step: int) -> list[Path]:
        ranks = distributed.world_size()
        return [_record(self._scratch(step), _part_name(rank, ranks)) for rank in range(ranks)]

    def _move(self, pending: _Pending) -> None:
        """Rank 0: from the scratch folder with all parts to the checkpoint in its place."""
        with self._moving:
            if self._pending is pending:
                self._place(pending)
                self._pending = None

    def _place(self, pending: _Pending) -> None:
        step = pending.step
        scratch, place = self._scratch(step), checkpoint_folder(self.run_dir, step)
        records = [_read_record(path) for path in self._records(step)]
        files = {f"{TENSORS}/{record['file']}": record["written"] for record in records}
        state = {**pending.state, "rng": [record["rng"] for record in records]}
        shutil.rmtree(scratch / _RECORDS)
        replace_text(scratch / STATE_FILE, json.dumps(state, allow_nan=False) + "\n")
        files[STATE_FILE] = asdict(hash_file(scratch / STATE_FILE))
        manifest = {"format": FORMAT, "step": step, "files": files}
        replace_text(scratch / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync_folder(scratch / TENSORS)
        sync_folder(scratch)
        old = _aside(place)
        if place.exists():  # a run that went back takes this step again
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        scratch.rename(place)
        sync_folder(self.folder)
        replace_text(self.folder / LATEST, place.name + "\n")
        shutil.rmtree(old, ignore_errors=True)
        self._prune(pending.kept)

    def _prune(self, kept: Collection[int]) -> None:
        """Remove all but the last `keep` checkpoints; damaged ones take the places that whole ones leave."""
        whole = checkpoint_folders(self.run_dir)
        left = max(0, self._keep - len(whole))
        for number, superseded in [*whole[self._keep :], *damaged_folders(self.run_dir)[left:]]:
            if number not in kept or superseded.name.endswith(DAMAGED):
                _remove(superseded)

    def _scratch(self, step: int) -> Path:
        return self.folder / f".step-{step}.new"

    def _on_main(self, work: Callable[[], None], step: int) -> None:
        """Let rank 0 work on the file system; raise RunError on all ranks where it failed."""
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
                f"the checkpoint {checkpoint_folder(self.run_dir, step)} could not be written: {problem}; "
                "earlier ones are intact"
            )


def _shares(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of tensors that all ranks hold, by their labels."""
    rank, ranks = distributed.rank(), distributed.world_size()
    pieces = [Piece(name, 0, tensor.numel(), tensor).share(rank, ranks) for name, tensor in tensors.items()]
    return {piece.label(EXTRA): piece.of(piece.holder) for piece in pieces if piece.size}


def _aside(checkpoint: Path) -> Path:
    """The name of a checkpoint that is replaced or removed, under which nobody takes it for whole."""
    return checkpoint.with_name(f".{checkpoint.name}.old")


def _remove(checkpoint: Path) -> None:
    """Take away its name first: a folder that has one is whole, also where this process is killed."""
    old = _aside(checkpoint)
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old)


def _empty(folder: Path) -> None:
    """Make an empty folder; unfinished ones of earlier, killed runs go."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    (folder / TENSORS).mkdir(parents=True)


def _read_record(path: Path) -> dict[str, Any]:
    """What a rank wrote; raises OSError where it, or the record, does not show here."""
    name = path.name.removesuffix(".json")
    if not path.is_file() or not (path.parents[1] / TENSORS / name).is_file():
        raise FileNotFoundError(0, f"{name} of another process is not there: share the folder", name)
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
