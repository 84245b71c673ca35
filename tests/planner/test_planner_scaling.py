"""A thousand ranks, simulated: process groups whose collectives do nothing, one rank at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from rcpo import distributed
from rcpo.config import RunConfig
from rcpo.data.batches import FILLER
from rcpo.planner.communication import own_messages
from rcpo.session import Session

RANKS = 1024


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def configuration() -> RunConfig:
    config = RunConfig()
    config.engine.stage = 2
    # an epoch of a whole batch, two pairs a rank, and of a short one, which fillers even out
    config.train.batch_size, config.train.micro_batch_size, config.train.epochs = 2 * RANKS, 1, 1
    config.train.max_steps, config.data.train_examples = None, 2 * RANKS + 700
    return config


@pytest.mark.slow
@pytest.mark.serial
def test_a_thousand_ranks_share_an_epoch_without_holes_or_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not dist.is_initialized()
    monkeypatch.setenv("LOCAL_RANK", "0")
    began = time.process_time()
    with as_rank(0):
        session = Session(configuration(), tmp_path, training=True)
    started = time.process_time() - began
    seen: Counter[int] = Counter()
    pieces = set()
    for rank in range(RANKS):
        with as_rank(rank):
            for step in range(session.total_steps):
                micro = session.rank_microbatches(step)
                pieces.add((step, len(micro), *{len(piece) for piece in micro}))
                seen.update(position for piece in micro for position in piece)
    dealt = (time.process_time() - began - started) / RANKS
    fillers = seen.pop(FILLER)
    assert sorted(seen) == list(range(2 * RANKS + 700)) and set(seen.values()) == {1}
    assert fillers == RANKS - 700  # the short step has one pair a rank
    assert pieces == {(0, 2, 1), (1, 1, 1)}  # every rank takes part in every collective
    # seconds of one core: the start, and an epoch's two steps dealt; 2.0 and 0.0007 were measured
    assert started < 30 and dealt < 0.02


def test_calibration_takes_the_same_bytes_for_any_batch_length_and_vocabulary() -> None:
    config = configuration()
    # Llama 3 8B: both sides of 2,048 buckets by 4,096 hidden, four sums in three words, all in fp32
    expected = 4 * (2 * 2048 * 4096 + 12)
    for batch, micro in ((1, 1), (4096, 8)):
        config.train.batch_size, config.train.micro_batch_size = batch, micro
        sizes = {m.purpose: m.size * m.count for m in own_messages(config, 2 * 2048 * 4096, batch // micro)}
        assert sizes["calibration"] == expected == 67_108_912
        assert sizes["metrics"] < 1000 and sizes["peak memory"] == 4


def test_what_a_rank_adds_to_a_checkpoints_state_is_small() -> None:
    # gathered from all ranks: at 1,024 of them some 22 MB, whatever the model
    assert len(str(distributed.rng_state())) < 25_000
