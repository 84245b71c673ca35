"""How a checkpoint is written, with a stand-in for the engine: when it waits, what it keeps, how it fails."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rcpo.checkpoint import write as saving
from rcpo.checkpoint.read import Checkpoint, newest
from rcpo.checkpoint.write import CheckpointWriter, SaveClock, rescue_all
from rcpo.config.schema import RunConfig
from rcpo.errors import RunError
from rcpo.system import distributed

WEIGHTS = torch.arange(4.0)
write_tensors = saving.write_tensors


class Engine:
    """Holds one parameter of four elements."""

    def tensors(self) -> dict[str, Tensor]:
        return {"w|fp32@0": WEIGHTS}

    def record(self) -> dict[str, Any]:
        return {"shapes": {"w": [4]}}


ENGINE: Any = Engine()


def writer(run_dir: Path, **settings: Any) -> CheckpointWriter:
    config = RunConfig()
    config.engine.offload_optimizer = settings.pop("offload", False)
    config.checkpoint = dataclasses.replace(config.checkpoint, **settings)
    return CheckpointWriter(run_dir, config)


def steps(run_dir: Path) -> list[str]:
    """The names in the folder of checkpoints, hidden ones too."""
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


def read(run_dir: Path) -> Checkpoint:
    found = newest(run_dir, print)
    assert found is not None
    return found


class Gate:
    """Holds the thread that writes until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self, *given: Any) -> Any:
        assert self.opened.wait(60)
        return write_tensors(*given)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate()
    monkeypatch.setattr(saving, "write_tensors", found)
    yield found
    found.opened.set()


