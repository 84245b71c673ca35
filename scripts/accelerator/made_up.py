"""Models with random weights in real shapes, made-up pairs, and a trainer over both."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rcpo.config.schema import RunConfig
from rcpo.data.batches import GlobalBatches, split
from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.engine.zero import Engine
from rcpo.method.types import TokenBatch
from rcpo.models.attention import choose_layout
from rcpo.models.loading import DTYPES
from rcpo.models.policy import Policy, compile_layers
from rcpo.planner.trace import BatchShape
from rcpo.training.forward import PairForward
from rcpo.training.objective import build_objective
from rcpo.training.trainer import Trainer

BATCHES = 4  # different ones, over and over
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
             "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "tie_word_embeddings": True},
    "1.5B": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "tie_word_embeddings": True},
    "8B": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "max_position_embeddings": 8192},
    "8B, 8 layers": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
                     "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "small": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 688,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tiny": {"model_type": "llama", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2},
}  # fmt: skip
"""Qwen 2.5 0.5B and 1.5B and Llama 3 8B, from their config.json, and a quarter of its layers, all of which
can be trained on 80 GB; two small ones for numbers.
"""


@dataclass(frozen=True)
class Shape:
    """What is trained: a model of `SHAPES` on pairs of so many tokens; with `lora` by adapters of rank 16.

    `optimizer` sgd has no moments, so that 8B fits into 140 GB: passes and kernels are those of AdamW.
    """

    name: str
    pairs: int
    prompt: int
    response: int
    lora: bool = False
    checkpointing: bool = True
    dtype: str = "bf16"
    stage: int = 0
    micro: int | None = None
    layout: str = "auto"
    attention: str | None = None
    optimizer: str = "adamw"
    compiled: bool = False

    @property
    def title(self) -> str:
        """What tables call it."""
        words = [self.name + (" LoRA" if self.lora else "")]
        words += ["SGD"] if self.optimizer == "sgd" else []
        words += ["compiled"] if self.compiled else []
        return ", ".join([*words, f"{self.pairs} pairs"])

    @property
    def tokens(self) -> int:
        """Tokens of a step: a prompt once in shared rows, as rcpo counts them."""
        return self.pairs * (self.prompt + 2 * self.response)


def architecture(name: str) -> PreTrainedConfig:
    numbers = dict(SHAPES[name])
    return AutoConfig.for_model(numbers.pop("model_type"), **numbers, pad_token_id=0)


def run_config(shape: Shape, folder: Path) -> RunConfig:
    """The configuration of a DPO run of this shape."""
    config = RunConfig()
    config.train.dtype, config.train.gradient_checkpointing = shape.dtype, shape.checkpointing
    config.train.batch_size, config.train.micro_batch_size = shape.pairs, shape.micro or shape.pairs
    config.train.max_steps, config.eval.batch_size = 1000, shape.pairs
    config.engine.stage, config.data.layout = shape.stage, shape.layout
    config.model.attention, config.train.compile = shape.attention, shape.compiled
    config.optim.lr, config.wandb.mode = 1e-5, "disabled"
    if shape.optimizer == "sgd":
        config.optim.name, config.optim.momentum = "sgd", 0.0
    if shape.lora:
        config.adapter.name = "lora"
    return config


def make_policy(shape: Shape, config: RunConfig, device: torch.device) -> Policy:
    """Random weights, the same for a seed, made on the device."""
    settings = copy.deepcopy(architecture(shape.name))
    if shape.attention is not None:
        settings._attn_implementation = shape.attention
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[shape.dtype])
    if shape.lora:
        from rcpo.models.adapters import add_adapter

        add_adapter(model, config.adapter, config.seed)
    policy = Policy(model)
    if shape.checkpointing:
        policy.recompute_activations()
    if shape.compiled:
        compile_layers(policy)
    return policy


def make_pairs(shape: Shape, count: int) -> list[Example]:
    """Pairs of random tokens, with lengths from half to one and a half of the given ones."""
    draw = np.random.default_rng(0)
    vocabulary = SHAPES[shape.name]["vocab_size"]

    def tokens(mean: int) -> list[int]:
        length = int(draw.integers(mean // 2, mean + mean // 2 + 1))
        return draw.integers(1, vocabulary, max(2, length)).tolist()

    return [
        Example(f"made-up:{n}", tokens(shape.prompt), tokens(shape.response), tokens(shape.response))
        for n in range(count)
    ]


class Pairs:
    """The made-up pairs of a shape, in `BATCHES` optimizer steps, and their micro-batches."""

    def __init__(self, shape: Shape, config: RunConfig) -> None:
        self.examples = make_pairs(shape, BATCHES * shape.pairs)
        self.batches = GlobalBatches(len(self.examples), shape.pairs, 0)
        self.layout = choose_layout(config.data.layout, [architecture(shape.name)])
        self._size = config.train.microbatch(1)

    def positions(self, step: int) -> list[list[int]]:
        """Those of each micro-batch of a step."""
        return split(self.batches.indices(step % BATCHES), 0, 1, self._size)

    def batch(self, positions: list[int]) -> TokenBatch:
        examples = [self.examples[position] for position in positions]
        return collate(examples, 0, layout=self.layout, indices=positions)

    def largest(self) -> BatchShape:
        """The micro-batch of the most tokens."""
        batches = [self.batch(each) for step in range(BATCHES) for each in self.positions(step)]
        return rows_of(max(batches, key=lambda batch: batch.input_ids.numel()))


def rows_of(batch: TokenBatch) -> BatchShape:
    rows, length = batch.input_ids.shape
    return BatchShape(rows, length, len(batch.labels), batch.segments is not None)


@contextmanager
def training(shape: Shape, folder: Path, device: torch.device) -> Iterator[Trainer]:
    """A trainer, and afterwards its memory again: DeepSpeed's hooks hold on to a model that is not closed."""
    trainer = make_trainer(shape, folder, device)
    try:
        yield trainer
    finally:
        trainer.engine.close()


def make_trainer(shape: Shape, folder: Path, device: torch.device) -> Trainer:
    """A trainer on made-up pairs, with a reference whose log-probs are 0."""
    config = run_config(shape, folder)
    objective = build_objective(config)
    engine = Engine(make_policy(shape, config, device), config, config.train.max_steps)
    pairs = Pairs(shape, config)
    examples, batches, layout = pairs.examples, pairs.batches, pairs.layout
    lengths = np.array([[len(e.prompt), len(e.chosen), len(e.rejected)] for e in examples])

    def collated(_: Any, positions: list[int]) -> TokenBatch:
        return pairs.batch(positions).to(engine.device)

    def reference(batch: TokenBatch) -> torch.Tensor:
        return torch.zeros(len(batch.labels), device=engine.device)

    session: Any = SimpleNamespace(
        config=config, run_dir=folder, objective=objective, engine=engine, batches=batches, layout=layout,
        total_steps=config.train.max_steps, fresh_signals=True, control_pairs=lambda: None, contents={},
        datasets=SimpleNamespace(
            train=SimpleNamespace(lengths=lengths, learned=lengths, weights=np.ones(len(examples)))
        ),
        forward=PairForward(engine, objective, reference), held_reference=None, collate=collated,
        rank_microbatches=pairs.positions,
    )  # fmt: skip
    return Trainer(session)
