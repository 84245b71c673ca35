"""What the planner says against DeepSpeed's own tensors, its communication log, and a process's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, sums_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rcpo.config import RunConfig
from rcpo.planner import communication, states
from rcpo.planner.gathers import Gathers, gathers, module_order
from rcpo.planner.memory import Step
from rcpo.planner.model import architecture, depth, few_layers, owned, parameters
from rcpo.planner.trace import Rows, trace

WORKER = str(Path(__file__).parents[1] / "workers" / "footprint.py")
# freed memory goes back at once, so that a process's size is that of its tensors
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LIMITS = {
    "stage3_prefetch_bucket_size": "prefetch",
    "stage3_max_live_parameters": "max_live",
    "stage3_max_reuse_distance": "max_reuse",
}
STAGES = [{"engine.stage": stage} for stage in range(4)]
HALF = [{"engine.stage": stage, "train.dtype": "bf16"} for stage in (0, 2, 3)]
ADAPTERS = {"engine.stage": 3, "adapter.name": "lora"}
# only a few of the model's weights may be whole at a time, and each is needed three times
CRAMPED = {
    "engine.stage": 3,
    "train.gradient_checkpointing": True,
    "zero.stage3_max_live_parameters": 9000,
    "zero.stage3_prefetch_bucket_size": 2000,
    "zero.stage3_max_reuse_distance": 4000,
}

GROUPS = {1: [*STAGES, HALF[0]], 2: [*STAGES, *HALF, CRAMPED, ADAPTERS], 4: STAGES}


def model(folder: Path, hidden: int, layers: int, vocabulary: int) -> str:
    """A random Llama whose sizes divide by nothing in particular."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden + 7, num_hidden_layers=layers,
        num_attention_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def measured(
    folder: Path, path: str, groups: dict[int, list[dict[str, Any]]], *small: str
) -> dict[int, list[list[dict[str, Any]]]]:
    """For each number of ranks and each rank, what it measured of each configuration."""
    pairs, output = sums_file(folder / "pairs.jsonl", 24), folder / "measured"
    command = [sys.executable, WORKER, path, pairs, str(output), json.dumps(list(groups.items())), *small]
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **RETURNS_MEMORY},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    files = {ranks: [Path(f"{output}.{ranks}.{rank}") for rank in range(ranks)] for ranks in groups}
    return {ranks: [json.loads(file.read_text()) for file in found] for ranks, found in files.items()}


def configuration(path: str, changes: dict[str, Any]) -> tuple[RunConfig, dict[str, int]]:
    """A run's configuration, and DeepSpeed's limits for gathers."""
    config = RunConfig()
    config.model.name, config.model.path = "local", path
    limits = {}
    for key, value in changes.items():
        node, _, leaf = key.rpartition(".")
        if node == "zero":
            limits[LIMITS[leaf]] = value
        else:
            setattr(getattr(config, node), leaf, value)
    return config, limits


def gathered(config: RunConfig, limits: dict[str, int]) -> Gathers | None:
    if config.engine.stage < 3:
        return None
    found = architecture(config, None)
    order = module_order(few_layers(found, config), Rows(1, 8, 4, True), depth(found))
    numels = {p.name: p.numel for p in parameters(found, config)}
    return gathers(order, owned(found, config), numels, **limits)


def scores_of(config: RunConfig) -> int:
    """Elements of both sides' sketched scores."""
    found = architecture(config, None)
    return 2 * min(config.rc.sketch or found.vocab_size, found.vocab_size) * int(found.hidden_size)


def two_micro_batches(change: dict[str, Any], ranks: int) -> dict[str, Any]:
    return {**change, "train.batch_size": 2 * ranks, "train.micro_batch_size": 1}


@pytest.mark.slow
@pytest.mark.serial
def test_tensors_and_messages_are_deepspeeds_to_the_byte(tmp_path: Path) -> None:
    path = model(tmp_path / "model", hidden=34, layers=3, vocabulary=101)
    groups = {ranks: [two_micro_batches(change, ranks) for change in GROUPS[ranks]] for ranks in GROUPS}
    found = measured(tmp_path, path, groups)
    for ranks, changes in groups.items():
        for place, change in enumerate(changes):
            config, limits = configuration(path, change)
            weights, whole = parameters(architecture(config, None), config), gathered(config, limits)
            for rank in range(ranks):
                result, where = found[ranks][rank][place], (change, ranks, rank)
                micro = len(result["shapes"])
                assert result["before_step"] == vars(states.states(weights, config, ranks, rank)), where
                sent = communication.messages(weights, config, ranks, micro, whole)
                assert sorted([m.name, m.size, m.count] for m in sent) == result["communication"], where
                if ranks > 1:
                    own = communication.own_messages(config, scores_of(config), micro)
                    assert sorted(message.size for message in own) == result["own"], where


@pytest.mark.slow
@pytest.mark.serial
def test_peak_memory_within_a_tenth(tmp_path: Path) -> None:
    path = model(tmp_path / "model", hidden=320, layers=4, vocabulary=16000)
    small = model(tmp_path / "small", hidden=34, layers=3, vocabulary=101)
    change = {"engine.stage": 2, "train.batch_size": 4, "train.micro_batch_size": 2}
    result = measured(tmp_path, path, {1: [change]}, small)[1][0][0]
    config, limits = configuration(path, change)
    rows = Rows(*max(result["shapes"], key=lambda shape: shape[0] * shape[1]))
    found = architecture(config, None)
    policy = few_layers(found, config)
    sketch = min(config.rc.sketch or policy.vocabulary, policy.vocabulary)
    training = trace(policy, rows, sketch, training=True, depth=depth(found))
    scoring = trace(policy, rows, None, training=False, depth=depth(found))
    weights, micro, whole = parameters(found, config), len(result["shapes"]), gathered(config, limits)
    step = Step(config, weights, 1, micro, training, scoring, whole, scores_of(config), on_gpu=False)
    peak = max(phase.device_bytes for phase in step.phases() if phase.name != "scoring")
    assert peak > 2e8  # so that a few MB of the interpreter's do not matter
    assert peak == pytest.approx(max(result["peaks"].values()), rel=0.1)
