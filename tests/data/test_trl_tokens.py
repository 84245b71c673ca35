"""The same rows through TRL's DPO tokenisation: equal where both are defined, and why where they differ."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from kinds import tokenizer_of
from test_templates import encode, pair, parts, says, user
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds


def trl_tokens(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of each row, by TRL's own code."""
    arguments = DPOConfig(output_dir="none", report_to=[], max_length=None, bf16=False, use_cpu=True)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    found = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, "train")
    return [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in found]


def ours(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
    encoded = encode(tokenizer, *rows)
    return [parts(encoded, row) for row in range(len(rows))]


TURNS = [
    pair([user("What is the sum?")], "It is 357.", "12"),
    pair([user("hello"), says("hi"), user("why?\n")], "because\n\nof it", "🙂"),
]


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_conversations_are_the_same(family: str) -> None:
    tokenizer = tokenizer_of(family)
    assert ours(tokenizer, TURNS) == trl_tokens(tokenizer, TURNS)


@pytest.mark.parametrize("family", ["qwen", "gemma", "zephyr"])
def test_trl_learns_the_line_break_after_the_end_of_a_turn(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for own, theirs in zip(ours(tokenizer, TURNS), trl_tokens(tokenizer, TURNS), strict=True):
        assert own[0] == theirs[0]
        for response, longer in zip(own[1:], theirs[1:], strict=True):
            # generation stops at the end-of-turn token: what the template writes behind it is never made
            assert longer[: len(response)] == response
            assert tokenizer.decode(longer[len(response) :]).strip() == ""


PROMPTED = {"prompt": "The sum is", "chosen": " four.", "rejected": " two."}


def test_text_is_the_same() -> None:
    rows = [
        {"prompt": "What is the sum of 1 and 2?", "chosen": " The sum is 3.", "rejected": " I think 4"},
        {"chosen": "The sum is four.", "rejected": "The sum is two."},
    ]
    for family in ("neox", "qwen", "llama3"):
        tokenizer = tokenizer_of(family)
        assert ours(tokenizer, rows[:1]) == trl_tokens(tokenizer, rows[:1])
        # TRL takes what two plain texts have in common for their prompt; rcpo wants a column that says it
        assert ours(tokenizer, [PROMPTED]) == trl_tokens(tokenizer, rows[1:])


def test_trl_takes_the_end_of_a_prompt_away_where_a_token_spans_the_border() -> None:
    tokenizer = tokenizer_of("neox")
    row = {"prompt": "the su", "chosen": "m is", "rejected": "n is"}
    [own], [theirs] = ours(tokenizer, [row]), trl_tokens(tokenizer, [row])
    assert tokenizer.decode(own[0]) == "the su"  # what generation is given
    assert tokenizer.decode(theirs[0]) != "the su" and len(theirs[0]) < len(own[0])
    assert tokenizer.decode(own[0] + own[1]) == tokenizer.decode(theirs[0] + theirs[1])
