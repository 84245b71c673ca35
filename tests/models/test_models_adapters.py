"""Adapters on a small model: their start, their reference, saving, merging, four bits; refusals."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sessions import heldout_logratios
from tiny import held_out, sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig, LlamaForCausalLM

from rcpo.config.model import check_folder, holds_adapter
from rcpo.config.schema import AdapterConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.models.adapters import add_adapter, merge_adapter, read_adapter, starting_adapters, target_names
from rcpo.models.loading import load_model
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

WORKER = str(Path(__file__).parents[1] / "workers" / "adapter_ranks.py")
NO_BITS = "bitsandbytes is not installed: pip install 'rcpo[qlora]'"
IDS = torch.arange(4, 16)[None]


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_llama(tmp_path_factory.mktemp("base")))


@pytest.fixture
def config(tmp_path: Path, base: Path) -> RunConfig:
    pairs = sums_file(tmp_path / "pairs.jsonl", 24)
    config = RunConfig(adapter=AdapterConfig(name="lora"))
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", str(base)
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, held_out(pairs)
    config.train.batch_size, config.train.micro_batch_size, config.optim.lr = 8, 4, 1e-2
    config.reference.cache = str(tmp_path / "cache")
    config.rc.enabled = True
    return config


def trained(config: RunConfig, folder: Path, steps: int = 3) -> tuple[Session, list[dict[str, Any]]]:
    """A session after some steps, its weights in folder/final, and its rows."""
    folder.mkdir(exist_ok=True)
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    rows = [trainer.train_step() for _ in range(steps)]
    trainer.save_final()
    return session, rows


def finished(config: RunConfig, folder: Path) -> Session:
    session = Session(config, folder, training=False, final=folder / "final")
    session.prepare_reference()
    return session


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return adapter_of(base, tmp_path_factory.mktemp("tuned"))


def adapter_of(base: Path, folder: Path) -> Path:
    """An adapter that an earlier stage trained."""
    config = RunConfig(adapter=AdapterConfig(name="lora", r=4, alpha=4))
    config.model.path, config.data.name = str(base), "pairs"
    config.data.path = sums_file(folder / "pairs.jsonl", 24)
    config.data.eval_path = held_out(config.data.path)
    config.train.batch_size, config.train.micro_batch_size, config.optim.lr = 8, 4, 3e-2
    config.reference.cache = "off"
    trained(config, folder)
    return folder / "final"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


DYNAMICS = [f"dynamics/{name}" for name in ("score_norm_chosen", "score_norm_rejected", "score_cosine",
                                            "incentive_chosen", "incentive_ratio")]  # fmt: skip


def test_the_first_step_is_that_of_the_whole_model(config: RunConfig, tmp_path: Path) -> None:
    _, adapted = trained(config, tmp_path / "adapted", steps=2)
    config.adapter.name = "none"
    _, whole = trained(config, tmp_path / "whole", steps=2)
    for name in (*DYNAMICS, "loss", "logps/chosen", "logratios/rejected"):
        assert adapted[0][name] == pytest.approx(whole[0][name], rel=1e-6, abs=1e-7), name
    assert adapted[1]["rc/alpha"] == pytest.approx(whole[1]["rc/alpha"], rel=1e-6)
    assert adapted[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert abs(adapted[1]["loss"] - whole[1]["loss"]) > 1e-4  # then they learn differently


def test_only_adapters_are_trained_on_every_linear_layer_but_the_head(
    config: RunConfig, tmp_path: Path, base: Path
) -> None:
    session, _ = trained(config, tmp_path / "run")
    before = load_file(base / "model.safetensors")
    after = session.engine.policy.model.state_dict()
    for name, value in before.items():
        kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None and torch.equal(kept, value), name
    saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * 2 and all(value.any() for value in saved.values())
    assert not any("lm_head" in name or "embed" in name for name in saved)


def test_targets_are_chosen_by_name(config: RunConfig, tmp_path: Path) -> None:
    config.adapter.target_modules = ["q_proj", "v_proj"]
    trained(config, tmp_path / "run", steps=1)
    saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}
    config.adapter.target_modules = ["nowhere"]
    with pytest.raises(ConfigError, match=r"adapter\.target_modules=\['nowhere'\]"):
        Session(config, tmp_path, training=True)


@pytest.mark.parametrize("start", ["fresh", "tuned", "merged"])
@pytest.mark.parametrize("mode", ["precompute", "model"])
def test_the_reference_is_the_start_and_no_second_model(
    config: RunConfig, tmp_path: Path, tuned: Path, start: str, mode: str
) -> None:
    config.reference.mode = mode
    if start != "fresh":
        config.adapter.path, config.adapter.merge = str(tuned), start == "merged"
    folder = tmp_path / "run"
    session, rows = trained(config, folder)
    assert rows[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-6)
    after = heldout_logratios(session)
    assert np.abs(after).max() > 1e-2
    # by hand: what transformers makes of final/, against what it makes of the start
    own = AutoModelForCausalLM.from_pretrained(folder / "final")
    first = AutoModelForCausalLM.from_pretrained(config.model.path)
    if start != "fresh":
        first.load_adapter(str(tuned))
    assert session.datasets.evaluation is not None
    example = session.datasets.evaluation[5]
    ids, size = torch.tensor([example.prompt + example.chosen]), len(example.prompt)
    sums = []
    for model in (own, first):
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, size - 1 : -1].double(), -1)
        sums.append(float(logps.gather(1, ids[0, size:, None]).sum()))
    found: dict[int, float] = {}
    for batch in session.eval_batches(session.datasets.evaluation):
        with torch.no_grad():
            ratios = session.heldout(batch).pairs.chosen_logratios.tolist()
        found.update(zip(map(int, batch.indices), ratios))
    assert found[5] == pytest.approx(sums[0] - sums[1], abs=2e-4)
    # the finished run's evaluation says the same
    assert np.abs(heldout_logratios(finished(config, folder)) - after).max() < 1e-4


def test_a_held_reference_changes_nothing_of_the_training(
    config: RunConfig, tmp_path: Path, tuned: Path
) -> None:
    config.adapter.path = str(tuned)
    _, stored = trained(config, tmp_path / "stored", steps=4)
    config.reference.mode = "model"
    _, held = trained(config, tmp_path / "held", steps=4)
    for a, b in zip(stored, held, strict=True):
        for name in ("loss", "grad_norm", "logratios/chosen", "rc/alpha"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_cached_log_probs_are_those_of_the_start(config: RunConfig, tmp_path: Path, tuned: Path) -> None:
    def says() -> str:
        said: list[str] = []
        Session(config, tmp_path, training=True).prepare_reference(said.append)
        return said[0]

    config.adapter.name = "none"
    assert "computed" in says()
    config.adapter.name = "lora"
    assert "read" in says()  # fresh adapters start as their base
    config.adapter.path = str(tuned)
    assert "computed" in says() and "read" in says()
    weights = tuned.parent / "other"
    weights.mkdir(exist_ok=True)
    for file in tuned.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    config.adapter.path = str(weights)
    assert "read" in says()
    changed = bytearray((weights / "adapter_model.safetensors").read_bytes())
    changed[-2] ^= 1
    (weights / "adapter_model.safetensors").write_bytes(changed)
    assert "computed" in says()
    config.adapter.merge = True
    assert "computed" in says()


def test_an_adapter_is_a_reference_too(config: RunConfig, tmp_path: Path, tuned: Path) -> None:
    config.reference.path = str(tuned)
    session = Session(config, tmp_path, training=True)
    session.prepare_reference()
    before = heldout_logratios(session)
    config.reference.path, config.adapter.path = None, str(tuned)
    other = Session(config, tmp_path, training=True)
    other.prepare_reference()
    batches = list(session.eval_batches(session.datasets.evaluation))  # type: ignore[arg-type]
    for batch in batches:
        assert session.heldout.reference is not None and other.heldout.reference is not None
        assert difference(session.heldout.reference(batch), other.heldout.reference(batch)) < 1e-5
    assert np.abs(before).max() > 1e-2


def test_what_is_saved_loads_with_transformers_and_merged(
    config: RunConfig, tmp_path: Path, base: Path
) -> None:
    config.adapter.save_merged = True
    folder = tmp_path / "run"
    session, _ = trained(config, folder)
    expected = logits(session.engine.policy.model)
    settings = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 16, 0.0)
    assert AutoTokenizer.from_pretrained(folder / "final").pad_token_id == 0
    adapted = AutoModelForCausalLM.from_pretrained(folder / "final")
    merged = AutoModelForCausalLM.from_pretrained(folder / "final" / "merged")
    assert type(merged) is type(load_model(base, config.model))
    by_peft = AutoPeftModelForCausalLM.from_pretrained(str(folder / "final"))
    assert difference(logits(adapted), expected) == 0.0
    assert difference(logits(by_peft.get_base_model()), expected) == 0.0
    assert difference(logits(merged), expected) < 1e-4
    assert (
        difference(logits(merge_adapter(load_model(base, config.model), folder / "final")), expected) < 1e-4
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_gradients(
    config: RunConfig, tmp_path: Path, dtype: str
) -> None:
    config.train.dtype = dtype
    _, plain = trained(config, tmp_path / "plain")
    config.train.gradient_checkpointing = True
    _, again = trained(config, tmp_path / "again")
    for a, b in zip(plain, again, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6) and a["grad_norm"] > 0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_an_adapter_s_own_dropout_is_off(tmp_path: Path, base: Path, tuned: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in tuned.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.5}))
    model = load_model(base, RunConfig().model)
    plain = logits(model)
    read_adapter(model, folder)
    tuned_logits = logits(model.train())
    assert torch.equal(logits(model), tuned_logits) and difference(tuned_logits, plain) > 1e-2
    with starting_adapters(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), tuned_logits)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "adapter.merge=true"),
        ({"target_modules": ["c_attn"]}, "does not fit LlamaForCausalLM"),
        ({"target_modules": ["q_proj"]}, "its layers differ"),
    ],
)
def test_other_adapters_are_refused(
    tmp_path: Path, base: Path, tuned: Path, change: dict[str, Any], part: str
) -> None:
    for file in tuned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ConfigError, match=part):
        read_adapter(load_model(base, RunConfig().model), tmp_path)


def tuned_by_peft(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Train an adapter with peft as its own users do, save it, and return its logits."""
    torch.manual_seed(1)
    wanted = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**wanted))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("settings", ["{}", "[]", "{", '{"peft_type": "NOBODY"}'])
