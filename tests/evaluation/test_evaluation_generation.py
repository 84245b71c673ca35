"""Greedy generation against a loop without cache, padding or `generate`, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rcpo.evaluation.generation import exact_match, generate_greedy, left_pad, until_stop

PAD, LENGTH = 3, 8  # the padding token occurs in prompts too
PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 2, 6, 11, 13], [12, 3], [1, 2, 3, 4], [9], [10, 2, 10, 2]]


def tiny_llama() -> Any:
    """Large random weights, so that the answers depend on the prompts; dropout that would show."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,
        attention_dropout=0.5,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().eval()


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], stop_ids: tuple[int, ...] = ()) -> list[int]:
    """One token at a time, the whole row through the model each time."""
    row = list(prompt)
    while len(row) < len(prompt) + LENGTH:
        token = int(model(torch.tensor([row])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        row.append(token)
    return row[len(prompt) :]


def greedy(model: Any, batch_size: int, stop_ids: tuple[int, ...] = ()) -> list[list[int]]:
    return generate_greedy(
        model, PROMPTS, max_new_tokens=LENGTH, stop_ids=stop_ids, pad_id=PAD, batch_size=batch_size
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_any_batch_size_gives_the_answers_of_single_prompts(model: Any, batch_size: int) -> None:
    expected = [by_hand(model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 3, "the model has to tell the prompts apart"
    assert greedy(model, batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_stop_token_ends_an_answer_and_is_left_out(model: Any, batch_size: int) -> None:
    free = [by_hand(model, prompt) for prompt in PROMPTS]
    stops = (free[0][2], free[2][4])
    expected = [by_hand(model, prompt, stops) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1, "the answers have to end at different lengths"
    assert greedy(model, batch_size, stops) == expected


def test_the_models_own_generation_settings_are_set_aside(model: Any) -> None:
    expected = [by_hand(model, prompt) for prompt in PROMPTS]
    own = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        eos_token_id=2,
    )
    before, model.generation_config = model.generation_config, own
    try:
        assert greedy(model, 3) == expected
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_dropout_is_off_inside_and_modes_come_back() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    answers = greedy(model, 3)
    assert [module.training for module in model.modules()] == modes
    assert answers == [by_hand(model.eval(), prompt) for prompt in PROMPTS]


def test_modes_come_back_after_an_error(model: Any) -> None:
    model.train()
    with pytest.raises(IndexError):
        generate_greedy(model, [[10_000]], max_new_tokens=2, stop_ids=[], pad_id=PAD, batch_size=1)
    assert model.training
    model.eval()


def test_an_empty_prompt_is_refused_and_none_is_no_work(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate_greedy(model, [[3], []], max_new_tokens=2, stop_ids=[], pad_id=PAD, batch_size=1)
    assert generate_greedy(model, [], max_new_tokens=2, stop_ids=[], pad_id=PAD, batch_size=1) == []


def test_padding_is_on_the_left() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], PAD, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_text_helpers() -> None:
    assert until_stop([4, 5, 2, 6], [2, 3]) == [4, 5]
    assert until_stop([4, 5], []) == [4, 5]
    assert exact_match(["1+1=", "2+2="], ["2", "5"], lambda p, t: t == "2" and p == "1+1=").tolist() == [
        True,
        False,
    ]


WORKER = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
from test_evaluation_generation import PROMPTS, PAD, LENGTH, tiny_llama
from rcpo.evaluation.generation import generate_greedy
rank, stops, folder = int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
passes = []
model = tiny_llama().eval()
model.register_forward_pre_hook(lambda *_: passes.append(dist.all_reduce(__import__("torch").ones(1))))
mine = PROMPTS[:6] if rank == 0 else PROMPTS[6:]
answers = generate_greedy(model, mine, max_new_tokens=LENGTH, stop_ids=stops, pad_id=PAD, batch_size=2,
                          synced_gpus=True)
json.dump({"answers": answers, "passes": len(passes)}, open(f"{folder}/{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.mark.serial
def test_two_ranks_with_uneven_prompts_take_the_same_passes(model: Any, tmp_path: Path) -> None:
    """Every forward pass is a collective, as under ZeRO-3: a rank with less to do must not leave early."""
    stops = (by_hand(model, PROMPTS[0])[2],)
    arguments = [str(Path(__file__).parent), json.dumps(stops), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, arguments[0], str(rank), *arguments[1:]],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["passes"] == found[1]["passes"]
    assert found[0]["answers"] + found[1]["answers"] == [by_hand(model, prompt, stops) for prompt in PROMPTS]
