"""What rcpo has to know of DeepSpeed's inside."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import deepspeed
import pytest
import torch
from tiny import tiny_llama

from rcpo.config.schema import RunConfig
from rcpo.engine import backend
from rcpo.engine.backend import exact_ranges, refuse_older_deepspeed
from rcpo.engine.load import read_model
from rcpo.errors import ConfigError
from rcpo.models.hub import ModelSource
from rcpo.system import distributed


def test_ranges_keep_their_dtype_while_zero_3_splits_a_model() -> None:
    distributed.initialize()
    with (
        exact_ranges(),
        deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1}, dtype=torch.bfloat16),
    ):
        frequencies, weights = torch.arange(3, dtype=torch.float32) / 3, torch.ones(3)
    assert frequencies.tolist() == pytest.approx([0.0, 1 / 3, 2 / 3], rel=1e-7)  # 0.334 in bf16
    assert weights.dtype == torch.bfloat16


def test_rotary_frequencies_are_the_same_with_and_without_zero_3(tmp_path: Path) -> None:
    distributed.initialize()
    config = RunConfig()
    config.train.dtype, source = "bf16", ModelSource(Path(tiny_llama(tmp_path / "model")))
    found = []
    for stage in (0, 3):
        config.engine.stage = stage
        found.append(dict(read_model(source, config).named_buffers())["model.rotary_emb.inv_freq"])
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("version", "refused"), [("0.19.7", True), ("0.19.8", False), ("0.19.8+cu130", False)]
)
def test_a_deepspeed_that_adds_up_gradients_in_bf16_is_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    remedy = r"DeepSpeed 0\.19\.7 .*pip install deepspeed==0\.19\.8"
    with pytest.raises(ConfigError, match=remedy) if refused else nullcontext():
        refuse_older_deepspeed()


def test_another_version_of_deepspeed_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(backend.PartitionedParameterCoordinator, "_clear_trace_structures")
    lacking = "has no PartitionedParameterCoordinator._clear_trace_structures"
    with pytest.raises(ConfigError, match=f"{lacking}.*pip install deepspeed=="):
        backend.forget_releases_with_order()

    class Stage3:
        optimizer = object()
        zero_optimization_partition_weights = staticmethod(lambda: True)
        fp16_enabled = staticmethod(lambda: False)
        _zero3_consolidated_16bit_state_dict = None

    with pytest.raises(ConfigError, match=r"has no object.grad_position, which rcpo needs for checkpoints"):
        backend.check_internals(Stage3(), training=True)