def test_settings_of_no_adapter_are_refused(tmp_path: Path, base: Path, settings: str) -> None:
    (tmp_path / "adapter_config.json").write_text(settings)
    for use in (read_adapter, merge_adapter):
        with pytest.raises(ConfigError, match=f"the adapter in {tmp_path} cannot be read: "):
            use(load_model(base, RunConfig().model), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_changed_their_base_are_merged_and_else_refused(
    tmp_path: Path, base: Path, init: str
) -> None:
    expected = tuned_by_peft(base, tmp_path / "tuned", init_lora_weights=init)
    with pytest.raises(ConfigError, match=r"initialisation changed.*adapter\.merge=true"):
        read_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")
    merged = merge_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")
    assert (
        difference(logits(merged), expected)
        < 1e-3
        < difference(logits(load_model(base, RunConfig().model)), expected)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]},
        {"bias": "lora_only"},
    ],
)  # fmt: skip
def test_whatever_peft_saves_is_merged(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    expected = tuned_by_peft(base, tmp_path / "tuned", **settings)
    merged = merge_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")
    assert difference(logits(merged), expected) < 1e-4
    assert difference(logits(load_model(base, RunConfig().model)), expected) > 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 4}, r"its layers differ \(model\.layers\.2\..*; give the base model"),
        ({"num_hidden_layers": 1}, r"its layers differ \(model\.layers\.1\."),
        ({"hidden_size": 64}, "does not fit LlamaForCausalLM: .* size mismatch for .*q_proj"),
        (None, "holds no weights"),
    ],
)
def test_an_adapter_of_another_model_is_not_merged(
    tmp_path: Path, base: Path, change: dict[str, int] | None, reason: str
) -> None:
    """peft itself merges the layers that fit, and at most warns of the others."""
    settings = LlamaConfig.from_pretrained(base)
    for name, value in (change or {}).items():
        setattr(settings, name, value)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "other")
    tuned_by_peft(tmp_path / "other", tmp_path / "tuned")
    if change is None:
        (tmp_path / "tuned" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=reason) as refused:
        merge_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "orthogonal"])