def fails(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- when it is due ------------------------------------------------------------------------------------


def test_the_first_checkpoint_waits_for_the_interval_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = SaveClock(2.0)  # nothing has held training up yet
    now = 51.9
    assert not clock.due
    now = 52.0
    assert clock.due


def test_the_interval_is_given_in_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = writer(tmp_path, minutes=2.0).clock
    now = 119.5
    assert not clock.due
    now = 120.0
    assert clock.due


def test_the_clock_counts_from_a_save_and_knows_what_it_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def slowly(*given: Any) -> Any:
        nonlocal now
        now += 6.0
        return write_tensors(*given)

    monkeypatch.setattr(saving, "write_tensors", slowly)
    found = writer(tmp_path, minutes=1.0, background=False)
    found.save(ENGINE, {"step": 1})
    now += 119.0  # 6 s are 5 % of 120 s
    assert not found.clock.due
    now += 1.0
    assert found.clock.due


def test_the_time_that_training_waited_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rcpo")
    writer(tmp_path, background=False).save(ENGINE, {"step": 7})
    (line,) = [record.getMessage() for record in caplog.records if "waited" in record.getMessage()]
    assert line.startswith("checkpoint of step 7: training waited 0.") and line.endswith(" s for it")


# --- in the background, or while training waits ---------------------------------------------------------


@pytest.mark.parametrize(
    ("offload", "background", "expected"),
    [
        (False, None, True),
        (True, None, False),
        (True, True, True),
        (False, False, False),
    ],
)
def test_training_goes_on_unless_the_optimizer_is_offloaded_or_the_key_decides(
    offload: bool, background: bool | None, expected: bool, tmp_path: Path
) -> None:
    found = writer(tmp_path, offload=offload, background=background)
    found.save(ENGINE, {"step": 1})
    assert found.pending is expected
    found.finish()


def test_a_pending_checkpoint_has_no_name_until_it_is_finished(gate: Gate, tmp_path: Path) -> None:
    found = writer(tmp_path)
    assert not found.pending and not found.written
    found.finish()  # nothing to do
    found.save(ENGINE, {"step": 3})
    assert found.pending and not found.written and steps(tmp_path) == [".step-3.new"]
    gate.opened.set()
    found._pending.part.join()  # type: ignore[union-attr]
    assert found.pending and found.written and steps(tmp_path) == [".step-3.new"]
    found.finish()
    assert not found.pending and not found.written and steps(tmp_path) == ["latest", "step-3"]


def test_finishing_waits_for_the_writer(gate: Gate, tmp_path: Path) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    threading.Timer(0.2, gate.opened.set).start()
    found.finish()
    assert read(tmp_path).step == 1


@pytest.mark.parametrize("background", [True, False])
def test_only_the_background_takes_a_copy(background: bool, gate: Gate, tmp_path: Path) -> None:
    weights = torch.zeros(4)
    engine: Any = Engine()
    engine.tensors = lambda: {"w|fp32@0": weights}

    def changes() -> None:
        weights.fill_(1.0)
        gate.opened.set()

    found = writer(tmp_path, background=background)
    threading.Timer(0.2, changes).start()
    found.save(engine, {"step": 1})
    found.finish()
    values = read(tmp_path).tensors.values("w", "fp32", 0, 4)
    assert values is not None and values.tolist() == [0.0 if background else 1.0] * 4


def test_later_steps_do_not_change_the_state_that_is_saved(gate: Gate, tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 1, "watch": {"in_a_row": [2]}}
    found = writer(tmp_path)
    found.save(ENGINE, state)
    state["watch"]["in_a_row"][0] = 3
    gate.opened.set()
    found.finish()
    assert read(tmp_path).state["watch"] == {"in_a_row": [2]}


def test_the_copy_is_given_back_when_it_is_written(gate: Gate, tmp_path: Path) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    part = found._pending.part  # type: ignore[union-attr]
    assert part.daemon  # an interpreter that ends does not wait for it
    copied = weakref.ref(part._tensors["w|fp32@0"])
    gate.opened.set()
    found.finish()
    assert copied() is None


# --- what is written ------------------------------------------------------------------------------------


def test_extra_tensors_and_the_ranks_own_shares_are_written_beside_the_engines(tmp_path: Path) -> None:
    found = writer(tmp_path)
    extra = {"mean": torch.tensor([1.0, 2.0, 3.0])}
    found.save(ENGINE, {"step": 1, "seen": 8}, extra=extra, shares={"log|rows@0": torch.tensor([5.0])})
    found.finish()
    checkpoint = read(tmp_path)
    mean, rows = checkpoint.extra("mean"), checkpoint.tensors.values("log", "rows", 0, 1)
    assert mean is not None and mean.tolist() == [1.0, 2.0, 3.0]
    assert rows is not None and rows.tolist() == [5.0]
    weights = checkpoint.tensors.values("w", "fp32", 0, 4)
    assert weights is not None and torch.equal(weights, WEIGHTS)
    assert checkpoint.extra("other") is None
    assert checkpoint.state["seen"] == 8 and checkpoint.state["engine"] == {"shapes": {"w": [4]}}
    assert len(checkpoint.state["rng"]) == 1


def test_the_ranks_share_out_the_extra_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"five": torch.arange(5.0), "one": torch.tensor([9.0])}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append({name: part.tolist() for name, part in saving._shares(tensors).items()})
    assert shares == [  # halves of 5 and of 1, rounded down; an empty half is left out
        {"five|extra@0": [0.0, 1.0]},
        {"five|extra@2": [2.0, 3.0, 4.0], "one|extra@0": [9.0]},
    ]


def test_a_part_is_named_by_its_rank_among_all(tmp_path: Path) -> None:
    writer(tmp_path, background=False).save(ENGINE, {"step": 1})
    names = [path.name for path in (tmp_path / "checkpoints" / "step-1" / "tensors").iterdir()]
    assert names == ["00000-of-00001.safetensors"]
    assert saving._part_name(2, 16) == "00002-of-00016.safetensors"


def test_a_part_makes_the_folders_that_do_not_show_on_its_node(tmp_path: Path) -> None:
    (tmp_path / "tensors").mkdir()  # this one does
    part = saving._Part(tmp_path, "x", {"w|fp32@0": WEIGHTS}, {"seed": 1})
    part.run()
    assert part.problem is None
    record = json.loads((tmp_path / "records" / "x.json").read_text())
    assert record["file"] == "x" and record["rng"] == {"seed": 1}
    assert record["written"]["size"] == (tmp_path / "tensors" / "x").stat().st_size


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        writer(tmp_path, background=False).save(ENGINE, {"step": 1, "loss": float("nan")})
    assert newest(tmp_path, print) is None


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []
    folder = tmp_path / "checkpoints"

    def sync(path: Path) -> None:
        synced.append((str(path.relative_to(folder)), steps(tmp_path)))

    monkeypatch.setattr(saving, "sync_folder", sync)
    writer(tmp_path, background=False).save(ENGINE, {"step": 1})
    assert synced == [
        (".step-1.new/tensors", [".step-1.new"]),
        (".step-1.new", [".step-1.new"]),
        (".", ["step-1"]),  # and its name, before `latest` points to it
    ]
    assert steps(tmp_path) == ["latest", "step-1"]
    assert sorted(path.name for path in (folder / "step-1").iterdir()) == [
        "manifest.json", "state.json", "tensors",
    ]  # fmt: skip


