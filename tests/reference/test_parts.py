"""Parts of an entry: byte by byte, damaged, without room, and of processes that were killed for real."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from permissions import files_no_longer_than

from rcpo.reference.cache import Cache, LogpRequest
from rcpo.reference.entry import Sink, Stored, remove_unfinished
from rcpo.reference.parts import ResumableSink

WANTED = LogpRequest("reference log-probs", {"weights": "w"}, 4)
THREE = np.array([-1.0, -2.0, -3.0], np.float32)


def sink_of(folder: Path, total: int = 9, key: str = "a") -> tuple[ResumableSink, list[str]]:
    said: list[str] = []
    return ResumableSink(folder / f"{key}.logps", total, key, said.append), said


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.part"))


def leave_part(folder: Path, place: int, values: np.ndarray, key: str = "a") -> Path:
    """One part, of a pass that is stopped after these values."""
    before = parts_in(folder)
    sink, _ = sink_of(folder, key=key)
    sink.restore()
    sink.write(place, values)
    sink.keep()
    sink.close()
    (made,) = set(parts_in(folder)) - set(before)
    return made


def test_a_part_is_a_checksum_a_table_and_the_values(tmp_path: Path) -> None:
    sink, said = sink_of(tmp_path)
    sink.restore()
    sink.write(6, THREE[:1])
    sink.write(0, THREE)
    sink.keep()
    (part,) = parts_in(tmp_path)
    body = struct.pack("<q", 2) + struct.pack("<4q", 6, 1, 0, 3) + struct.pack("<4f", -1, -1, -2, -3)
    assert part.read_bytes() == hashlib.sha256(b"part 1 of a" + body).digest() + body
    assert part.name.startswith("a.") and not said


def test_a_part_holds_what_came_since_the_one_before(tmp_path: Path) -> None:
    sink, _ = sink_of(tmp_path)
    sink.restore()
    sink.keep()
    assert not parts_in(tmp_path)  # there is nothing yet
    sink.write(0, THREE)
    sink.keep()
    (first,) = parts_in(tmp_path)
    sink.keep()
    assert parts_in(tmp_path) == [first]
    sink.write(5, THREE[1:])
    sink.keep()
    (second,) = set(parts_in(tmp_path)) - {first}
    assert second.read_bytes()[32:] == struct.pack("<3q", 1, 5, 2) + struct.pack("<2f", -2, -3)


def test_the_next_pass_takes_them_in_and_its_entry_ends_them(tmp_path: Path) -> None:
    leave_part(tmp_path, 6, THREE)
    leave_part(tmp_path, 2, THREE[:1])
    others = leave_part(tmp_path, 0, THREE, key="ab")
    sink, said = sink_of(tmp_path)
    assert sorted(sink.restore().tolist()) == [2, 6]
    assert said == ["44% found, computed by a pass that did not come to its end"]  # 4 of 9
    sink.write(0, THREE[:2])
    sink.keep()
    assert len(parts_in(tmp_path)) == 4  # what was found is not written a second time
    assert max(part.stat().st_size for part in parts_in(tmp_path)) == 32 + 8 + 16 + 12  # three values
    sink.write(3, THREE)
    assert sink.publish("a", {}) is None
    assert Stored(tmp_path / "a.logps", "a", 9).values.tolist() == [-1, -2, -1, -1, -2, -3, -1, -2, -3]
    assert parts_in(tmp_path) == [others]


def test_a_pass_that_does_not_restore_keeps_and_holds_nothing(tmp_path: Path) -> None:
    values = np.ones(9, np.float32)
    alive = weakref.ref(values)
    sink, _ = sink_of(tmp_path)
    sink.write(0, values)
    del values
    assert alive() is None
    sink.keep()
    assert not parts_in(tmp_path)


def test_what_cannot_be_read_now_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = leave_part(tmp_path, 0, THREE)
    with monkeypatch.context() as patched:
        patched.setattr(
            Path, "read_bytes", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale file handle"))
        )
        sink, said = sink_of(tmp_path)
        assert sink.restore().tolist() == [] and "Stale file handle" in said[0]
        sink.close()
    assert sink_of(tmp_path)[0].restore().tolist() == [0] and parts_in(tmp_path) == [part]


def test_nothing_is_said_where_nothing_is_found(tmp_path: Path) -> None:
    sink, said = sink_of(tmp_path)
    assert sink.restore().tolist() == [] and not said
    plain = Sink(tmp_path / "b.logps", 3)
    plain.write(0, THREE)
    plain.keep()
    assert plain.restore().tolist() == [] and not parts_in(tmp_path)


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    whole = leave_part(tmp_path, 0, THREE)
    part = leave_part(tmp_path, 6, THREE)
    content = part.read_bytes()
    flips = [(place, 1 << bit) for place in range(len(content)) for bit in range(8)]
    damaged = [content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :] for place, bit in flips]
    damaged += [content[:end] for end in range(len(content))]
    for each in damaged:
        part.write_bytes(each)
        sink, said = sink_of(tmp_path)
        assert sink.restore().tolist() == [0]  # of the whole one
        sink.close()
        assert set(said) == {
            "33% found, computed by a pass that did not come to its end",
            f"{part} is not used, its checksum is wrong",
        }
        assert parts_in(tmp_path) == [whole]


def test_a_part_of_another_entry_is_refused(tmp_path: Path) -> None:
    leave_part(tmp_path, 0, THREE, key="b").rename(tmp_path / "a.1.part")
    (tmp_path / "a.2.part").mkdir()  # what cannot be read, or removed, does no harm
    sink, said = sink_of(tmp_path)
    assert sink.restore().tolist() == []
    assert len(said) == 2 and any("its checksum is wrong" in line for line in said)
    assert any("Is a directory" in line for line in said)
    assert [part.name for part in parts_in(tmp_path)] == ["a.2.part"]


def test_without_room_for_a_part_the_pass_goes_on(tmp_path: Path) -> None:
    values = np.linspace(-3, -1, 300, dtype=np.float32)
    sink, said = sink_of(tmp_path, 300)
    sink.restore()
    sink.write(0, values[:1])
    sink.keep()
    kept = parts_in(tmp_path)
    for place in range(1, 300):
        sink.write(place, values[place : place + 1])
    with files_no_longer_than(5500):  # an entry has 4,096 + 1,200 bytes, the part 40 + 299 · (16 + 4)
        sink.keep()
        assert said == [f"no longer kept while they are computed: {tmp_path}: File too large"]
        sink.write(0, values[:1])
        sink.keep()
        assert len(said) == 1 and parts_in(tmp_path) == kept
        assert sink.publish("a", {}) is None
    sink.close()
    assert Stored(tmp_path / "a.logps", "a", 300).values.tolist() == values.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["a.logps"]


def test_where_no_entry_is_made_at_the_end_the_parts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = leave_part(tmp_path, 6, THREE)
    sink, _ = sink_of(tmp_path)
    sink.restore()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    memory = sink.publish("a", {})
    assert memory is not None and memory.tolist() == [0] * 6 + THREE.tolist()
    assert list(tmp_path.iterdir()) == [part]


def fill(sink: Sink | None) -> None:
    """Half of what is wanted, kept, and then the other half."""
    assert sink is not None
    sink.restore()
    sink.write(0, THREE[:2])
    sink.keep()
    sink.write(2, THREE[:2])


def test_an_error_leaves_the_parts_and_the_next_pass_names_them(tmp_path: Path) -> None:
    def fails(sink: Sink | None) -> None:
        fill(sink)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Cache(tmp_path, print).fetch(WANTED, fails)
    (part,) = parts_in(tmp_path)
    assert part.parent == tmp_path / "reference" and part.name.startswith(WANTED.key)
    said: list[str] = []
    values, _ = Cache(tmp_path, said.append).fetch(WANTED, fill)
    assert values.tolist() == [-1, -2, -1, -2] and not parts_in(tmp_path)
    assert said[0] == "reference log-probs: 50% found, computed by a pass that did not come to its end"
    assert len(said) == 2 and "computed in" in said[1]


@pytest.mark.parametrize("place", [None, "file/cache"])
def test_where_no_entry_can_be_kept_no_part_is(tmp_path: Path, place: str | None) -> None:
    (tmp_path / "file").touch()  # below which no folder can be made
    said: list[str] = []
    Cache(None if place is None else tmp_path / place, said.append).fetch(WANTED, fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
    assert "not kept" in said[-1] and not any("no longer kept" in line for line in said)


@pytest.mark.usefixtures("without_locks")
def test_without_the_lock_parts_are_neither_written_nor_read_nor_removed(tmp_path: Path) -> None:
    others = tmp_path / "reference" / f"{WANTED.key}.1.part"
    others.parent.mkdir()
    others.touch()
    said: list[str] = []
    Cache(tmp_path, said.append).fetch(WANTED, fill)
    assert parts_in(tmp_path) == [others] and len(said) == 1


def test_killed_at_random_moments_every_part_is_whole(tmp_path: Path) -> None:
    chance = random.Random(0)
    for round_ in range(10):
        before = len(parts_in(tmp_path))
        child = os.fork()
        if child == 0:
            try:
                sink, _ = sink_of(tmp_path, 10_000_000)
                sink.restore()
                for place in range(round_ * 1000, 10_000_000, 500):  # ends by the kill
                    sink.write(place, np.full(500, place, np.float32))
                    sink.keep()
            finally:
                os._exit(1)
        until = time.monotonic() + 120
        while len(parts_in(tmp_path)) < before + 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = len(parts_in(tmp_path))
    remove_unfinished(tmp_path / "a.logps")
    sink, said = sink_of(tmp_path, 10_000_000)
    places = sink.restore().tolist()
    assert len(said) == 1 and len(places) == count >= 20  # none was refused
    sink.publish("a", {})
    values = Stored(tmp_path / "a.logps", "a", 10_000_000).values
    assert all((values[place : place + 500] == place).all() for place in places)
    assert [path.name for path in tmp_path.iterdir()] == ["a.logps"]