def test_adapters_on_a_base_that_cannot_be_made_again_are_refused(
    tmp_path: Path, base: Path, tuned: Path, init: str
) -> None:
    for file in tuned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": init}))
    for use in (read_adapter, merge_adapter):
        with pytest.raises(ConfigError, match=init):
            use(load_model(base, RunConfig().model), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
def test_adapters_of_embeddings_and_heads_are_read_again_and_merged(
    config: RunConfig, tmp_path: Path, tied: bool, targets: list[str]
) -> None:
    config.model.path = tiny_llama(tmp_path / "base", tied=tied)
    config.adapter.target_modules, config.adapter.save_merged = targets, True
    config.rc.enabled, config.dynamics.every = False, 0
    folder = tmp_path / "run"
    session, _ = trained(config, folder)
    expected = logits(session.engine.policy.model)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert difference(logits(base), expected) > 1e-2
    # the run's evaluation, another run that goes on, and the whole model are the policy that was trained
    assert difference(logits(finished(config, folder).engine.policy.model), expected) < 1e-5
    again = load_model(Path(config.model.path), config.model)
    read_adapter(again, folder / "final")
    assert difference(logits(again), expected) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(folder / "final" / "merged")
    assert difference(logits(merged), expected) < 1e-4


def test_an_adapter_with_a_trained_embedding_beside_is_refused(tmp_path: Path, base: Path) -> None:
    tuned_by_peft(base, tmp_path / "tuned", target_modules=["embed_tokens"])
    path = tmp_path / "tuned" / "adapter_model.safetensors"
    weights = load_file(path)
    (copied,) = [name for name in weights if "lora_" not in name]
    read_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")
    save_file(weights | {copied: weights[copied] + 0.01}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"also holds model\.embed_tokens.*adapter\.merge=true"):
        read_adapter(load_model(base, RunConfig().model), tmp_path / "tuned")


def test_all_linear_beside_another_name_is_both(base: Path) -> None:
    names = target_names(load_model(base, RunConfig().model), ["all-linear", "lm_head"])
    linear = {f"model.layers.{n}.{part}" for n in range(2) for part in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )}  # fmt: skip
    assert set(names) == linear | {"lm_head"}
    model = load_model(base, RunConfig().model)
    add_adapter(model, AdapterConfig(name="lora", target_modules=["lm_head", "all-linear"]), seed=1)
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == linear | {"lm_head"}


