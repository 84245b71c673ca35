"""Finds the log-probs of a reference in the cache, or has them computed once, whoever else wants them.

All ranks of a run call together. Rank 0 alone looks, locks and writes; the others map the file if they see
it, else they are sent the values. Without a folder, or where it cannot be written (no space, no right), the
values live in the memory of every rank, 4 bytes a response token, as much as the tokens themselves.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcpo.reference.entry import SUFFIX, VALUES, DamagedEntry, Sink, Stored, remove_unfinished
from rcpo.reference.keys import entry_key
from rcpo.reference.parts import ResumableSink
from rcpo.system import distributed
from rcpo.system.files import Lock

Say = Callable[[str], None]
Fill = Callable[[Sink | None], None]
"""Computes all values and writes them to the sink; collective, with a sink on rank 0 alone."""
Values = tuple[np.ndarray, Callable[[], None]]
"""Log-probs (T,), and a check that they still are what they were."""

PATIENCE = 5.0  # seconds between two looks at a lock: well within the collective operations' timeout


@dataclass(frozen=True)
class LogpRequest:
    """`total` values, what they depend on, and for the user their name and what they belong to."""

    name: str
    ingredients: dict[str, str]
    total: int
    unit: str = "tokens"

    @property
    def key(self) -> str:
        return entry_key(self.ingredients)

    def __str__(self) -> str:
        return self.name


class Cache:
    """The entries of a folder (None: nothing is kept). `say` takes lines for the user, on rank 0."""

    def __init__(self, folder: Path | None, say: Say) -> None:
        self._folder = folder
        self._say = say

    @property
    def memo(self) -> Path | None:
        """Where hashes of files are remembered."""
        return None if self._folder is None else self._folder / "hashes"

    def fetch(self, wanted: LogpRequest, fill: Fill) -> Values:
        """The values wanted: read, or computed by `fill` and kept. Collective."""
        if self._folder is None:
            return self._compute(None, wanted, fill, alone=False)
        path = self._folder / "reference" / f"{wanted.key}{SUFFIX}"
        found, stored = self._look(path, wanted, told=False)
        if found:
            return self._read(path, wanted, stored)
        lock = self._wait(path, wanted)
        try:
            found, stored = self._look(path, wanted, told=True)
            if found:
                return self._read(path, wanted, stored)
            alone = lock is not None and lock.exclusive
            if alone:
                remove_unfinished(path)
            return self._compute(path, wanted, fill, alone=alone)
        finally:
            if lock is not None:
                lock.release()

    def _look(self, path: Path, wanted: LogpRequest, *, told: bool) -> tuple[bool, Stored | None]:
        """Whether rank 0 finds the entry whole, the same on all ranks; on rank 0 the entry as well.

        Damage is `told` by the holder of the lock, who computes the values again.
        """
        stored = self._open(path, wanted, told=told) if distributed.is_main() else None
        return distributed.broadcast_object(stored is not None), stored

    def _open(self, path: Path, wanted: LogpRequest, *, told: bool) -> Stored | None:
        try:
            return Stored(path, wanted.key, wanted.total)
        except FileNotFoundError:
            return None
        except (DamagedEntry, OSError) as error:
            if told:
                self._say(f"{wanted}: {path} is not used, {error}; they are computed again")
            return None

    def _read(self, path: Path, wanted: LogpRequest, stored: Stored | None) -> Values:
        values = self._share(path, wanted, stored, None)
        self._say_main(f"{wanted}: read from cache {wanted.key[:12]} ({wanted.total:,} {wanted.unit})")
        return values

    def _wait(self, path: Path, wanted: LogpRequest) -> Lock | None:
        """Rank 0's lock on an entry; the ranks meet now and then, so that none of them times out."""
        lock = Lock(path.with_suffix(".lock")) if distributed.is_main() else None
        patience = 0.0
        while not distributed.broadcast_object(lock is not None and _try(lock, patience)):
            if not patience:
                self._say_main(f"{wanted}: another run is computing the same ones; waiting for it")
            patience = PATIENCE
        return lock

    def _compute(self, path: Path | None, wanted: LogpRequest, fill: Fill, *, alone: bool) -> Values:
        """The values, computed by `fill`; where rank 0 is `alone` at them, from where another pass ended."""
        began = time.perf_counter()
        sink = self._sink(path, wanted, alone=alone) if distributed.is_main() else None
        memory: np.ndarray | None = None
        try:
            fill(sink)
            if sink is not None:
                memory = sink.publish(wanted.key, wanted.ingredients)
        finally:
            if sink is not None:
                sink.close()
        if sink is not None:
            seconds = time.perf_counter() - began
            fate = f"kept in {path}" if path is not None else "not kept (reference.cache=off)"
            if sink.failure is not None:
                fate = f"not kept, they stay in memory: {path}: {sink.failure.strerror}"
            self._say(f"{wanted}: computed in {seconds:.1f} s ({wanted.total:,} {wanted.unit}), {fate}")
        if distributed.broadcast_object(memory is not None):
            return self._share(None, wanted, None, memory)
        assert path is not None
        stored = Stored(path, wanted.key, wanted.total) if distributed.is_main() else None
        return self._share(path, wanted, stored, None)

    def _sink(self, path: Path | None, wanted: LogpRequest, *, alone: bool) -> Sink:
        if path is None or not alone:
            return Sink(path, wanted.total)
        return ResumableSink(path, wanted.total, wanted.key, lambda text: self._say(f"{wanted}: {text}"))

    def _share(
        self, path: Path | None, wanted: LogpRequest, stored: Stored | None, memory: np.ndarray | None
    ) -> Values:
        """The values on every rank, from rank 0's file or memory: mapped by those that see the file too."""
        if path is not None and not distributed.is_main():
            with contextlib.suppress(DamagedEntry, OSError):  # another machine's folder: they are sent
                stored = Stored(path, wanted.key, wanted.total)
        if not all(distributed.gather_objects(stored is not None)):
            source = memory if stored is None else stored.values
            if not distributed.is_main():
                source = np.zeros(wanted.total, VALUES)
            assert source is not None
            memory = distributed.broadcast_array(source)
        if stored is not None:
            return stored.values, stored.check
        assert memory is not None
        return memory, lambda: None

    def _say_main(self, text: str) -> None:
        if distributed.is_main():
            self._say(text)


def _try(lock: Lock, patience: float) -> bool:
    """Try for `patience` seconds, once at least, to get the lock."""
    until = time.monotonic() + patience
    while not lock.acquire():
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True
