"""What the planner says against DeepSpeed's own tensors, its communication log, and a process's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from footprints import Changes, footprints, middling, nothing

STAGES: list[Changes] = [{"engine.stage": stage} for stage in range(4)]
HALF: list[Changes] = [{"engine.stage": stage, "train.dtype": "bf16"} for stage in range(4)]
ADAPTERS: Changes = {"engine.stage": 3, "adapter.name": "lora"}
# only a few of the model's weights may be whole at a time, and each is needed three times
CRAMPED: Changes = {
    "engine.stage": 3,
    "train.gradient_checkpointing": True,
    "zero.stage3_max_live_parameters": 9000,
    "zero.stage3_prefetch_bucket_size": 2000,
    "zero.stage3_max_reuse_distance": 4000,
}
GROUPS = {1: [*STAGES, HALF[0]], 2: [*STAGES, *HALF, CRAMPED, ADAPTERS], 4: STAGES}


def two_micro_batches(changes: Changes, ranks: int) -> Changes:
    return {**changes, "train.batch_size": 2 * ranks, "train.micro_batch_size": 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tensors_and_messages_are_deepspeeds_to_the_byte(tmp_path: Path) -> None:
    groups = {ranks: [two_micro_batches(each, ranks) for each in GROUPS[ranks]] for ranks in GROUPS}
    seen = 0
    for each in footprints(tmp_path, nothing(tmp_path / "model"), groups):
        where = each.changes, each.ranks, each.rank
        assert each.states == each.measured["before_step"], where
        assert each.messages == each.measured["communication"], where
        if each.ranks > 1:
            assert each.own_messages == each.measured["own"], where
        seen += 1
    assert seen == 5 + 2 * 10 + 4 * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_peak_memory_within_a_tenth(tmp_path: Path) -> None:
    # every stage on 1, 2 and 4 processes: python tests/footprints.py
    path, small = middling(tmp_path / "model"), nothing(tmp_path / "small")
    sizes = {"train.batch_size": 4, "train.micro_batch_size": 2}
    stages: list[Changes] = [{"engine.stage": stage, **sizes} for stage in (2, 3)]
    for each in footprints(tmp_path, path, {1: stages}, small):
        assert each.peak > 2e8  # so that a few MB of the interpreter's do not matter
        assert each.peak == pytest.approx(each.measured_peak, rel=0.1), each.changes