def test_experts_that_stay_frozen_are_named(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    experts = AutoModelForCausalLM.from_config(
        GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
    )
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    with caplog.at_level(logging.WARNING):
        target_names(dense, ["all-linear"])
        target_names(experts, ["q_proj"])
        assert not caplog.messages
        target_names(experts, ["all-linear"])
    assert "leaves out 2 tensors of experts, such as model.layers.0.mlp.experts" in caplog.messages[0]


def test_a_dora_adapter_leaves_the_whole_model_beside(
    config: RunConfig, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tuned_by_peft(base, tmp_path / "tuned", use_dora=True)
    config.adapter.path, config.optim.lr = str(tmp_path / "tuned"), 1e-12
    with caplog.at_level(logging.WARNING):
        trained(config, tmp_path / "run", steps=1)
    assert any("final/merged" in message for message in caplog.messages)
    final = tmp_path / "run" / "final"
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final)
    assert difference(logits(by_peft), expected) < 1e-4
    assert difference(logits(AutoModelForCausalLM.from_pretrained(final / "merged")), expected) < 1e-4


def test_a_model_and_an_adapter_in_one_folder_are_refused_as_a_model(
    config: RunConfig, tmp_path: Path, base: Path, tuned: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for file in tuned.glob("adapter*"):
        shutil.copy(file, both)
    for key in ("model.path", "reference.path"):
        with pytest.raises(ConfigError, match=f"{key}=.* holds a whole model and an adapter"):
            check_folder(key, both)
    check_folder("adapter.path", both)
    (both / "model.safetensors").unlink()  # the base's config.json beside an adapter is common
    assert holds_adapter(both)
    check_folder("reference.path", both)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_saved_has_the_mode_of_new_files(config: RunConfig, tmp_path: Path, merged: bool) -> None:
    config.adapter.save_merged, before = merged, os.umask(0o027)
    try:
        config.adapter.name = "lora" if merged else "none"
        trained(config, tmp_path / "run", steps=1)
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in (tmp_path / "run/final").rglob("*.*")
        if path.is_file()
    }
    assert len(modes) > 3 and set(modes.values()) == {"0o640"}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_not_trained_whole(config: RunConfig, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    path = Path(tiny_llama(tmp_path / "base", hidden=64))
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (path / "config.json").write_text(json.dumps(settings))
    config.model.path, config.adapter.name = str(path), "none"
    with pytest.raises(ConfigError, match=r"are quantised \(bitsandbytes\).*adapter=lora"):
        Session(config, tmp_path, training=True)


def test_four_bits_have_the_gradients_of_the_weights_they_stand_for(
    config: RunConfig, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NO_BITS)
    base = Path(tiny_llama(tmp_path / "base", hidden=64))
    packed, plain = load_model(base, config.model, quantization="nf4"), load_model(base, config.model)
    layers = dict(plain.named_modules())
    for name, module in packed.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert 0.01 < difference(weight, layers[name].weight.detach()) < 0.3  # of a spread of 0.3
            layers[name].weight.data = weight
    gradients = []
    for model in (packed, plain):
        add_adapter(model, config.adapter, seed=1)
        model.eval()
        logits(model)  # once without gradients, as the reference's pass
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert difference(logits(packed), logits(plain)) < 1e-4
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["fresh", "tuned", "merged"])
def test_four_bits(config: RunConfig, tmp_path: Path, start: str) -> None:
    pytest.importorskip("bitsandbytes", reason=NO_BITS)
    base = Path(tiny_llama(tmp_path / "base", hidden=64))  # its blocks are of 64 weights in a row
    config.model.path = str(base)
    config.adapter.quantization, config.adapter.save_merged = "nf4", True
    if start != "fresh":
        (tmp_path / "tuned").mkdir()
        tuned = adapter_of(base, tmp_path / "tuned")
        config.adapter.path, config.adapter.merge = str(tuned), start == "merged"
    session, rows = trained(config, tmp_path / "run")
    model = session.engine.policy.model
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    packed = [name for name, kind in kinds.items() if kind == torch.uint8]
    assert len(packed) == 14 and kinds["lm_head.weight"] == torch.float32
    assert rows[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert rows[0]["grad_norm"] > 0 and rows[-1]["logratios/rejected"] != 0
    own, again = heldout_logratios(session), heldout_logratios(finished(config, tmp_path / "run"))
    assert np.abs(own - again).max() < 1e-4
    # merged into weights that were never rounded
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final" / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    start_folder = base if start != "merged" else tmp_path / "run" / "start"
    exact = merge_adapter(load_model(start_folder, config.model), tmp_path / "run" / "final")
    assert difference(logits(merged), logits(exact)) == 0.0


CASES: dict[str, list[dict[str, Any]]] = {
    "fresh": [
        {"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3},
        {"stage": 3, "mode": "model"},
        {"stage": 3, "checkpointing": True},
        {"stage": 2, "mode": "model", "checkpointing": True},
        {"stage": 3, "offload": True},
    ],
    "tuned": [
        {"stage": 0, "tuned": True},
        {"stage": 2, "tuned": True, "mode": "model"},
        {"stage": 3, "tuned": True, "mode": "model"},
    ],
    "four bits": [
        {"stage": 0, "quantization": "nf4"},
        {"stage": 2, "quantization": "nf4", "mode": "model"},
        {"stage": 1, "quantization": "nf4", "checkpointing": True},
    ],
}  # fmt: skip


@pytest.mark.slow
def test_two_ranks_and_every_stage_give_the_same(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason=NO_BITS)
    base = Path(tiny_llama(tmp_path / "base", hidden=64))
    (tmp_path / "tuned").mkdir()
    tuned = adapter_of(base, tmp_path / "tuned")
    pairs = sums_file(tmp_path / "pairs.jsonl", 24)
    cases = [case for group in CASES.values() for case in group]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER]
    command += [str(base), pairs, str(tuned), str(tmp_path), json.dumps(cases)]
    result = forked.run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    for group in CASES.values():
        records = [found[" ".join(f"{key}={value}" for key, value in case.items())] for case in group]
        for record in records:
            assert abs(record["rows"][0]["logratios/chosen"]) < 1e-6
            for row, expected in zip(record["rows"], records[0]["rows"], strict=True):
                assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
            assert record["shapes"] == records[0]["shapes"] and len(record["adapter"]) == 28
            assert record["adapter"] == pytest.approx(records[0]["adapter"], rel=1e-4)
    assert found["stage=0"]["rows"][2] != found["stage=0 quantization=nf4"]["rows"][2]
