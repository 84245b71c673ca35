"""What is refused before the run, though torch has to be asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import tiny_llama

from rcpo.config import AdapterConfig, ConfigError, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from rcpo.launch import check


def test_what_needs_torch_to_be_seen_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="12 process"):
        check(RunConfig(train=TrainConfig(batch_size=32, micro_batch_size=1)), world_size=12)
    unknown = RunConfig(objective=ObjectiveConfig(name="dpo", hyperparameters={"bta": 1.0}))
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        check(unknown, world_size=1)


def test_packages_of_extras_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    qlora = RunConfig(adapter=AdapterConfig(name="lora", quantization="nf4"))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*: pip install 'rcpo\[qlora\]'"):
        check(qlora, world_size=1)
    if found("flash_attn") is None:
        with pytest.raises(ConfigError, match="pip install 'flash-attn'"):
            check(RunConfig(model=ModelConfig(attention="flash_attention_2")), world_size=1)


def test_models_adapters_and_references_are_looked_at(tmp_path: Path) -> None:
    model = Path(tiny_llama(tmp_path / "model"))
    config = RunConfig(model=ModelConfig(name="local", path=str(model)))
    check(config, world_size=1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(tmp_path / "gone" / "far" / "away")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config.adapter = AdapterConfig(name="lora", path=str(adapter))
    with pytest.raises(
        ConfigError, match=r"adapter\.path=.* holds no weights \(adapter_model\.safetensors\)"
    ):
        check(config, world_size=1)
    (adapter / "adapter_model.safetensors").touch()
    check(config, world_size=1)
    config.reference.path = str(adapter)
    with pytest.raises(ConfigError, match=r"the base model of reference\.path=.*gone/far/away"):
        check(config, world_size=1)
    settings["base_model_name_or_path"] = str(model)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    check(config, world_size=1)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path=.* holds no weights"):
        check(config, world_size=1)
    config.model.init, config.adapter, config.reference.path = "random", AdapterConfig(), None
    check(config, world_size=1)
