"""Under ZeRO-3 a model is split over the ranks as it is read: measured on two of them, 213 MB of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from tiny import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM
from workers import partitioned_loading

from rcpo.config.schema import RunConfig
from rcpo.engine.load import read_model
from rcpo.engine.zero import Engine
from rcpo.models.hub import ModelSource
from rcpo.models.policy import Policy
from rcpo.system import distributed


def large_llama(folder: Path) -> None:
    """213 MB in fp32, saved in pieces of bf16, so that reading converts and cannot just map the file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=14, num_attention_heads=8
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="25MB")


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    large_llama(tmp_path / "large")
    tiny_llama(tmp_path / "small")
    on_ranks(2, partitioned_loading.measure, tmp_path / "large", [3, 0], tmp_path / "rank")
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    split, whole = zip(*ranks, strict=True)
    size = whole[0]["whole"]
    assert size == split[0]["whole"] > 200e6
    for rank in range(2):
        assert whole[rank]["peak"] > size
        assert split[rank]["peak"] < size / 2 + 3 * split[rank]["largest"], split[rank]
        assert split[rank]["logps"] == pytest.approx(whole[rank]["logps"], abs=1e-5)


def test_one_rank_reads_the_same_weights(tmp_path: Path) -> None:
    folder, logps = Path(tiny_llama(tmp_path / "model", tied=True)), []
    distributed.initialize()
    for stage in (0, 3):
        config = RunConfig()
        config.engine.stage = stage
        policy = Engine(Policy(read_model(ModelSource(folder), config)), config).policy
        ids = torch.arange(1, 9)[None]
        inputs = ids, torch.arange(8)[None], torch.arange(7), ids[0, 1:]
        with torch.no_grad():
            logps.append(policy(*inputs)[0])
    assert torch.equal(*logps)
