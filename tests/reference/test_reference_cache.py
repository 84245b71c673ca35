"""The cache of reference log-probs: its files, its keys, and many processes at once, each for real."""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from tiny import tiny_llama

from rcpo.models.contents import source_hash, tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.reference.cache import Cache, Fill, LogpRequest, _try
from rcpo.reference.entry import HEADER, DamagedEntry, Sink, Stored
from rcpo.reference.keys import entry_key, positions_hash
from rcpo.system import files as caching
from rcpo.system.files import Lock, cache_folder

WORKER = str(Path(__file__).parents[1] / "workers" / "cache_fill.py")
INGREDIENTS = {"weights": "w", "dataset": "d"}


def write(path: Path, key: str, values: np.ndarray) -> None:
    sink = Sink(path, len(values))
    sink.write(0, values)
    assert sink.publish(key, INGREDIENTS) is None
    sink.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def fill_with(values: np.ndarray, calls: list[int]) -> Fill:
    def fill(sink: Sink | None) -> None:
        assert sink is not None
        calls.append(len(values))
        sink.write(0, values)

    return fill


def test_the_order_of_the_ingredients_is_not_in_the_key() -> None:
    assert entry_key({"weights": "w", "dataset": "d"}) == entry_key({"dataset": "d", "weights": "w"})
    assert entry_key({"weights": "w", "dataset": "d"}) != entry_key({"weights": "d", "dataset": "w"})


def test_positions_are_named_by_their_values_in_any_precision() -> None:
    assert positions_hash(None) == "all"
    expected = sha256(struct.pack("<2q", 1, 5)).hexdigest()
    assert [positions_hash(np.array([1, 5], kind)) for kind in ("<i4", "<i8", ">i8")] == [expected] * 3


def test_pieces_in_any_order_make_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.logps"
    sink = Sink(path, 10)
    for place in (6, 0, 3):
        sink.write(place, np.arange(place, min(place + 4, 10), dtype=np.float32))
    assert not path.exists()  # whole, or not there at all
    assert sink.publish("a", INGREDIENTS) is None
    sink.close()
    stored = Stored(path, "a", 10)
    assert stored.values.tolist() == list(range(10))
    header = json.loads(path.read_bytes()[:HEADER])
    assert header["ingredients"] == INGREDIENTS and header["values"] == 10
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["a.logps"]


def test_an_entry_without_values(tmp_path: Path) -> None:
    write(tmp_path / "a.logps", "a", np.zeros(0, np.float32))
    assert Stored(tmp_path / "a.logps", "a", 0).values.shape == (0,)


def test_values_are_mapped_not_read(tmp_path: Path) -> None:
    values = np.arange(16_000_000, dtype=np.float32)  # 64 MB
    write(tmp_path / "a.logps", "a", values)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    stored = Stored(tmp_path / "a.logps", "a", len(values))
    assert float(stored.values.sum(dtype=np.float64)) == float(values.sum(dtype=np.float64))
    assert anonymous() - before < 8_000_000
    assert isinstance(stored.values, np.memmap) and isinstance(stored.values._mmap, mmap.mmap)
    assert not stored.values.flags.writeable


@pytest.mark.parametrize("cut", [1, 4, 100, HEADER, HEADER + 1, HEADER + 400])
def test_a_truncated_file_is_found(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.logps"
    write(path, "a", np.ones(100, np.float32))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-cut])
    with pytest.raises(DamagedEntry, match=f"{len(content) - cut} bytes instead of {len(content)}"):
        Stored(path, "a", 100)


def test_every_flipped_bit_of_the_values_is_found_and_no_flip_elsewhere_changes_them(tmp_path: Path) -> None:
    path = tmp_path / "a.logps"
    values = np.linspace(-9, 0, 7, dtype=np.float32)
    write(path, "a", values)
    content = path.read_bytes()
    used = len(content[:HEADER].rstrip())
    path.unlink()
    for place in [*range(used), HEADER - 1, *range(HEADER, len(content))]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            if place >= HEADER:
                with pytest.raises(DamagedEntry, match="checksum"):
                    Stored(path, "a", 7)
                continue
            try:
                stored = Stored(path, "a", 7)
            except DamagedEntry:
                continue
            assert stored.values.tolist() == values.tolist()


