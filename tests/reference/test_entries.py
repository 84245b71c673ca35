"""Entries of the cache of log-probs byte by byte, how they reach the disk, and what the user is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcpo.errors import RunError
from rcpo.reference import cache as fetching
from rcpo.reference import entry as entries
from rcpo.reference.cache import Cache, LogpRequest, _try
from rcpo.reference.entry import DamagedEntry, Sink, Stored, remove_unfinished
from rcpo.reference.keys import entry_key
from rcpo.system import distributed
from rcpo.system.files import Lock

WANTED = LogpRequest("reference log-probs", {"weights": "w"}, 3)
THREE = np.array([-1.0, -2.0, -3.0], np.float32)


def fill(sink: Sink | None) -> None:
    assert sink is not None
    sink.write(0, THREE)


def write(path: Path, key: str, values: np.ndarray) -> None:
    sink = Sink(path, len(values))
    sink.write(0, values)
    sink.publish(key, {})
    sink.close()


# --- the file -------------------------------------------------------------------------------------------


def test_a_file_is_a_header_of_4096_bytes_and_its_values(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "a.logps", 3)
    sink.write(0, THREE)
    assert sink.publish("a", {"b": "c"}) is None
    content = (tmp_path / "a.logps").read_bytes()
    values = struct.pack("<3f", -1, -2, -3)
    assert len(content) == 4096 + 12 and content[4096:] == values and content[4095:4096] == b"\n"
    assert json.loads(content[:4096]) == {
        "key": "a", "values": 3, "sha256": hashlib.sha256(values).hexdigest(), "ingredients": {"b": "c"},
    }  # fmt: skip
    assert (tmp_path / "a.logps").stat().st_mode & 0o777 == 0o444 & ~os.umask(os.umask(0))


def test_a_checksum_is_that_of_all_blocks(tmp_path: Path) -> None:
    values = np.linspace(-5, 0, 600_000, dtype=np.float32)  # 2.4 MB, more than is read at once
    write(tmp_path / "a.logps", "a", values)
    header = json.loads((tmp_path / "a.logps").read_bytes()[:4096])
    assert header["sha256"] == hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()


def test_places_that_nothing_was_written_to_are_zero(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "a.logps", 5)
    sink.write(1, THREE)
    sink.publish("a", {})
    assert Stored(tmp_path / "a.logps", "a", 5).values.tolist() == [0, -1, -2, -3, 0]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("place", [-1, 3])
def test_a_value_has_a_place_in_the_entry(place: int, folder: bool, tmp_path: Path) -> None:
    sink = Sink(tmp_path / "a.logps" if folder else None, 5)
    sink.write(2, THREE)  # the last three
    with pytest.raises(AssertionError, match=str(place)):
        sink.write(place, THREE)
    sink.close()


def test_values_in_memory_are_given_back(tmp_path: Path) -> None:
    sink = Sink(None, 5)
    sink.write(2, THREE)
    found = sink.publish("a", {})
    assert found is not None and found.tolist() == [0, 0, -1, -2, -3] and sink.failure is None


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    path = tmp_path / "a.logps"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(("file", path.exists())))
    monkeypatch.setattr(entries, "sync_folder", lambda folder: synced.append((folder.name, path.exists())))
    write(path, "a", THREE)
    assert synced == [("file", False), (tmp_path.name, True)]


def test_a_file_that_is_not_published_goes(tmp_path: Path) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    sink = Sink(tmp_path / "a.logps", 3)
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.name.startswith(".a.") and unfinished.suffix == ".tmp"
    sink.close()
    sink.close()  # a second time changes nothing
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == opened
    write(tmp_path / "b.logps", "b", THREE)
    assert len(os.listdir("/proc/self/fd")) == opened
    lost = Sink(tmp_path / "c.logps", 3)
    next(tmp_path.glob(".c.*.tmp")).unlink()  # another process took it for a leftover
    lost.close()


def test_only_leftovers_of_an_entry_are_removed(tmp_path: Path) -> None:
    for name in (".a.1.tmp", ".a.2.tmp", ".ab.1.tmp", "a.logps", ".a.lock"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a.logps")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", ".ab.1.tmp", "a.logps"]


def test_what_was_written_before_a_failure_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink(tmp_path / "a.logps", 600_003)
    values = np.linspace(-5, -1, 600_000, dtype=np.float32)
    sink.write(0, values)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entries, "write_all", full)
    sink.write(600_000, THREE)
    assert sink.failure is not None and not list(tmp_path.iterdir())
    found = sink.publish("a", {})
    assert found is not None and found.tolist() == [*values.tolist(), -1, -2, -3]


def test_a_failure_at_the_end_leaves_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink(tmp_path / "a.logps", 3)
    sink.write(0, THREE)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    found = sink.publish("a", {})
    assert found is not None and found.tolist() == THREE.tolist() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: c[:-1], "it has 4107 bytes instead of 4108"),
        (lambda c: c + b"\0", "it has 4109 bytes instead of 4108"),
        (lambda c: b"{" + c[1:4090] + b"\0" * 6 + c[4096:], "its header is not readable"),
        (lambda c: b"[]".ljust(4096) + c[4096:], "its header is that of something else"),
        (lambda c: c.replace(b'"key": "a"', b'"key": "b"'), "its header is that of something else"),
        (lambda c: c.replace(b'"values": 3', b'"values": 4'), "its header is that of something else"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "its checksum is wrong"),
        (lambda c: c.replace(b'"sha256"', b'"sha255"'), "its checksum is wrong"),
    ],
)
def test_damage_is_found_out_and_the_file_closed(damage: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.logps"
    write(path, "a", THREE)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(content))
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DamagedEntry) as damaged:
        Stored(path, "a", 3)
    assert str(damaged.value) == reason
    assert len(os.listdir("/proc/self/fd")) == opened  # though the exception is still held


def test_a_file_that_was_touched_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.logps"
    write(path, "a", THREE)
    stored = Stored(path, "a", 3)
    assert stored.path == path
    stored.check()
    os.utime(path, ns=(0, 1))
    with pytest.raises(RunError) as refusal:
        stored.check()
    assert str(refusal.value) == (
        f"{path} was changed while this run reads its reference log-probs from it; delete the file and "
        "start the run again (resume=auto continues it)"
    )


# --- the cache ------------------------------------------------------------------------------------------


def test_a_request_has_a_name_a_key_and_a_unit() -> None:
    assert str(WANTED) == "reference log-probs" and WANTED.unit == "tokens"
    assert WANTED.key == entry_key({"weights": "w"}) == hashlib.sha256(b'{"weights": "w"}').hexdigest()
    assert Cache(None, print).memo is None and Cache(Path("x"), print).memo == Path("x/hashes")


def test_the_user_is_told_where_values_are_kept_or_why_not(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "reference" / f"{WANTED.key}.logps"
    values, check = Cache(tmp_path, said.append).fetch(WANTED, fill)
    check()
    assert values.tolist() == THREE.tolist()
    Cache(tmp_path, said.append).fetch(WANTED, fill)
    Cache(None, said.append).fetch(WANTED, fill)
    (tmp_path / "file").touch()
    other = tmp_path / "file" / "reference" / path.name
    wanted = LogpRequest("x", {"weights": "w"}, 3, "pairs")
    Cache(tmp_path / "file", said.append).fetch(wanted, fill)
    computed = [re.fullmatch(r"(.*): computed in (\d+\.\d) s (.*)", line) for line in said]
    told = [(match[1], match[3]) for match in computed if match and float(match[2]) < 60]
    assert told == [
        ("reference log-probs", f"(3 tokens), kept in {path}"),
        ("reference log-probs", "(3 tokens), not kept (reference.cache=off)"),
        ("x", f"(3 pairs), not kept, they stay in memory: {other}: Not a directory"),
    ]
    assert said[1] == f"reference log-probs: read from cache {WANTED.key[:12]} (3 tokens)"


def test_a_damaged_entry_is_named_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "reference" / f"{WANTED.key}.logps"
    path.parent.mkdir()
    path.write_bytes(b"")
    Cache(tmp_path, said.append).fetch(WANTED, fill)
    assert said[0] == (
        f"reference log-probs: {path} is not used, it has 0 bytes instead of 4108; they are computed again"
    )
    assert len(said) == 2 and "computed in" in said[1]
    assert Stored(path, WANTED.key, 3).values.tolist() == THREE.tolist()


def test_another_run_that_computes_is_waited_for_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", 0.01)
    path = tmp_path / "reference" / f"{WANTED.key}.logps"
    other = Lock(path.with_suffix(".lock"))
    assert other.acquire()

    def computes() -> None:
        time.sleep(0.3)
        write(path, WANTED.key, THREE)
        other.release()

    said: list[str] = []
    thread = threading.Thread(target=computes)
    thread.start()
    values, _ = Cache(tmp_path, said.append).fetch(WANTED, lambda sink: pytest.fail("computed twice"))
    thread.join()
    assert values.tolist() == THREE.tolist()
    assert said == [
        "reference log-probs: another run is computing the same ones; waiting for it",
        f"reference log-probs: read from cache {WANTED.key[:12]} (3 tokens)",
    ]
    assert Lock(path.with_suffix(".lock")).acquire()  # the lock was given back


def test_an_error_while_computing_leaves_neither_a_file_nor_a_lock(tmp_path: Path) -> None:
    def fails(sink: Sink | None) -> None:
        raise RuntimeError("out of memory")

    left = tmp_path / "reference" / f".{WANTED.key}.0.tmp"  # of a process that was killed
    left.parent.mkdir()
    left.touch()
    with pytest.raises(RuntimeError, match="out of memory"):
        Cache(tmp_path, print).fetch(WANTED, fails)
    lock = tmp_path / "reference" / f"{WANTED.key}.lock"
    assert list(lock.parent.iterdir()) == [lock] and Lock(lock).acquire()


@pytest.mark.usefixtures("without_locks")
def test_without_the_lock_what_others_write_is_left_alone(tmp_path: Path) -> None:
    others = tmp_path / "reference" / f".{WANTED.key}.0.tmp"
    others.parent.mkdir()
    others.touch()
    Cache(tmp_path, lambda _: None).fetch(WANTED, fill)
    assert others.exists()


def test_a_rank_that_is_not_the_first_neither_speaks_nor_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: True)  # rank 0 has it in memory
    monkeypatch.setattr(distributed, "broadcast_array", lambda own: own + 7)
    sinks: list[Sink | None] = []
    values, check = Cache(None, lambda text: pytest.fail(text)).fetch(WANTED, sinks.append)
    check()
    assert sinks == [None] and values.tolist() == [7, 7, 7] and values.dtype == np.float32


def test_a_lock_is_waited_for_as_long_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, free_at = 100.0, 1e9

    def sleep(seconds: float) -> None:
        nonlocal now
        assert 0 < seconds <= 0.1
        now += seconds

    class Held(Lock):
        def acquire(self) -> bool:
            return now >= free_at

    monkeypatch.setattr(fetching.time, "monotonic", lambda: now)
    monkeypatch.setattr(fetching.time, "sleep", sleep)
    lock = Held(tmp_path / "x.lock")
    assert _try(lock, 0.0) is False and now == 100.0
    assert _try(lock, 5.0) is False and 105 <= now < 105.2
    free_at = now + 1
    assert _try(lock, 5.0) is True and now < free_at + 0.2
