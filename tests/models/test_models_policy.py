"""Fused log-probs and head geometry of real architectures against their own logits and autograd."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    PhiConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.errors import ConfigError
from rcpo.method.geometry import HeadShape, Sketch, outer_scores
from rcpo.method.types import TokenBatch
from rcpo.models.policy import Policy, policy_inputs
from rcpo.training.dynamics import check_geometry
from rcpo.training.objective import build_objective

SIZE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "untied": LlamaConfig(**SIZE),
    "tied": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "bias": PhiConfig(**SIZE),
    "soft-cap": Gemma2Config(**SIZE, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0),
    "multiplier": CohereConfig(**SIZE, logit_scale=0.3),
    "divisor": GraniteConfig(**SIZE, logits_scaling=3.0),
    "state space, multiplier": FalconH1Config(
        **SIZE, **MAMBA, num_key_value_heads=2, head_dim=8, lm_head_multiplier=0.4
    ),
    "state space": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent, soft-cap": RecurrentGemmaConfig(
        **(SIZE | {"num_hidden_layers": 3}),
        lru_width=32,
        head_dim=8,
        num_key_value_heads=1,
        logits_soft_cap=2.0,
    ),
}
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
UNKNOWN: dict[str, PreTrainedConfig] = {
    "Granite's divisor as a factor": HyperCLOVAXConfig(**SIZE, num_key_value_heads=2, logits_scaling=3.0),
    "hidden states divided": MiniCPM3Config(
        **SIZE, **LOW_RANK, num_key_value_heads=4, v_head_dim=8, dim_model_base=8, scale_emb=1
    ),
}

PAIRS = [Example("a", [5, 6, 7], [8, 9, 10], [11]), Example("b", [12], [13], [14, 15])]


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def examined(config: PreTrainedConfig) -> Policy:
    policy = Policy(build(config))
    policy.examine()
    return policy


def own_logps(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Each response alone, by the model's own logits: (N,), with gradients."""
    responses = [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS]
    logps = []
    for pair, response in zip(PAIRS * 2, responses, strict=True):
        ids = torch.tensor([pair.prompt + response])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        places = torch.arange(len(pair.prompt), ids.shape[1])
        logps.append(torch.log_softmax(logits, -1)[places - 1, ids[0, places]])
    return torch.cat(logps)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_logps_are_the_model_s_own(name: str) -> None:
    policy, batch = examined(CONFIGS[name]), collate(PAIRS, 0)
    assert policy.fused
    with torch.no_grad():
        ours, theirs = policy(**policy_inputs(batch))[0], own_logps(policy.model, batch)
    assert float(theirs.max() - theirs.min()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["untied", "bias", "soft-cap", "multiplier", "divisor", "state space"])
def test_head_geometry_is_the_head_s_gradient(name: str) -> None:
    model = build(CONFIGS[name])
    # freed from the embeddings where they are tied: the score is that of the head's use alone
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    policy, batch = Policy(model), collate(PAIRS, 0)
    coefficients = torch.linspace(0.5, 1.5, len(batch.labels), dtype=torch.float64)
    _, hidden, scores, _ = policy(**policy_inputs(batch), sketch=Sketch(40, None))
    ours = outer_scores(hidden, scores, coefficients)
    (theirs,) = torch.autograd.grad((own_logps(model, batch) * coefficients).sum(), head.weight)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_scales_and_caps_are_read_off_the_configuration() -> None:
    shapes = {name: Policy(build(config)).shape for name, config in CONFIGS.items()}
    assert shapes["untied"] == HeadShape(1.0, None)
    assert shapes["multiplier"] == HeadShape(0.3, None)
    assert shapes["divisor"] == HeadShape(1 / 3, None)
    assert shapes["soft-cap"] == HeadShape(1.0, 2.0)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_head_falls_back_to_its_own_logits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        policy = examined(UNKNOWN[name])
    model = policy.model
    assert not policy.fused
    assert ["the model's own logits are used" in message for message in caplog.messages] == [True]
    batch = collate(PAIRS, 0)
    ours = policy(**policy_inputs(batch))[0]
    theirs = own_logps(model, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for parameter in (model.lm_head.weight, model.get_input_embeddings().weight):
        (mine,) = torch.autograd.grad(ours.sum(), parameter, retain_graph=True)
        (true,) = torch.autograd.grad(theirs.sum(), parameter, retain_graph=True)
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*CONFIGS, *UNKNOWN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_or_feign_an_unknown_head(name: str, dtype: torch.dtype) -> None:
    if name in CONFIGS:
        config, known = CONFIGS[name], True
    else:
        config, known = UNKNOWN[name], False
    policy = Policy(build(config).to(dtype))
    policy.examine()
    assert policy.fused is known
    assert "forward" not in vars(policy.model.get_output_embeddings())  # nothing is left of the examination


def test_a_soft_cap_of_real_size_in_bf16_is_known() -> None:
    # Gemma 2's 30, with logits up to it: one step of bf16 is 0.125 there
    config = Gemma2Config(**SIZE, head_dim=8, num_key_value_heads=2, final_logit_softcapping=30.0)
    model = build(config)
    model.get_output_embeddings().weight.data *= 20
    policy = Policy(model.bfloat16())
    policy.examine()
    assert policy.fused and float(model(input_ids=torch.arange(8)[None]).logits.detach().abs().max()) > 16


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    sizes = {key: value for key, value in SIZE.items() if key not in ("bos_token_id", "eos_token_id")}
    model = AutoModelForCausalLM.from_config(BertConfig(**sizes)).eval()
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal"):
        Policy(model).examine()
    decoder = AutoModelForCausalLM.from_config(BertConfig(**sizes, is_decoder=True)).eval()
    Policy(decoder).examine()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_to_experts_is_no_leak(dtype: torch.dtype) -> None:
    config = GptOssConfig(
        **SIZE, head_dim=8, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    policy = Policy(build(config).to(dtype))
    policy.examine()
    assert policy.fused


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = build(CONFIGS["untied"])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(ConfigError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight;"):
        Policy(model).examine()


def test_llama_4_ends_with_hidden_states_by_another_name() -> None:
    config = Llama4TextConfig(
        **SIZE, head_dim=8, num_key_value_heads=2, num_local_experts=2, intermediate_size_mlp=48,
        attention_chunk_size=16,
    )  # fmt: skip
    policy = Policy(build(config))
    policy.examine()
    assert policy.fused
    batch = collate(PAIRS, 0)
    ours, theirs = policy(**policy_inputs(batch))[0], own_logps(policy.model, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_an_unknown_head_has_no_head_geometry() -> None:
    unknown, known = examined(UNKNOWN["hidden states divided"]), examined(CONFIGS["untied"])
    config = RunConfig()
    objective = build_objective(config)
    check_geometry(config, objective, known)
    with pytest.raises(ConfigError, match=r"rc.geometry=parameters \(engine=zero0\), or dynamics.every=0"):
        check_geometry(config, objective, unknown)
    config.dynamics.every = 0
    check_geometry(config, objective, unknown)
    config.rc.enabled = True  # needs its dynamics whatever dynamics.every says
    with pytest.raises(ConfigError, match=r"rc.geometry=parameters \(engine=zero0\)$"):
        check_geometry(config, objective, unknown)
    config.rc.geometry = "parameters"
    check_geometry(config, objective, unknown)
    supervised = RunConfig(objective=ObjectiveConfig(name="sft", reduction="mean", hyperparameters={}))
    check_geometry(supervised, build_objective(supervised), unknown)
