"""Shapes that are shipped against the numbers of parameters that their authors publish."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_llama

from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.planner.model import architecture, names, parameters

PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "pythia-410m": 405_334_016,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


def test_every_shipped_architecture_is_checked() -> None:
    assert set(names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    config = RunConfig()
    assert sum(p.numel for p in parameters(architecture(config, name), config)) == PUBLISHED[name]


def test_adapters_are_trained_alone() -> None:
    config = RunConfig()
    config.adapter.name = "lora"
    found = parameters(architecture(config, "llama-3-8b"), config)
    # rank 8 on q, k, v, o, gate, up and down of 32 layers
    layer = 8 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    assert sum(p.numel for p in found if p.trained) == 32 * layer
    assert sum(p.numel for p in found if not p.trained) == PUBLISHED["llama-3-8b"]
    config.adapter.quantization = "nf4"
    with pytest.raises(ConfigError, match="upper bound"):
        parameters(architecture(config, "llama-3-8b"), config)


def test_where_shapes_come_from(tmp_path: Path) -> None:
    config = RunConfig()
    assert architecture(config, None).hidden_size == 128  # the packaged model
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    assert architecture(config, None).hidden_size == 32
    assert architecture(config, str(tmp_path / "model" / "config.json")).hidden_size == 32
    config.model.name, config.model.path = "llama-3-8b", "meta-llama/Meta-Llama-3-8B"
    assert architecture(config, None).hidden_size == 4096  # not fetched: its preset's shapes are shipped
    with pytest.raises(ConfigError, match=r"did you mean llama-3-70b\?"):
        architecture(config, "llama-3-70")
    config.model.name, config.model.path = "local", "nobody/nothing"
    with pytest.raises(ConfigError, match=r"plan\.architecture="):
        architecture(config, None)
