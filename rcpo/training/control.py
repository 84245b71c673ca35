"""Held-out pairs that the closed loop reads where the pairs of a step are not fresh.

Training pairs are fresh in the first epoch alone, and only a reference that is the starting policy gives
their log-ratios for nothing. Otherwise pairs are set aside from the training data, all pairs of a prompt
together; the starting policy scores them once, and the policy scores a part of them every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rcpo.config.schema import RunConfig
from rcpo.data.dataset import Datasets
from rcpo.data.selection import split_prompts
from rcpo.data.store import PairDataset
from rcpo.engine.zero import Engine
from rcpo.errors import ConfigError
from rcpo.method.band import Movement
from rcpo.method.logps import sequence_logps
from rcpo.method.types import TokenBatch
from rcpo.system import distributed

BatchesAt = Callable[[PairDataset, np.ndarray], Iterator[TokenBatch]]

LARGEST_SHARE = 0.1  # of the training data that is set aside
FEWEST = 8


def has_fresh_signals(config: RunConfig, *, compared: bool) -> bool:
    """Whether log-ratios of training pairs are taken against the starting policy anyway.

    `compared` says whether training pairs are compared with a reference at all.
    """
    starts = config.reference.path is None and not config.reference.sync_every  # and stays there
    return compared and starts and config.rc.signal != "control"


def needs_control(config: RunConfig, fresh: bool, examples: int) -> bool:
    """Whether a run over `examples` has steps without fresh pairs, `fresh` being `has_fresh_signals`.

    Raises ConfigError where `rc.signal=fresh` cannot be had.
    """
    rc, train = config.rc, config.train
    if not rc.loops:
        return False
    steps = train.max_steps or train.epochs * -(-examples // train.batch_size)
    if fresh and steps <= -(-examples // train.batch_size):
        return False
    if rc.signal == "fresh" and not fresh:
        raise ConfigError(
            "rc.signal=fresh reads the log-ratios of training pairs against the starting policy, which this "
            "run does not have: choose rc.signal=auto, or reference.track=true without reference.path and "
            "reference.sync_every"
        )
    return rc.signal != "fresh"


def set_aside(datasets: Datasets, config: RunConfig) -> Datasets:
    """The datasets with `rc.control.pairs` training pairs, at most about a tenth, as `control`.

    All pairs of a prompt are on one side. Raises ConfigError where a tenth is fewer than eight, or all pairs
    have one prompt.
    """
    train = datasets.train
    wanted = min(config.rc.control.pairs, int(LARGEST_SHARE * len(train)))
    reason = None
    if wanted < FEWEST:
        reason = f"a tenth of {len(train)} training pairs is fewer than {FEWEST}"
    elif (train.prompts == train.prompts[0]).all():
        reason = f"all {len(train)} training pairs have one prompt, which is trained on"
    if reason is not None:
        raise ConfigError(
            f"rc=loop reads held-out pairs where training pairs are not fresh, and {reason}: give more data, "
            "or keep the pairs fresh with one epoch and the start as reference (an objective that has one or "
            "reference.track=true, without reference.path and reference.sync_every)"
        )
    rows, control = split_prompts(train.prompts, wanted / len(train), config.seed)
    found = replace(datasets, train=train.take(rows), control=train.take(control))
    datasets.report.train, datasets.report.control = len(rows), len(control)
    return found


class ControlPairs:
    """Reads how far control pairs have moved; made while the policy has its starting weights. Collective.

    `batches_at` gives this rank's share of the examples at some places of a dataset.
    """

    def __init__(self, config: RunConfig, engine: Engine, pairs: PairDataset, batches_at: BatchesAt) -> None:
        self._engine = engine
        self._pairs = pairs
        self._batches_at = batches_at
        self._at_once = min(len(pairs), max(FEWEST, config.train.batch_size // 2))
        self._every = config.rc.control.every
        self._start = self._token_means(np.arange(len(pairs)))

    def reading(self, step: int) -> Movement | None:
        """The movement at a step, counted from 0, before its update; None where no reading is due."""
        if step == 0 or step % self._every:
            return None
        number = step // self._every - 1
        places = (number * self._at_once + np.arange(self._at_once)) % len(self._pairs)
        moved = self._token_means(places) - self._start
        winner, loser = moved[:, places].nanmean(1).tolist()
        return Movement(winner, loser, self._every)

    def _token_means(self, places: np.ndarray) -> Tensor:
        """Mean log-probs per token (2, n) of the pairs at `places`, NaN elsewhere; equal on all ranks."""
        sums = torch.zeros(2, 2, len(self._pairs), dtype=torch.float64, device=self._engine.device)
        self._engine.eval()
        for batch in self._batches_at(self._pairs, places):
            with torch.no_grad():
                logps = self._engine.forward(batch)[0]
            lengths = batch.lengths.view(len(batch.sides), -1)[:2].double()
            totals = sequence_logps(logps, torch.ones_like(logps), batch.sequences, len(batch.lengths))
            means = totals.view(len(batch.sides), -1)[:2] / lengths.clamp(min=1)
            found = batch.of_real(torch.stack([means, lengths > 0]))
            sums.index_copy_(2, batch.of_real(batch.indices), found)
        total = distributed.reduce_sum(sums)
        return total[0] / total[1]
