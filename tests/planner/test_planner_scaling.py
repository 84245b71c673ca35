"""A thousand ranks: an epoch's shares, simulated, and what grows with their number."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import forked
import pytest

from rcpo.config.schema import RunConfig
from rcpo.data.batches import FILLER
from rcpo.planner.communication import own_messages
from rcpo.system import distributed

RANKS = 1024
WORKER = Path(__file__).parents[1] / "workers" / "thousand_ranks.py"


@pytest.mark.slow
def test_a_thousand_ranks_share_an_epoch_without_holes_or_repeats(tmp_path: Path) -> None:
    # a whole batch, two pairs a rank, and a short one, which fillers even out
    examples, output = 2 * RANKS + 700, tmp_path / "shares.json"
    command = [sys.executable, str(WORKER), str(RANKS), str(examples), str(output)]
    ended = forked.run(command)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(output.read_text())
    seen: Counter[int] = Counter()
    for steps in found["shares"]:
        # every rank takes part in every collective
        assert [[len(piece) for piece in micro] for micro in steps] == [[1, 1], [1]]
        seen.update(position for micro in steps for piece in micro for position in piece)
    assert len(found["shares"]) == RANKS and seen.pop(FILLER) == RANKS - 700
    assert sorted(seen) == list(range(examples)) and set(seen.values()) == {1}
    # seconds of one core; 2.0 and 0.0004 were measured
    assert found["start"] < 30 and found["step"] < 0.01


def test_calibration_takes_the_same_bytes_for_any_batch_length_and_vocabulary() -> None:
    config = RunConfig()
    # Llama 3 8B: both sides of 2,048 buckets by 4,096 hidden, eight numbers in three words, all in fp32
    expected = 4 * (2 * 2048 * 4096 + 3 * 8)
    for batch, micro in ((1, 1), (4096, 8)):
        config.train.batch_size, config.train.micro_batch_size = batch, micro
        sizes = {m.purpose: m.size * m.count for m in own_messages(config, 2 * 2048 * 4096, batch // micro)}
        assert sizes["calibration"] == expected == 67_108_960
        assert sizes["metrics"] < 1000 and sizes["peak memory"] == 8


def test_what_a_rank_adds_to_a_checkpoints_state_is_small() -> None:
    # gathered from all ranks: at 1,024 of them some 22 MB, whatever the model
    assert len(str(distributed.rng_state())) < 25_000