def test_what_killed_runs_left_goes_when_the_next_checkpoint_starts(gate: Gate, tmp_path: Path) -> None:
    for name in (".step-1.new/tensors", ".step-2.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 5})
    assert steps(tmp_path) == [".step-5.new"]
    gate.opened.set()
    found.finish()


def test_a_step_taken_again_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        writer(tmp_path, background=False).save(ENGINE, {"step": 4, "try": number})
    assert read(tmp_path).state["try"] == 2 and steps(tmp_path) == ["latest", "step-4"]
    found = writer(tmp_path)  # killed after it had set the old one aside: that is not in the way
    found.save(ENGINE, {"step": 4, "try": 3})
    (tmp_path / "checkpoints" / ".step-4.old" / "tensors").mkdir(parents=True)
    found.finish()
    assert read(tmp_path).state["try"] == 3 and steps(tmp_path) == ["latest", "step-4"]


# --- what stays -----------------------------------------------------------------------------------------


def test_as_many_stay_as_asked_for_and_those_that_are_kept(tmp_path: Path) -> None:
    found = writer(tmp_path, keep=1, background=False)
    for step, kept in [(1, ()), (2, (1,)), (3, (1,)), (10, (3,))]:
        found.save(ENGINE, {"step": step}, kept)
    assert steps(tmp_path) == ["latest", "step-10", "step-3"]


def test_a_checkpoint_that_is_being_removed_has_no_name_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed inside, it would be a damaged one, which `rcpo evaluate eval.checkpoints=all` refuses."""
    found = writer(tmp_path, keep=1, background=False)
    found.save(ENGINE, {"step": 1})
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: Path, **settings: Any) -> None:
        if path.is_dir() and "step-1" in path.name:
            seen.append(steps(tmp_path))
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", watched)
    found.save(ENGINE, {"step": 2})
    assert seen == [[".step-1.old", "latest", "step-2"]] and steps(tmp_path) == ["latest", "step-2"]


def test_a_damaged_checkpoint_is_not_kept_for_its_step(tmp_path: Path) -> None:
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step}.damaged").mkdir(parents=True)
    found = writer(tmp_path, keep=2, background=False)
    found.save(ENGINE, {"step": 4}, kept=(2,))
    assert steps(tmp_path) == ["latest", "step-3.damaged", "step-4"]  # the newer one has the place left
    found.save(ENGINE, {"step": 5}, kept=(3,))
    assert steps(tmp_path) == ["latest", "step-4", "step-5"]


# --- what fails -----------------------------------------------------------------------------------------


def test_a_part_that_cannot_be_written_is_reported_and_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    found.finish()
    monkeypatch.setattr(saving, "write_tensors", fails)
    found.save(ENGINE, {"step": 2})
    with pytest.raises(RunError) as failure:
        found.finish()
    place = tmp_path / "checkpoints" / "step-2"
    assert str(failure.value) == (
        f"the checkpoint {place} could not be written: No space left on device; earlier ones are intact"
    )
    assert not found.pending and steps(tmp_path) == ["latest", "step-1"]
    monkeypatch.setattr(saving, "write_tensors", write_tensors)
    found.save(ENGINE, {"step": 3})  # and the run may go on
    found.finish()
    assert read(tmp_path).step == 3


def test_a_problem_of_any_rank_is_everyones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, "Disk quota exceeded", "Other"])
    with pytest.raises(RunError, match="Disk quota exceeded;"):
        found.finish()


@pytest.mark.parametrize("main", [True, False])
def test_only_rank_0_works_on_the_folder(main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: own or "told by rank 0")
    with pytest.raises(RunError, match="told by rank 0"):
        writer(tmp_path).save(ENGINE, {"step": 1})
    assert (tmp_path / "checkpoints").exists() is main


def test_rank_0_alone_clears_away_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = writer(tmp_path)
    monkeypatch.setattr(saving, "write_tensors", fails)
    found.save(ENGINE, {"step": 1})
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(RunError, match="No space left"):
        found.finish()
    assert steps(tmp_path) == [".step-1.new"] and not found.pending


@pytest.mark.parametrize(
    "missing", ["records/00000-of-00001.safetensors.json", "tensors/00000-of-00001.safetensors"]
)
def test_a_part_that_does_not_show_here_asks_for_a_shared_folder(missing: str, tmp_path: Path) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    found._pending.part.join()  # type: ignore[union-attr]
    (tmp_path / "checkpoints" / ".step-1.new" / missing).unlink()
    with pytest.raises(RunError, match=r"00000-of-00001.safetensors of another process is not there: share"):
        found.finish()


# --- after a failure elsewhere ---------------------------------------------------------------------------


def test_a_pending_checkpoint_is_rescued(
    gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rcpo")
    found, idle = writer(tmp_path / "run"), writer(tmp_path / "idle")
    found.save(ENGINE, {"step": 6})
    threading.Timer(0.2, gate.opened.set).start()
    rescue_all()  # waits for the writer
    assert not found.pending and not idle.pending and steps(tmp_path / "run") == ["latest", "step-6"]
    assert not (tmp_path / "idle").exists()
    assert [r.getMessage() for r in caplog.records if "failure" in r.getMessage()] == [
        "the checkpoint of step 6 was finished after the failure"
    ]
    found.finish()  # and it is not taken a second time


def test_the_other_ranks_leave_the_rescue_to_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    found.rescue()
    assert not found._pending.part.is_alive()  # type: ignore[union-attr]
    assert steps(tmp_path) == [".step-1.new"]


def test_a_part_that_failed_is_not_rescued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "write_tensors", fails)
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    found.rescue()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line == "the checkpoint of step 1 could not be finished: No space left on device"
    assert steps(tmp_path) == [".step-1.new"]


@pytest.mark.parametrize(("grows_until", "ends"), [(0.0, 20.0), (30.0, 50.0)])
def test_a_rescue_waits_twenty_seconds_for_a_part_that_does_not_grow(
    grows_until: float,
    ends: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    found._pending.part.join()  # type: ignore[union-attr]
    now, other = 0.0, tmp_path / "checkpoints" / ".step-1.new" / "tensors" / "00001-of-00002.safetensors"

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds <= 0.5  # it looks often
        now += seconds
        if now <= grows_until:
            with other.open("ab") as file:
                file.write(b"x")

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    monkeypatch.setattr(saving.time, "sleep", sleep)
    found.rescue()
    assert ends - 0.3 <= now <= ends + 0.3
    assert caplog.messages[-1] == "the checkpoint of step 1 could not be finished: a rank's part is missing"


def test_a_rescue_takes_the_other_ranks_part_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = writer(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: own)
    found.save(ENGINE, {"step": 1})
    other = saving._Part(
        tmp_path / "checkpoints" / ".step-1.new", "00001-of-00002.safetensors", {}, {"rank": 1}
    )
    threading.Timer(0.2, other.run).start()
    found.rescue()
    state = json.loads((tmp_path / "checkpoints" / "step-1" / "state.json").read_text())
    assert len(state["rng"]) == 2 and state["rng"][1] == {"rank": 1}
    names = sorted(path.name for path in (tmp_path / "checkpoints" / "step-1" / "tensors").iterdir())
    assert names == ["00000-of-00002.safetensors", "00001-of-00002.safetensors"]


def test_a_checkpoint_that_two_threads_finish_is_moved_once(tmp_path: Path) -> None:
    found = writer(tmp_path)
    found.save(ENGINE, {"step": 1})
    pending = found._pending
    assert pending is not None
    pending.part.join()
    found._move(pending)
    found._move(pending)  # the second has nothing left to move, and does not fail
    assert not found.pending and steps(tmp_path) == ["latest", "step-1"]


def test_a_block_ends_with_its_checkpoint_finished(gate: Gate, tmp_path: Path) -> None:
    found = writer(tmp_path)
    threading.Timer(0.2, gate.opened.set).start()
    with found.finishing():
        found.save(ENGINE, {"step": 1})
    assert not found.pending and steps(tmp_path) == ["latest", "step-1"]


def test_a_block_that_fails_ends_with_its_checkpoint_rescued(gate: Gate, tmp_path: Path) -> None:
    found = writer(tmp_path)
    threading.Timer(0.2, gate.opened.set).start()
    with pytest.raises(KeyboardInterrupt), found.finishing():
        found.save(ENGINE, {"step": 1})
        raise KeyboardInterrupt
    assert not found.pending and steps(tmp_path) == ["latest", "step-1"]
