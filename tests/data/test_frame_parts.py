"""The parts of a frame by themselves: common beginnings and ends, blocks, opened thoughts; by hand."""

from __future__ import annotations

import pytest
from test_frames import template

from rcpo.data.frames import (
    ANSWER,
    NO_FRAME,
    OTHER,
    QUESTION,
    REASON,
    WORDS,
    Frame,
    _common_suffix,
    _ending,
    _is_block,
    _opening,
    _shared,
    find_frame,
    generation_start,
)
from rcpo.data.records import BadRow, Message


@pytest.mark.parametrize(
    ("prompt", "whole", "expected"),
    [
        ("abc", "abcd", 3),
        ("abc", "abd", 2),
        ("abc", "ab", 2),  # the shorter ends
        ("ab", "ab", 2),
        ("x", "y", 0),
        ("", "y", 0),
        ("a<one>b", "a<one>c", 6),  # a tag that both have is in common
        ("a<one>", "a<off>", 1),  # one that they continue differently is not
        ("a<one>", "a<one two>", 1),
        ("a[INST]", "a[/INST]", 1),
        ("<a><one>", "<a><two>", 3),
        ("a < one", "a < two", 4),  # no tag
    ],
)
def test_a_common_beginning_cuts_no_tag(prompt: str, whole: str, expected: int) -> None:
    assert _shared(prompt, whole) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("ab", "cb", 1), ("ab", "ab", 2), ("b", "ab", 1), ("ab", "b", 1), ("a", "b", 0), ("", "b", 0)],
)
def test_a_common_end(one: str, other: str, expected: int) -> None:
    assert _common_suffix(one, other) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think></think>", True),
        ("\n<think>\nnothing\n</think>\n\n", True),
        ("[THINK]x[/THINK]", True),
        ("<a><b><c>", True),
        ("<think>", False),
        ("x<think></think>", False),
        ("<think></think>x", False),
        ("", False),
        ("text", False),
    ],
)
def test_a_block_is_between_tags(text: str, expected: bool) -> None:
    assert _is_block(text) is expected


@pytest.mark.parametrize(
    ("closing", "special", "eos", "expected"),
    [
        ("", [], None, ("", False)),
        (" \n", ["<e>"], "<e>", ("", False)),
        ("ab \n", ["", "<e>"], "<e>", ("ab", False)),
        ("<e>", ["<e>"], None, ("<e>", True)),
        ("a<e>b<f>", ["<f>", "<e>"], "<f>", ("a<e>", True)),
        ("<e><f>x", ["<e>", "<f>"], "<f>", ("<e><f>", True)),
        ("<e><g><f>", ["<e>", "<f>", "<g>"], "<f>", ("<e><g><f>", True)),
        ("<e><g>x<f>", ["<e>", "<f>", "<g>"], "<f>", ("<e>", True)),
        ("<e><e><f>", ["<e>", "<f>"], "<f>", ("<e><e><f>", True)),
        ("<f><f>", ["<f>"], "<f>", ("<f><f>", True)),
        ("<e>", ["<", "<e>"], None, ("<e>", True)),  # the longest at its place
    ],
)
def test_the_end_of_a_turn(
    closing: str, special: list[str], eos: str | None, expected: tuple[str, bool]
) -> None:
    assert _ending(closing, special, eos) == expected


def refuses(messages: list[Message], prompt: bool) -> str:
    raise BadRow("takes no reasoning")


