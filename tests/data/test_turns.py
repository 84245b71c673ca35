"""Responses with several turns: which of their tokens are learned, stored, and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import TEMPLATES, tokenizer_of

from rcpo.config.data import DataConfig
from rcpo.data.collate import collate, collate_indices
from rcpo.data.dataset import make_encoder
from rcpo.data.encode import Encoded
from rcpo.data.readers import RowBlock
from rcpo.data.records import Example
from rcpo.data.store import PairDataset, TokenStore
from rcpo.data.tokens import Meta, TokenWriter, open_tokens

QWEN = tokenizer_of("qwen")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PROMPT = [said("system", "s"), said("user", "one"), said("assistant", "before"), said("user", "two")]
CHOSEN = [said("assistant", "first"), said("user", "three"), said("assistant", "second one")]
REJECTED = [said("assistant", "worse"), said("user", "why?"), said("assistant", "no"), said("user", "so?"),
            said("assistant", "bad")]  # fmt: skip


def encoded_of(row: dict[str, Any], learn: str = "all", **data: Any) -> Encoded:
    config = DataConfig(name="pairs", learn=learn, **{"template": "chatml", **data})
    block = RowBlock([1], [row])
    return make_encoder(config, QWEN).fitted(block, "x")(block)


def shown(encoded: Encoded) -> list[list[tuple[str, bool]]]:
    """Of each response its text in pieces, and whether they are learned."""
    kept = np.ones(len(encoded.tokens), dtype=bool)
    for first, end in encoded.contexts:
        kept[first:end] = False
    found, start = [], 0
    for number, length in enumerate(encoded.lengths[0].tolist()):
        own = range(start, start + length)
        start += length
        edges = [place for place in own[1:] if kept[place] != kept[place - 1]]
        pieces = zip([own[0], *edges], [*edges, own[-1] + 1], strict=True) if length and number else ()
        found.append([(QWEN.decode(encoded.tokens[a:b]), bool(kept[a])) for a, b in pieces])
    return found[1:3]


@pytest.mark.parametrize("template", ["chatml", str(TEMPLATES / "qwen.jinja")])
def test_every_answer_is_learned_and_what_is_said_between_them_is_not(template: str) -> None:
    chosen, rejected = shown(
        encoded_of({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, template=template)
    )
    between = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == [
        ("first<|im_end|>", True),
        (between.format("three"), False),
        ("second one<|im_end|>", True),
    ]
    assert [piece for piece, learned in rejected if learned] == [
        f"{text}<|im_end|>" for text in ("worse", "no", "bad")
    ]
    assert [piece for piece, learned in rejected if not learned] == [
        between.format("why?"),
        between.format("so?"),
    ]


def test_the_last_answer_alone_is_learned_after_the_others() -> None:
    encoded = encoded_of({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, "last")
    chosen, rejected = shown(encoded)
    assert [piece for piece, learned in chosen if learned] == ["second one<|im_end|>"]
    assert chosen[0][0].startswith("first<|im_end|>") and not chosen[0][1]
    assert [piece for piece, learned in rejected if learned] == ["bad<|im_end|>"]
    assert encoded.tally.counts["longer_responses"] == 2 and not encoded.tally.counts["special_tokens"]


def test_tool_calls_are_learned_and_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": "1"}}}
    turns = [
        said("assistant", "", tool_calls=[call]),
        said("tool", "it is sunny"),
        said("assistant", "sunny"),
    ]
    row = {
        "prompt": [said("user", "sky?")],
        "chosen": turns,
        "rejected": [said("assistant", "no")],
        "tools": TOOLS,
    }
    template = str(TEMPLATES / "calls.jinja")
    chosen, rejected = shown(encoded_of(row, template=template))
    assert [learned for _, learned in chosen] == [True, False, True]
    assert "look" in chosen[0][0] and chosen[0][0].endswith("</call><|im_end|>")
    assert "it is sunny" in chosen[1][0] and chosen[2][0] == "sunny<|im_end|>"
    assert rejected == [("no<|im_end|>", True)]


@pytest.mark.parametrize(
    ("template", "options", "learned"),
    [  # the last answer has an empty block of thoughts, earlier ones have none
        ("thinking", {}, ["first<|im_end|>", "<think>\n\n</think>\n\nsecond one<|im_end|>"]),
        ("thinking", {"enable_thinking": False}, ["first<|im_end|>", "second one<|im_end|>"]),
        ("closed", {}, ["first<|im_end|>", "second one<|im_end|>"]),
    ],
)
def test_answers_are_learned_as_the_conversation_shows_them(
    template: str, options: dict[str, Any], learned: list[str]
) -> None:
    row = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    path = str(TEMPLATES / f"{template}.jinja")
    chosen, _ = shown(encoded_of(row, template=path, template_options=options))
    assert [piece for piece, kept in chosen if kept] == learned
    assert shown(encoded_of(row, "last", template=path, template_options=options))[0][-1] == (
        learned[-1],
        True,
    )


@pytest.mark.parametrize(
    ("reasoning", "first"), [("strip", "first<|im_end|>"), ("empty", "\n</think>\n\nfirst<|im_end|>")]
)
def test_a_block_that_generation_opens_is_in_no_earlier_turn(reasoning: str, first: str) -> None:
    row = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    chosen, _ = shown(encoded_of(row, template=str(TEMPLATES / "opened.jinja"), reasoning=reasoning))
    assert [piece for piece, kept in chosen if kept] == [first, "second one<|im_end|>"]


def test_reasoning_that_the_template_leaves_out_of_an_earlier_answer_is_refused_with_the_choices() -> None:
    turns = [CHOSEN[0] | {"reasoning_content": "so"}, *CHOSEN[1:]]
    row = {"prompt": PROMPT, "chosen": turns, "rejected": REJECTED}
    template = str(TEMPLATES / "thinking.jinja")
    [(_, reason)] = encoded_of(row, template=template).tally.bad
    assert "data.reasoning=strip" in reason and "data.learn=last" in reason
    for choice in ({"reasoning": "strip"}, {"learn": "last"}):
        assert not encoded_of(row, template=template, **choice).tally.bad  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_an_answer_that_the_file_marks_is_read_alone(mark: dict[str, Any]) -> None:
    row = {"prompt": PROMPT, "chosen": [CHOSEN[0] | mark, *CHOSEN[1:]], "rejected": REJECTED}
    chosen, _ = shown(encoded_of(row))
    assert [piece for piece, learned in chosen if learned] == ["second one<|im_end|>"]


def test_what_cannot_be_learned_is_a_bad_row() -> None:
    open_ended = {"prompt": PROMPT, "chosen": CHOSEN[:2], "rejected": REJECTED}
    assert "does not end with an answer" in encoded_of(open_ended).tally.bad[0][1]
    text = {
        "prompt": "\n\nHuman: a\n\nAssistant:",
        "chosen": " b\n\nHuman: c\n\nAssistant: d",
        "rejected": " e",
    }
    assert "data.template" in encoded_of(text, template=None).tally.bad[0][1]
    assert encoded_of(text, "last", template=None).tally.counts["turns_as_text"] == 1
    assert [learned for _, learned in shown(encoded_of(text))[0]] == [True, False, True]


def test_a_cut_leaves_an_answer_or_refuses_the_row() -> None:
    row = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED[:1]}
    prompt, chosen, *_ = encoded_of(row, max_length=None, max_prompt_length=None).lengths[0].tolist()
    limit = {"max_length": prompt + chosen - 2, "max_prompt_length": None}
    cut = shown(encoded_of(row, "last", **limit))[0]
    assert cut[-1][1] and "second one<|im_end|>".startswith(cut[-1][0])
    learned = len(QWEN("second one<|im_end|>", add_special_tokens=False)["input_ids"])
    encoded = encoded_of(row, "last", max_length=prompt + chosen - learned, max_prompt_length=None)
    assert "data.max_length leaves no answer" in encoded.tally.bad[0][1]


A = Example("a", [1, 2], [10, 11, 12, 13], [20, 21], contexts={"chosen": ((1, 3),)})
B = Example("b", [3], [30], [40, 41, 42], contexts={"rejected": ((0, 2),)})


def test_a_batch_scores_the_learned_tokens_alone() -> None:
    batch = collate([A, B], 0)
    assert batch.input_ids.tolist() == [
        [1, 2, 10, 11, 12, 13],
        [3, 30, 0, 0, 0, 0],
        [1, 2, 20, 21, 0, 0],
        [3, 40, 41, 42, 0, 0],
    ]
    # 10 and 13 of the first row, 30, both of the third, 42 of the last: each predicted from the place before
    assert batch.labels.tolist() == [10, 13, 30, 20, 21, 42]
    assert batch.predictors.tolist() == [1, 4, 6, 13, 14, 20]
    assert batch.sequences.tolist() == [0, 0, 1, 2, 2, 3]
    assert batch.lengths.tolist() == [2, 1, 2, 1]
    shared = collate([A, B], 0, layout="shared")
    assert shared.labels.tolist() == batch.labels.tolist() and shared.lengths.tolist() == [2, 1, 2, 1]
    flat = shared.input_ids.ravel()
    assert flat[shared.predictors].tolist() == [2, 12, 3, 2, 20, 41]  # a prompt's end predicts a first token


def test_a_store_keeps_what_is_only_read(tmp_path: Path) -> None:
    plain = Example("c", [5, 6, 7], [50, 51], [60])
    dataset = PairDataset.of([plain, A, B])
    assert [dataset[place] for place in range(3)] == [plain, A, B]
    assert dataset.learned_lengths(("chosen", "rejected")).tolist() == [[2, 1], [2, 2], [1, 1]]
    assert dataset.response_lengths(("chosen", "rejected")).tolist() == [[2, 1], [4, 2], [1, 3]]
    assert TokenStore.of([A]).digest != TokenStore.of([Example("a", *A.parts)]).digest
    # kto scores another prompt's chosen response after each prompt: b's after a's, c's after b's
    batch = collate_indices(PairDataset.of([B, A]), [0], 0, sides=("chosen", "rejected", "mismatched"))
    assert batch.labels.tolist() == [30, 42, 10, 13]
    mismatched = PairDataset.of([B, A], max_length=4)
    assert mismatched.mismatched(0) == [10, 11, 12] and mismatched.mismatched_contexts(0) == ((1, 3),)
    assert mismatched.learned_lengths(("mismatched",)).tolist() == [[1], [1]]

    writer = TokenWriter(tmp_path, Meta("key", {}, ["x"]))
    writer.begin_part()
    row = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    pieces = [encoded_of(one) for one in (row, row | {"chosen": CHOSEN[:1], "rejected": REJECTED[:1]}, row)]
    for piece in pieces:
        writer.add(piece, "x")
    writer.finish()
    store, _ = open_tokens(tmp_path, "key", verify=True)
    assert store.example(0).contexts == store.example(2).contexts and not store.example(1).contexts
    assert store.learned[0].tolist() == store.learned[2].tolist()
    assert store.lengths[0, 1] > store.learned[0, 1]
