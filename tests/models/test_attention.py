"""Shared rows against the same model's plain forward pass on each sequence alone; masks by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations import flex_attention

from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.errors import ConfigError
from rcpo.method.types import SIDES
from rcpo.models.attention import SHARED_ROWS, attention_masks, choose_layout, reason_for_separate, visible
from rcpo.models.policy import Policy, compile_layers, policy_inputs

SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that a wrong mask shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
WINDOW = 5  # smaller than every prompt with a response below
LONG_FACTORS: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [4.0] * 4,
    "short_factor": [1.0] * 4,
    "factor": 2.0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama that carries a window it ignores": LlamaConfig(**GROUPED, sliding_window=WINDOW),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral, window": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2, window in the upper layers": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "qwen3, window": Qwen3Config(
        **GROUPED, head_dim=8, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0
    ),
    "gpt_neox": GPTNeoXConfig(**SIZE),
    "gemma2, window": Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=5.0, attn_logit_softcapping=3.0
    ),
    "gemma3, window": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2
    ),
    "phi3": Phi3Config(**GROUPED),
    "phi3, window": Phi3Config(**GROUPED, sliding_window=WINDOW),
    "phi3, long positions": Phi3Config(
        **(GROUPED | {"max_position_embeddings": 32}),
        original_max_position_embeddings=12,
        rope_parameters=LONG_FACTORS,
    ),
}


def build(name: str, kernel: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=dtype).eval()


def pairs() -> tuple[list[Example], list[list[int]]]:
    """Four pairs with gold answers, two of which fit into one row, and mismatched completions."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 50, (count,), generator=generator).tolist()

    sizes = [(9, 6, 11, 2), (3, 4, 2, 5), (12, 8, 1, 3), (4, 1, 3, 1)]
    examples = [Example(str(n), *map(draw, parts)) for n, parts in enumerate(sizes)]
    return examples, [draw(size) for size in (2, 1, 5, 3)]