@pytest.mark.parametrize(
    ("prompt", "whole", "reasoned", "expected"),
    [
        # no block
        ("Q A:", f"Q A: {WORDS}", None, (4, "", "")),
        ("Q A:", f"Q A: {WORDS}", f"Q A: {REASON} {WORDS}", (4, "", "")),
        # opened by the prompt; a finished turn lacks it: the answer begins where the block would
        ("Q<think>", f"Q{WORDS}", None, (1, "<think>", "</think>")),
        ("Q<think>\n", f"Q{WORDS}", None, (1, "<think>\n", "\n</think>\n\n")),
        ("Q<think>", f"Q{WORDS}", f"Q<think>{REASON}|{WORDS}", (1, "<think>", "|")),
        # a finished turn opens it as well, and does not close it
        ("Q<think>", f"Q<think>{WORDS}", f"Q<think>{REASON}|{WORDS}", (1, "<think>", "|")),
        # a finished turn shows it closed
        ("Q<think>", f"Q<think></think>{WORDS}", None, (8, "", "")),
        ("Q<think>", f"Q<think> | {WORDS}", f"Q<think>{REASON} | {WORDS}", (8, "", "")),
        # something that a template writes before reasoning alone opens a block without a known tag
        ("Q::", f"Q{WORDS}", f"Q::{REASON};;{WORDS}", (1, "::", ";;")),
        ("Q", f"Q{WORDS}", f"Q{REASON};;{WORDS}", (1, "", "")),
    ],
)
def test_an_opened_block_of_thoughts(
    prompt: str, whole: str, reasoned: str | None, expected: tuple[int, str, str]
) -> None:
    render = refuses if reasoned is None else lambda messages, prompt: reasoned
    assert _opening(prompt, whole, render) == expected


def test_a_frame_by_hand() -> None:
    def render(messages: list[Message], prompt: bool) -> str:
        text = "".join(f"<{message['role']}>{message['content']}<end>\n" for message in messages)
        return text + "<assistant>" if prompt else text

    frame = find_frame(render, ["<end>", "", "<pad>"], "<pad>")
    assert frame == Frame(
        lead="",
        closing="<end>\n",
        ending="<end>",
        ends=True,
        ends_of_turns=("<end>", "<pad>"),
        tail="<end>\n<assistant>",
    )
    assert Frame("", "", "", False, (), "", "", "", "") == NO_FRAME
    assert (QUESTION["role"], OTHER["role"], ANSWER["role"]) == (
        "user",
        "user",
        "assistant",
    )
    assert QUESTION["content"][-1] != OTHER["content"][-1]  # else a tail would begin inside a question


def test_white_space_may_differ_wherever_it_stands() -> None:
    def render(messages: list[Message], prompt: bool) -> str:
        asked = str(messages[0]["content"])
        return f"{asked}\n\nA: \n" if prompt else f"{asked}\nA:{WORDS}"

    frame = find_frame(render, [], None)
    assert (frame.lead, frame.surplus, frame.closing) == ("", " \n", "")


@pytest.mark.parametrize(
    ("generation", "answer"),
    [("\nA:x", f"\nA:{WORDS}"), ("\nA:", f"\nB:{WORDS}"), ("\nA:x<a><b>", f"\nA:{WORDS}")],
)
def test_words_that_a_finished_turn_lacks_are_refused(generation: str, answer: str) -> None:
    with pytest.raises(BadRow) as problem:
        find_frame(template(generation, answer), [], None)
    assert str(problem.value).startswith(
        "renders an answer elsewhere than where generation would begin: after "
    )
    assert "data.template_options" in str(problem.value)


@pytest.mark.parametrize(
    ("prompt", "finished", "frame", "expected"),
    [
        ("QA:", "QA: x", NO_FRAME, 3),
        ("QA: ", "QA:x", Frame(surplus=" "), 3),
        ("QA(", "QAx", Frame(opening="("), 2),
        ("QA<a></a>", "QAx", NO_FRAME, 2),  # a closed block
        ("QA<think>", "QAx", NO_FRAME, 2),  # an open one
        ("QAw", "QAx", NO_FRAME, None),
        ("QAw<think>", "QAx", NO_FRAME, None),
    ],
)
def test_where_an_answer_begins_after_a_prompt(
    prompt: str, finished: str, frame: Frame, expected: int | None
) -> None:
    assert generation_start(prompt, finished, frame) == expected
