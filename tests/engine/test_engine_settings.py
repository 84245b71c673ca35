"""DeepSpeed's configuration, made of rcpo's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rcpo.config.schema import RunConfig
from rcpo.engine.pieces import longest_vector
from rcpo.engine.settings import deepspeed_config, refuse_deepspeed_settings
from rcpo.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"train_batch_size": 8}, r"engine.deepspeed.train_batch_size is set by rcpo; use train.batch_size"),
        ({"bf16": {"enabled": True}}, "use train.dtype"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is set by rcpo; use engine=zero0"),
        ({"zero_optimization": {"offload_param": {}}}, "use engine.offload_parameters"),
        ({"zero_optimization": 3}, "it holds keys, not a value"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size"),
    ],
)
def test_deepspeed_settings_that_rcpo_owns_or_deepspeed_refuses_are_refused(
    given: dict[str, Any], reason: str
) -> None:
    config = RunConfig()
    config.engine.deepspeed = given
    with pytest.raises(ConfigError, match=reason) as error:
        refuse_deepspeed_settings(config)
    assert "\n" not in str(error.value)


def test_other_deepspeed_settings_pass_through_beside_those_of_rcpo() -> None:
    config = RunConfig()
    config.engine.stage = 3
    config.engine.deepspeed = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000},
        "comms_logger": {"enabled": True},
    }
    refuse_deepspeed_settings(config)
    settings = deepspeed_config(config, training=True)
    assert settings["comms_logger"] == {"enabled": True}
    assert settings["zero_optimization"].items() >= {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000
    }.items()  # fmt: skip


def test_under_zero_3_norms_and_biases_stay_whole_and_matrices_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    assert longest_vector(model) == 6  # below 8 · 6 and 6 · 2
