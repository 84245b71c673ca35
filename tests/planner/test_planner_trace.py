"""Activations and operations of a micro-batch: against sums by hand, and against real tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rcpo.config.schema import RunConfig
from rcpo.planner.model import few_layers
from rcpo.planner.trace import BatchShape, Trace, trace

ROWS = BatchShape(rows=2, length=24, responses=20, shared=True)
HIDDEN, INNER, VOCABULARY, KEYS = 32, 48, 101, 16  # KEYS: 1 of 2 heads


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO-3 leaves a `linear` of its own in torch; `rcpo plan` starts without."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def architecture(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip


def traced(layers: int, depth: int, *, checkpointing: bool = False, training: bool = True) -> Trace:
    """A model of `layers` layers as if it had `depth`."""
    config = RunConfig()
    config.train.gradient_checkpointing = checkpointing
    policy = few_layers(architecture(layers), config, layers=layers)
    return trace(policy, ROWS, 16, training=training, depth=depth)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_layers_stand_for_seven(checkpointing: bool) -> None:
    whole = traced(7, 7, checkpointing=checkpointing)
    short = traced(4, 7, checkpointing=checkpointing)
    assert [(m.activations, m.gradients, m.work) for m in short.backward] == [
        (m.activations, m.gradients, m.work) for m in whole.backward
    ]
    assert (short.forward_peak, short.forward_work, short.kept) == (
        whole.forward_peak, whole.forward_work, whole.kept,
    )  # fmt: skip


def rotary() -> int:
    """Operations of the angles of all positions: a product of matrices in older versions of transformers."""
    positions = torch.arange(ROWS.length).expand(ROWS.rows, -1)
    with FlopCounterMode(display=False) as counter:
        LlamaRotaryEmbedding(architecture(1))(torch.ones(1), positions)
    return counter.get_total_flops()


def test_operations_by_hand() -> None:
    tokens, layers = ROWS.rows * ROWS.length, 3
    linear = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER  # q, o; k, v; gate, up, down
    attention = 2 * 2 * ROWS.rows * ROWS.length**2 * HIDDEN  # scores and values, two operations each
    head = 2 * ROWS.responses * HIDDEN * VOCABULARY  # of the responses alone
    found = traced(layers, layers)
    assert found.forward_work.flops - rotary() == layers * (2 * tokens * linear + attention) + head
    # twice a product's operations in the backward pass; attention computes its scores once more
    assert found.backward_work.flops == layers * (4 * tokens * linear + attention * 5 // 2) + 2 * head


def test_recomputation_costs_a_forward_pass_of_the_layers() -> None:
    plain, recomputed = traced(3, 3), traced(3, 3, checkpointing=True)
    head = 2 * ROWS.responses * HIDDEN * VOCABULARY
    extra = recomputed.backward_work.flops - plain.backward_work.flops
    last = 2 * ROWS.rows * ROWS.length * HIDDEN * INNER  # it stops before each layer's last product
    assert extra == plain.forward_work.flops - rotary() - head - 3 * last
    assert recomputed.forward_peak < plain.forward_peak


def test_gradients_of_all_weights_in_the_end() -> None:
    found = traced(2, 2)
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER + 2 * HIDDEN
    embedding = VOCABULARY * HIDDEN
    # head, norm, two layers; the embedding's own gradient is the last
    assert found.backward[-1].gradients == embedding + HIDDEN + 2 * layer
    assert found.backward[0].gradients == 0


def test_scoring_keeps_nothing_for_a_backward_pass() -> None:
    scoring, training = traced(4, 9, training=False), traced(4, 9)
    assert scoring.backward == ()
    assert scoring.forward_peak < training.forward_peak / 3
    assert scoring.forward_work.flops == training.forward_work.flops


def test_a_tied_head_has_one_gradient() -> None:
    config = RunConfig()
    tied = architecture(2)
    tied.tie_word_embeddings = True
    policy = few_layers(tied, config)
    found = trace(policy, ROWS, None, training=True, depth=2)
    assert len(found.backward) == len(list(policy.parameters()))


def test_nothing_is_allocated() -> None:
    config = RunConfig()
    huge = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    config.train.dtype = "bf16"
    found = trace(few_layers(huge, config), BatchShape(1, 4096, 2048, True), 2048, training=True, depth=80)
    assert found.activations > 40e9  # more than this test may take
    assert torch.empty(1).item() is not None