def alone(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probs of a response, by the model's own logits for this sequence only."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return torch.log_softmax(logits, -1)[places, ids[0, places + 1]]


def expected(model: Any, examples: list[Example], mismatched: list[list[int]]) -> Tensor:
    """Log-probs of all responses in the order of a batch with three sides."""
    sides = [[e.chosen for e in examples], [e.rejected for e in examples], mismatched]
    return torch.cat(
        [
            alone(model, e.prompt, response)
            for side in sides
            for e, response in zip(examples, side, strict=True)
        ]
    )


# Gemma 2 refuses SDPA; long positions have frequencies that depend on the batch's longest sequence
ALONE = [
    (name, kernel)
    for name in CONFIGS
    for kernel in ("sdpa", "eager")
    if "long" not in name and (name, kernel) != ("gemma2, window", "sdpa")
]


@pytest.mark.parametrize(("name", "kernel"), ALONE)
def test_shared_rows_give_each_sequence_s_own_logps(name: str, kernel: str) -> None:
    model, (examples, mismatched) = build(name, kernel), pairs()
    assert choose_layout("auto", [model.config]) == "shared"
    batch = collate(examples, 0, sides=SIDES[:3], layout="shared", mismatched=mismatched)
    assert batch.input_ids.shape[0] == 3  # 28, 28, 10 and 11 tokens
    with torch.no_grad():
        ours = Policy(model)(**policy_inputs(batch))[0]
    theirs = expected(model, examples, mismatched)
    assert theirs.min() < theirs.max() - 1  # there is something to get wrong
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_layouts_agree(name: str) -> None:
    model, (examples, mismatched) = build(name, "eager"), pairs()
    policy = Policy(model)
    with torch.no_grad():
        ours, theirs = (
            policy(**policy_inputs(collate(examples, 0, sides=SIDES, layout=layout, mismatched=mismatched)))[
                0
            ]
            for layout in ("shared", "separate")
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_sequences_alone(kernel: str, checkpointing: bool) -> None:
    examples, mismatched = pairs()
    gradients = []
    for layout in ("shared", "separate"):
        model = build("qwen3, window", kernel)
        policy = Policy(model)
        if checkpointing and layout == "shared":
            policy.recompute_activations()
            model.train()
        batch = collate(examples, 0, sides=SIDES[:3], layout=layout, mismatched=mismatched)
        logps = policy(**policy_inputs(batch))[0]
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2, window", "gemma3, window"])
def test_bf16_rows_are_as_close_as_bf16_is(name: str) -> None:
    kernel = "eager" if name.startswith("gemma2") else "sdpa"
    examples, mismatched = pairs()
    batch = collate(examples, 0, sides=SIDES[:3], layout="shared", mismatched=mismatched)
    model = build(name, kernel, torch.bfloat16)
    with torch.no_grad():
        ours = Policy(model)(**policy_inputs(batch))[0]
        assert ours.dtype == torch.float32
        theirs = expected(model.float(), examples, mismatched)  # the same rounded weights
    assert float((ours.double() - theirs).abs().mean()) < 0.1  # a response that sees another: 1 nat and more


def test_who_sees_whom_by_hand() -> None:
    # pair 0: prompt p p, chosen c c, rejected r; pair 1: prompt q, chosen d; one column of padding
    segments = torch.tensor([[0, 0, 1, 1, 2, 5, 6, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])
    assert visible(segments, positions)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    # a window of 2 by position: the rejected token at position 2 still sees the prompt's end at 1
    assert visible(segments, positions, 2)[0, 0].int().tolist()[2:5] == [
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0],
    ]


def test_masks_have_the_kernel_s_form() -> None:
    segments, positions = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    boolean = attention_masks(build("llama", "sdpa").config, segments, positions, torch.bfloat16)
    assert isinstance(boolean, Tensor) and boolean.dtype == torch.bool and boolean.shape == (1, 1, 3, 3)
    additive = attention_masks(build("mistral, window", "eager").config, segments, positions, torch.bfloat16)
    assert isinstance(additive, Tensor) and additive.dtype == torch.bfloat16
    low = torch.finfo(torch.bfloat16).min
    assert additive[0, 0].tolist() == [[0, low, low], [0, 0, low], [0, low, 0]]
    named = attention_masks(build("gemma3, window", "sdpa").config, segments, positions, torch.float32)
    assert isinstance(named, dict) and set(named) == {"full_attention", "sliding_attention"}


def test_the_layout_follows_the_architecture() -> None:
    llama, neox = build("llama", "sdpa").config, build("gpt_neox", "eager").config
    bloom, mamba = BloomConfig(), MambaConfig()  # ALiBi; a state space
    assert choose_layout("auto", [llama, neox]) == "shared"
    assert choose_layout("separate", [llama]) == "separate"
    for other in (bloom, mamba):
        assert choose_layout("auto", [llama, other]) == "separate"
        with pytest.raises(ConfigError, match=f"data.layout=shared: model type {other.model_type}"):
            choose_layout("shared", [llama, other])


def test_kernels_without_masks_and_bidirectional_models_stay_separate() -> None:
    config = LlamaConfig(**GROUPED, attn_implementation="flash_attention_2")
    assert "flash_attention_2" in str(reason_for_separate(config))
    both_ways = build("gemma3, window", "sdpa").config
    both_ways.use_bidirectional_attention = True
    assert reason_for_separate(both_ways) == "its attention is bidirectional"


def test_every_architecture_on_the_list_is_tested_here() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(SHARED_ROWS)


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma3, window"])
def test_flex_attention_sees_what_sdpa_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # without a compiler; on a CPU PyTorch has no backward pass of it
    plain = flex_attention.flex_attention
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda _: lambda: plain)
    examples, mismatched = pairs()
    batch = collate(examples, 0, sides=SIDES[:3], layout="shared", mismatched=mismatched)
    found = {}
    for kernel in ("sdpa", "flex_attention"):
        with torch.no_grad():
            found[kernel] = Policy(build(name, kernel))(**policy_inputs(batch))[0]
    torch.testing.assert_close(found["flex_attention"], found["sdpa"], rtol=1e-4, atol=1e-4)


def test_rows_of_one_sequence_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    examples, _ = pairs()
    with torch.no_grad():
        Policy(build("llama", "sdpa"))(**policy_inputs(collate(examples, 0, layout="separate")))
    assert seen == [(None, True)] * SIZE["num_hidden_layers"]  # what SDPA's fast kernels take


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing: bool) -> None:
    examples, _ = pairs()
    batch = collate(examples, 0, layout="shared")
    found = []
    for compiled in (False, True):
        model = build("llama", "sdpa").train()
        policy = Policy(model)
        if checkpointing:
            policy.recompute_activations()
        if compiled:
            compile_layers(policy, backend="eager")  # traced as for any compiler, which takes its time
        logps = policy(**policy_inputs(batch))[0]
        weights = [p for p in model.parameters() if p.requires_grad]
        found.append((logps.detach(), torch.autograd.grad(logps.sum(), weights)))
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers) == compiled
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
