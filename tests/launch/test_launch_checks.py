"""What is refused before the run, though torch has to be asked."""

from __future__ import annotations

import pytest

from rcpo.config import ConfigError, ObjectiveConfig, RunConfig, TrainConfig
from rcpo.launch import check


def test_what_needs_torch_to_be_seen_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="12 process"):
        check(RunConfig(train=TrainConfig(batch_size=32, micro_batch_size=1)), world_size=12)
    unknown = RunConfig(objective=ObjectiveConfig(name="dpo", hyperparameters={"bta": 1.0}))
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        check(unknown, world_size=1)
