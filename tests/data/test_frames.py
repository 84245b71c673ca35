"""What stands around an answer, read off small templates by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcpo.data.frames import REASON, WORDS, Frame, Render, find_frame
from rcpo.data.records import BadRow, Message

SPECIAL = ["<end>", "<pad>", "<eos>"]


def template(generation: str, answer: str, reasoned: str | None = None) -> Render:
    """A question, then a generation prompt, an answer, or an answer with its reasoning (None: refused)."""

    def render(messages: list[Message], prompt: bool) -> str:
        assert prompt == (len(messages) == 1)
        after = generation
        if not prompt:
            thinks = "reasoning_content" in messages[1]
            if thinks and reasoned is None:
                raise BadRow("takes no reasoning")
            after = str(reasoned) if thinks else answer
        return f"Q: {messages[0]['content']}{after}"

    return render


@pytest.mark.parametrize(
    ("closing", "eos", "ending", "ends"),
    [
        ("<end>\n", "<eos>", "<end>", True),
        ("!<end>\n", "<eos>", "!<end>", True),
        ("<end><eos>\n", "<eos>", "<end><eos>", True),
        ("<end><pad><eos><pad>", "<eos>", "<end><pad><eos>", True),
        ("<end>\n<eos>", "<eos>", "<end>", True),  # nothing is generated after the turn
        ("<end><pad>", "<eos>", "<end>", True),
        ("<eos>", "<eos>", "<eos>", True),
        ("<end><eos>", None, "<end>", True),
        (" .\n", "<eos>", " .", False),
        ("", "<eos>", "", False),
    ],
)
def test_what_is_learned_ends_with_the_turn(closing: str, eos: str | None, ending: str, ends: bool) -> None:
    frame = find_frame(template("\nA:", f"\nA: {WORDS}{closing}"), ["", *SPECIAL], eos)
    assert (frame.lead, frame.closing, frame.ending, frame.ends) == (" ", closing, ending, ends)
    assert frame.ends_of_turns == tuple(SPECIAL) and frame.tail == "\nA:"


def test_of_special_tokens_at_one_place_the_longest_ends_the_turn() -> None:
    frame = find_frame(template("\nA:", f"\nA:{WORDS}<end><end>"), ["<end>", "<end><end>"], None)
    assert frame.ending == "<end><end>"


THOUGHTS = f"\n<think>\n{REASON}\n</think>\n\n{WORDS}<end>"
FRAMES = {
    "an empty block that a finished turn lacks": (
        template("\n<think></think>\n", f"\n{WORDS}<end>"),
        Frame(surplus="<think></think>\n"),
    ),
    "a block around a few words": (
        template("\n<one>text<two>", f"\n{WORDS}<end>"),
        Frame(surplus="<one>text<two>"),
    ),
    "a space that a finished turn lacks": (template("\nA: ", f"\nA:{WORDS}<end>"), Frame(surplus=" ")),
    "an opened block that a finished turn lacks": (
        template("\n<think>\n", f"\n{WORDS}<end>", THOUGHTS),
        Frame(opening="<think>\n", close="\n</think>\n\n"),
    ),
    "an opened block, and a template that takes no reasoning": (
        template("\n<think>\n", f"\n{WORDS}<end>"),
        Frame(opening="<think>\n", close="\n</think>\n\n"),
    ),
    "an opened block of an unknown name": (
        template("\n<|mind|>", f"\n{WORDS}<end>", f"\n<|mind|>{REASON}<|done|>{WORDS}<end>"),
        Frame(opening="<|mind|>", close="<|done|>"),
    ),
    "an opened block that a finished turn does not close": (
        template("\n<think>\n", f"\n<think>\n{WORDS}<end>", THOUGHTS),
        Frame(lead="<think>\n", opening="<think>\n", close="\n</think>\n\n"),
    ),
    "reasoning that nothing opens": (
        template("\nA:", f"\nA:{WORDS}<end>", f"\nA:{REASON};{WORDS}<end>"),
        Frame(),
    ),
    "an opened block that a finished turn shows empty": (
        template("\n<think>\n", f"\n<think>\n\n</think>\n\n{WORDS}<end>", THOUGHTS),
        Frame(lead="\n</think>\n\n"),
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_where_an_answer_begins(name: str) -> None:
    render, expected = FRAMES[name]
    found = find_frame(render, SPECIAL, "<eos>")
    ending = {"closing": "<end>", "ending": "<end>", "ends": True, "ends_of_turns": tuple(SPECIAL)}
    assert found == replace(expected, tail=found.tail, **ending)


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (template("\nA:", "\nA: <end>"), "renders no answer"),
        (template("\n<answer>", f"\n<reply>{WORDS}<end>"), "elsewhere than where generation would begin"),
        (template("\n<one>x", f"\n{WORDS}<end>"), "elsewhere than where generation would begin"),
    ],
)
def test_a_template_with_the_answer_elsewhere_is_refused(render: Render, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        find_frame(render, SPECIAL, "<eos>")
