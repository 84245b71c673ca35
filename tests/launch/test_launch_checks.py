"""What is refused before the run, though torch has to be asked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_llama

from rcpo.config.schema import (
    AdapterConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from rcpo.errors import ConfigError
from rcpo.launch import local
from rcpo.launch.checks import _check_accelerator, check
from rcpo.launch.local import run_command


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
    with pytest.raises(ConfigError, match=r"optim=adamw_8bit needs bitsandbytes.*'rcpo\[qlora\]'"):
        check(RunConfig(optim=OptimConfig(name="adamw_8bit")), world_size=1)
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
    save_file({"weight": torch.zeros(1)}, adapter / "adapter_model.safetensors")
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


@pytest.mark.parametrize(("given", "gpu", "ok"), [
    ("cuda", False, False), ("cpu", False, True), ("", False, True), ("xpu", False, False),
    ("cpu", True, False), ("cuda", True, True),
])  # fmt: skip
def test_deepspeed_s_accelerator_is_the_one_that_torch_computes_on(
    given: str, gpu: bool, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", given)
    if ok:
        _check_accelerator(gpu)
        return
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR={given}, and torch sees .*: unset DS_ACCELERATOR"):
        _check_accelerator(gpu)


def test_a_module_of_the_user_s_is_found_and_shadows_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "objective_of_mine.py").write_text(
        "from rcpo.method.objectives import register\n\n\n"
        "@register('of_mine', reduction='mean', needs_reference=False)\n"
        "def own(logps):\n    return logps.chosen - logps.rejected\n"
    )
    config = RunConfig(
        objective=ObjectiveConfig(name="of_mine", module="objective_of_mine", hyperparameters={})
    )
    check(config, world_size=1)
    sys.modules.pop("colorsys", None)
    assert Path(str(importlib.import_module("colorsys").__file__)).parent != tmp_path


def test_local_processes_import_nothing_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(local.__file__).parents[2])}
    command = run_command(tmp_path / "run")
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # it comes as far as the folder, which holds no configuration
    assert found.returncode == 2 and "shadowed" not in found.stderr
    assert "config.yaml does not exist" in found.stderr