def test_an_entry_of_another_key_or_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.logps", "a", np.ones(4, np.float32))
    with pytest.raises(DamagedEntry, match="something else"):
        Stored(tmp_path / "a.logps", "b", 4)
    with pytest.raises(DamagedEntry, match="bytes"):
        Stored(tmp_path / "a.logps", "a", 5)
    (tmp_path / "a.logps").unlink()
    (tmp_path / "a.logps").write_bytes(b"\xff" * (HEADER + 16))
    with pytest.raises(DamagedEntry, match="not readable"):
        Stored(tmp_path / "a.logps", "a", 4)


def test_deleted_under_the_run_it_stays_and_changed_it_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.logps"
    write(path, "a", np.ones(4, np.float32))
    stored = Stored(path, "a", 4)
    copy = path.read_bytes()
    path.unlink()
    stored.check()
    assert stored.values.tolist() == [1, 1, 1, 1]
    path.write_bytes(copy)
    stored = Stored(path, "a", 4)
    stored.check()
    with path.open("r+b") as file:
        file.seek(HEADER)
        file.write(b"\0\0\0\0")
    with pytest.raises(RuntimeError, match="was changed while this run reads"):
        stored.check()


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_entry_is_computed_again_with_a_word(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    calls: list[int] = []
    values = np.linspace(-3, 0, 50, dtype=np.float32)
    wanted = LogpRequest("reference log-probs (train)", INGREDIENTS, 50)
    for _ in range(2):
        Cache(tmp_path, said.append).fetch(wanted, fill_with(values, calls))
    assert calls == [50]
    assert "computed in" in said[0] and "kept in" in said[0]
    assert said[1] == f"reference log-probs (train): read from cache {wanted.key[:12]} (50 tokens)"
    path = tmp_path / "reference" / f"{wanted.key}.logps"
    content = bytearray(path.read_bytes())
    path.unlink()
    content[-3] ^= 16
    if damage != "delete":
        path.write_bytes(content[:-8] if damage == "cut" else content)
    said.clear()
    found, _ = Cache(tmp_path, said.append).fetch(wanted, fill_with(values, calls))
    assert found.tolist() == values.tolist() and calls == [50, 50]
    reason = {"cut": "bytes instead of", "flip": "checksum is wrong", "delete": "computed in"}[damage]
    assert reason in said[0] and "kept in" in said[-1]
    Cache(tmp_path, said.append).fetch(wanted, fill_with(values, calls))
    assert len(calls) == 2


def test_off_keeps_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    values, check = Cache(None, said.append).fetch(
        LogpRequest("train", INGREDIENTS, 3), fill_with(np.ones(3, np.float32), [])
    )
    check()
    assert values.tolist() == [1, 1, 1] and "reference.cache=off" in said[0]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RCPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "rcpo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "rcpo"
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder("~/here") == tmp_path / "here"
    assert cache_folder("off") is None
    assert cache_folder("False") is None  # how YAML reads an unquoted off


def limit_files(megabytes: int) -> None:
    """A full disk, as far as a process can have one without being root: no file beyond this size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, resource.RLIM_INFINITY))


@pytest.mark.parametrize("megabytes", [0, 1])
def test_a_full_disk_is_said_and_the_run_goes_on_with_all_values(tmp_path: Path, megabytes: int) -> None:
    said: list[str] = []
    values = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)  # 4 MB

    def fill(sink: Sink | None) -> None:
        assert sink is not None
        for start in range(0, len(values), 1000):
            sink.write(start, values[start : start + 1000])

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(megabytes)
    try:
        found, _ = Cache(tmp_path, said.append).fetch(LogpRequest("train", INGREDIENTS, len(values)), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (found == values).all()
    assert "not kept, they stay in memory" in said[-1] and "File too large" in said[-1]
    assert [entry.suffix for entry in (tmp_path / "reference").iterdir()] == [".lock"]


def test_every_byte_that_reached_a_full_disk_is_read_back(tmp_path: Path) -> None:
    values = np.full(300_000, -0.1, np.float32)  # 1.2 MB, more than is read at once; no byte of −0.1 is 0
    sink = Sink(tmp_path / "a.logps", len(values) + 1)
    sink.write(0, values)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(1)
    try:
        sink.write(len(values), np.full(1, -2.0, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = sink.publish("a", INGREDIENTS)
    assert found is not None and found.tolist() == [*values.tolist(), -2.0]
    assert not list(tmp_path.iterdir())


class Ranks:
    """The collective operations of `rcpo.system.distributed` between threads, each of which is a rank."""

    def __init__(self, count: int) -> None:
        self._own = threading.local()
        self._values: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=120)
        self.arrays = 0

    def is_main(self) -> bool:
        return self._own.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        self._values[self._own.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def broadcast_array(self, values: np.ndarray) -> np.ndarray:
        shapes = {(each.shape, each.dtype.str) for each in self.gather_objects(values)}
        assert len(shapes) == 1, shapes  # as the real one needs it
        self.arrays += self.is_main()
        return self.broadcast_object(np.array(values))

    def run(self, task: Callable[[int], Any]) -> list[Any]:
        """What `task(rank)` returns on each rank."""

        def on(rank: int) -> Any:
            self._own.rank = rank
            try:
                return task(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self._values)) as pool:
            return list(pool.map(on, range(len(self._values))))


@pytest.mark.parametrize("shared", [True, False])
def test_a_rank_maps_the_file_that_it_sees_and_is_sent_the_values_of_another(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, said, filled = Ranks(2), list[str](), list[tuple[int, bool]]()
    monkeypatch.setattr("rcpo.reference.cache.distributed", ranks)
    values = np.linspace(-3, 0, 50, dtype=np.float32)
    wanted = LogpRequest("train", INGREDIENTS, 50)

    def fetch(rank: int) -> np.ndarray:
        def fill(sink: Sink | None) -> None:
            filled.append((rank, sink is not None))
            if sink is not None:
                sink.write(0, values)

        cache = Cache(tmp_path / ("0" if shared else str(rank)), said.append)
        found, check = cache.fetch(wanted, fill)
        check()
        return found

    for attempt in ("computed", "read"):
        found = ranks.run(fetch)
        assert [each.tolist() for each in found] == [values.tolist()] * 2, attempt
        assert [isinstance(each, np.memmap) for each in found] == [True, shared], attempt
    assert ranks.arrays == (0 if shared else 2)
    assert sorted(filled) == [(0, True), (1, False)]
    assert len(said) == 2 and "computed in" in said[0] and "read from cache" in said[1]  # rank 0 alone
    assert len(list(tmp_path.rglob("*.logps"))) == 1


@pytest.mark.parametrize("place", [None, "file/cache"])
def test_values_that_are_kept_nowhere_are_sent_to_every_rank(
    tmp_path: Path, place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # below which no folder can be made
    ranks, said = Ranks(2), list[str]()
    monkeypatch.setattr("rcpo.reference.cache.distributed", ranks)
    cache = Cache(None if place is None else tmp_path / place, said.append)
    values = np.linspace(-3, 0, 50, dtype=np.float32)

    def fetch(rank: int) -> np.ndarray:
        def fill(sink: Sink | None) -> None:
            if sink is not None:
                sink.write(0, values)

        return cache.fetch(LogpRequest("train", INGREDIENTS, 50), fill)[0]

    assert [found.tolist() for found in ranks.run(fetch)] == [values.tolist()] * 2
    assert ranks.arrays == 1 and "not kept" in said[-1]


def test_a_lock_is_looked_at_some_twenty_times_a_second(tmp_path: Path) -> None:
    looks: list[int] = []

    class Held(Lock):
        def acquire(self) -> bool:
            looks.append(1)
            return False

    lock = Held(tmp_path / "x.lock")
    assert not _try(lock, 0.11) and len(looks) < 5
    looks.clear()
    assert not _try(lock, 0.0) and looks == [1]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    values = np.ones(5, np.float32)
    wanted = LogpRequest("train", INGREDIENTS, 5)
    found, _ = Cache(tmp_path / "file" / "cache", said.append).fetch(wanted, fill_with(values, []))
    assert found.tolist() == values.tolist() and "Not a directory" in said[-1]


def test_processes_at_once_compute_once(tmp_path: Path) -> None:
    command = [sys.executable, WORKER, str(tmp_path), "1.0"]
    started = [
        forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (tmp_path / "go").touch()
    output = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], output
    assert (tmp_path / "computed").read_text().count("\n") == 1
    text = "".join(out for out, _ in output)
    assert text.count("computed in") == 1 and text.count("read from cache") == 2
    assert text.count("all 1000 right") == 3
    assert "another run is computing the same ones; waiting for it" in text


def test_a_killed_owner_blocks_nobody_and_leaves_nothing_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    process = forked.Popen([sys.executable, WORKER, str(tmp_path), "forever"], stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "half").exists)
    folder = tmp_path / "cache" / "reference"
    assert [path.suffix for path in sorted(folder.iterdir())] == [".tmp", ".lock"]
    process.kill()
    process.wait()
    said: list[str] = []
    values = np.arange(1000, dtype=np.float32)
    wanted = LogpRequest("train", {"weights": "worker"}, 1000)
    found, _ = Cache(tmp_path / "cache", said.append).fetch(wanted, fill_with(values, []))
    # had it waited for the dead owner, it would have reported that too
    assert found.tolist() == values.tolist() and len(said) == 1 and "computed in" in said[0]
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".logps"]


def test_killed_at_random_moments_every_file_with_a_name_is_whole(tmp_path: Path) -> None:
    chance = random.Random(0)
    lengths: dict[str, int] = {}
    for round_ in range(30):
        child = os.fork()
        if child == 0:
            for number in range(10_000):  # ends by the kill
                key = f"{round_}-{number}"
                sink = Sink(tmp_path / f"{key}.logps", 5000)
                for start in range(0, 5000, 500):
                    sink.write(start, np.full(500, number, np.float32))
                sink.publish(key, INGREDIENTS)
                sink.close()
            os._exit(1)
        # a busy machine starts late
        wait_for(lambda r=round_: any(tmp_path.glob(f"{r}-[1-9].logps")))
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for path in tmp_path.glob("*.logps"):
        stored = Stored(path, path.stem, 5000)
        assert (stored.values == float(path.stem.split("-")[1])).all()
        lengths[path.stem] = len(stored.values)
    assert len(lengths) >= 60  # numbers 0 and 1, at least, of every round
    assert any(tmp_path.glob(".*.tmp"))  # else none came in the middle of writing


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "x.lock"), Lock(tmp_path / "x.lock")
    assert first.acquire() and first.exclusive
    assert not second.acquire()
    first.release()
    assert second.acquire() and second.exclusive
    second.release()


def test_weights_count_and_their_remembered_hash_is_honest(tmp_path: Path) -> None:
    model, memo = Path(tiny_llama(tmp_path / "model")), tmp_path / "memo"
    weights = model / "model.safetensors"
    old = time.time() - 60
    first = source_hash(ModelSource(model), 1, memo)
    assert first == source_hash(ModelSource(model), 1, None)
    assert not memo.exists()  # just written: a change within the clock's grain would not show
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (old, old))  # size and, as far as a user can, times are those of a file at rest
    second = source_hash(ModelSource(model), 1, memo)
    assert second != first
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (old, old))
    assert source_hash(ModelSource(model), 1, memo) == first
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert source_hash(ModelSource(model), 1, memo) != first


def test_a_hash_is_remembered_for_a_file_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "AT_REST", -1.0)
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert caching.file_hash(file, memo) == abc
    (note,) = memo.iterdir()
    assert note.read_text() == abc
    note.write_text("f" * 64)
    assert caching.file_hash(file, memo) == "f" * 64  # it was not read again
    note.write_text("short")
    assert caching.file_hash(file, memo) == abc
    file.write_bytes(b"abd")
    assert caching.file_hash(file, memo) != abc


def test_an_adapter_and_its_base_model_count(tmp_path: Path) -> None:
    base, adapter = Path(tiny_llama(tmp_path / "base")), tmp_path / "adapter"
    adapter.mkdir()
    found = [source_hash(ModelSource(base), 1, None)]
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"1")):
        (adapter / name).write_bytes(content)
        found.append(source_hash(ModelSource(base, adapter=adapter), 1, None))
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    found.append(source_hash(ModelSource(base, adapter=adapter), 1, None))
    assert len(set(found)) == 4


def test_the_tokenizer_counts(tmp_path: Path) -> None:
    model = Path(tiny_llama(tmp_path / "model"))
    before, weights = tokenizer_hash(model, None), source_hash(ModelSource(model), 1, None)
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert tokenizer_hash(model, None) != before
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert len({tokenizer_hash(model, None), before}) == 2
    assert source_hash(ModelSource(model), 1, None) == weights


def test_fresh_weights_are_known_by_seed_and_architecture(tmp_path: Path) -> None:
    small, large = Path(tiny_llama(tmp_path / "small")), Path(tiny_llama(tmp_path / "large", hidden=64))
    sources = [ModelSource(small, "random"), ModelSource(large, "random")]
    found = [source_hash(source, seed, None) for source in sources for seed in (1, 2)]
    assert len(set(found)) == 4 and source_hash(sources[0], 1, tmp_path / "memo") == found[0]
