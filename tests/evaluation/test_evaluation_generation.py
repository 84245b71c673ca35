"""Greedy generation against a loop without cache, padding or `generate`, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rcpo.evaluation.generation import (
    Decoding,
    Generated,
    SeededDraws,
    generate,
    left_pad,
    repetition,
    until_stop,
)

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
    decoding = Decoding(LENGTH, stop_ids, PAD)
    return [answer.tokens for answer in generate(model, PROMPTS, decoding, batch_size=batch_size)]


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
        generate(model, [[10_000]], Decoding(2, (), PAD), batch_size=1)
    assert model.training
    model.eval()


def test_an_empty_prompt_is_refused_and_none_is_no_work(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, [[3], []], Decoding(2, (), PAD), batch_size=1)
    assert generate(model, [], Decoding(2, (), PAD), batch_size=1) == []


def test_padding_is_on_the_left() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], PAD, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_answer_knows_how_it_ended() -> None:
    stopped, cut = until_stop([4, 5, 2, 6], [2, 3]), until_stop([4, 5], [])
    assert stopped == Generated([4, 5], 2) and stopped.whole == [4, 5, 2]
    assert cut == Generated([4, 5], None) and cut.whole == [4, 5]


def test_repetition_counts_what_was_said_before() -> None:
    assert repetition([1, 2, 3]) is None
    assert repetition([1, 2, 3, 4, 5]) == 0
    # 1212 2121 1212 2121 1212: two kinds among five
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)


def test_draws_follow_the_models_distribution(model: Any) -> None:
    """2,000 seeds for one prompt's next token; temperature 2 and the exact softmax of the logits / 2."""
    prompt, count = PROMPTS[2], 2000
    decoding = Decoding(1, (), PAD, temperature=2.0)
    answers = generate(model, [prompt] * count, decoding, batch_size=count, seeds=list(range(count)))
    drawn = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=19) / count
    with torch.no_grad():
        exact = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 2.0, -1)
    assert exact.max() < 0.9, "there has to be something to draw"
    error = (exact * (1 - exact) / count).sqrt()
    assert ((drawn - exact).abs() < 4.5 * error + 1e-3).all()


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = {int(SeededDraws([seed], 1.0, top_p)(None, scores.clone()).argmax()) for seed in range(200)}
        assert drawn == kept


def test_a_seeded_answer_does_not_depend_on_its_company(model: Any) -> None:
    """Alone, in any batch, beside greedy rows: the same draws; greedy rows stay greedy."""
    seeds = [11, None, 13, None, 15, 16, 17]
    decoding = Decoding(LENGTH, (), PAD)
    together = generate(model, PROMPTS, decoding, batch_size=7, seeds=seeds)
    apart = generate(model, PROMPTS, decoding, batch_size=2, seeds=seeds)
    alone = [
        generate(model, [prompt], decoding, batch_size=1, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == apart == alone
    for number in (1, 3):
        assert together[number].tokens == by_hand(model, PROMPTS[number])
    other = generate(model, PROMPTS, decoding, batch_size=7, seeds=[seed and seed + 1 for seed in seeds])
    assert sum(a != b for a, b in zip(together, other, strict=True)) >= 3


WORKER = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
from test_evaluation_generation import PROMPTS, PAD, LENGTH, tiny_llama
from rcpo.evaluation.generation import Decoding, generate
rank, stops, folder = int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
passes = []
model = tiny_llama().eval()
model.register_forward_pre_hook(lambda *_: passes.append(dist.all_reduce(__import__("torch").ones(1))))
mine = PROMPTS[:6] if rank == 0 else PROMPTS[6:]
answers = generate(model, mine, Decoding(LENGTH, tuple(stops), PAD), batch_size=2, synced_gpus=True)
result = {"answers": [answer.tokens for answer in answers], "passes": len(passes)}
json.dump(result, open(f"{folder}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def test_two_ranks_with_uneven_prompts_take_the_same_passes(model: Any, tmp_path: Path) -> None:
    """Every forward pass is a collective, as under ZeRO-3: a rank with less to do must not leave early."""
    stops = (by_hand(model, PROMPTS[0])[2],)
    arguments = [str(Path(__file__).parent), json.dumps(stops), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(forked.__file__).parent)}
    workers = [
        forked.Popen(
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


def test_answers_end_where_the_models_positions_do() -> None:
    """Learned positions: a row beyond the last one is an error of the embedding."""
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=19, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(settings).eval()
    prompts = [[5] * 10, [6] * 3, [7] * 15, [8] * 10]
    decoding = Decoding(9, (), PAD, positions=16)
    found = generate(model, prompts, decoding, batch_size=4)
    assert [len(one.tokens) for one in found] == [6, 9, 1, 6]
    alone = [generate(model, [prompt], decoding, batch_size=1)[0] for prompt in prompts]
    assert found == alone
    with pytest.raises(ValueError, match="prompt 1 has 16 tokens, all that the model takes"):
        generate(model, [[5], [6] * 16], decoding, batch_size=4)


def test_rooms_for_answers_are_stepped_so_that_prompts_share_them() -> None:
    decoding = Decoding(512, (), PAD, positions=1024)
    assert [decoding.room(length) for length in (100, 512, 513, 600, 896, 897, 961, 1024)] == [
        512, 512, 448, 384, 128, 64, 63, 0
    ]  # fmt: skip
    assert Decoding(512, (), PAD).room(10_000) == 512
