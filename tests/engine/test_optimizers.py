"""Optimizers, what decays, and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from rcpo.config.schema import RunConfig
from rcpo.engine.optimizers import build_optimizer, parameter_groups, schedule
from rcpo.errors import ConfigError


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(name: str, ratio: float, tmp_path: Path) -> None:
    config, steps = RunConfig(), 8  # their trainer warms up for ceil(0.03 · 8) = 1 and ceil(0.3 · 8) = 3
    config.optim.schedule, config.optim.warmup_ratio = name, ratio
    theirs = "constant_with_warmup" if name == "constant" else name
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio)  # below 1: a share
    warmup = arguments.get_warmup_steps(steps) if ratio < 1 else steps
    makers = schedule(config, steps), lambda o: get_scheduler(theirs, o, warmup, steps)
    rates: list[list[float]] = []
    for make in makers:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make(optimizer)
        rates.append([])
        for _ in range(steps + 1):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(
    ("schedule_name", "warmup"),
    [("cosine_with_min_lr", 0), ("cosine_with_min_lr", 3), ("wsd", 0), ("wsd", 3)],
)
def test_schedules_with_a_lowest_rate_are_those_of_transformers(
    schedule_name: str, warmup: int, shape: str
) -> None:
    config, steps = RunConfig(), 20
    optim = config.optim
    optim.schedule, optim.warmup_steps, optim.min_lr_ratio = schedule_name, warmup, 0.2
    optim.decay_ratio, optim.decay_shape = 0.34, shape  # ceil(6.8) = 7 steps
    if schedule_name == "wsd":
        name, special = (
            "warmup_stable_decay",
            {"num_decay_steps": 7, "decay_type": shape, "min_lr_ratio": 0.2},
        )
    else:
        name, special = schedule_name, {"min_lr_rate": 0.2}
    makers = schedule(config, steps), lambda o: get_scheduler(name, o, warmup, steps, special)
    factors = [
        maker(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)).lr_lambdas[0] for maker in makers
    ]
    for step in range(steps + 1):
        assert factors[0](step) == pytest.approx(factors[1](step), abs=1e-15), step
    assert factors[0](steps) == pytest.approx(0.2) and factors[0](warmup) == 1.0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"warmup_steps": 9}, "optim.warmup_steps=9 do not fit a run of 8 steps"),
        (
            {"schedule": "wsd", "warmup_steps": 5, "decay_ratio": 0.5},
            "and the decay of 4 .optim.decay_ratio=0.5.",
        ),
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused(settings: dict[str, Any], part: str) -> None:
    config = RunConfig()
    for name, value in settings.items():
        setattr(config.optim, name, value)
    with pytest.raises(ConfigError, match=part):
        schedule(config, 8)


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        Qwen3Config(**SIZES, head_dim=8),  # norms of queries and keys
        Gemma2Config(**SIZES, head_dim=8),
        PhiConfig(**(SIZES | {"num_key_value_heads": 4})),
        GPTNeoXConfig(**(SIZES | {"num_key_value_heads": 4})),
        GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4),  # norms that are called ln_1
    ],
    ids=lambda config: config.model_type,
)
def test_weights_decay_where_they_do_in_transformers(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, rest = (
        group | {"names": {names[p] for p in group["params"]}} for group in parameter_groups(model, 0.1)
    )
    wanted = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decaying["names"] == wanted & set(names.values()) and decaying["weight_decay"] == 0.1
    assert rest["names"] == set(names.values()) - wanted and rest["weight_decay"] == 0.0
    (single,) = parameter_groups(model, 0.0)
    assert len(single["params"]) == len(names)


def test_named_weights_are_exempt_from_decay() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    names = {parameter: name for name, parameter in model.named_parameters()}
    patterns = ["embed_tokens", r"layers\.0\.mlp\."]
    decaying, rest = ({names[p] for p in group["params"]} for group in parameter_groups(model, 0.1, patterns))
    before = {names[p] for p in parameter_groups(model, 0.1)[0]["params"]}
    named = {name for name in before if "embed_tokens" in name or "layers.0.mlp" in name}
    assert named and decaying == before - named and named <= rest
    assert len(parameter_groups(model, 0.0, patterns)) == 1
    with pytest.raises(
        ConfigError, match=r"optim.no_decay: 'lora_' matches no trained parameter; one is model"
    ):
        parameter_groups(model, 0.1, ["lora_"])


def test_a_norm_by_another_name_does_not_decay_either() -> None:
    config = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert "backbone.norm_f.weight" in Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert not any(p is model.backbone.norm_f.weight for p in parameter_groups(model, 0.1)[0]["params"])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_shrinks_matrices_and_leaves_norms_and_biases(name: str) -> None:
    config = RunConfig()
    config.optim.name, config.optim.lr, config.optim.weight_decay = name, 0.5, 0.2
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(model, config)
    assert {p for group in optimizer.param_groups for p in group["params"]} == {
        *model[0].parameters(),
        model[1].bias,
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.state_dict().items():
        factor = 1 - 0.5 * 0.2 if key == "0.weight" else 1.0
        torch.testing.assert_close(value, factor * before[key])
