"""Files of the usual kinds as people have them: other names, nesting, and words; expected rows typed by hand.

A conversation is written `user: q | assistant: a`, plain text as itself.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from rcpo.data.conversations import read_json_cells
from rcpo.data.detection import find_form
from rcpo.data.formats import read_row
from rcpo.data.forms import FormOptions
from rcpo.data.records import BadRow, Content, Row
from rcpo.errors import ConfigError


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def typed(role: str, text: str, kind: str = "text") -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "text": text}]}


def gemini(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def told(content: Content | None) -> str | None:
    if not isinstance(content, list):
        return content
    return " | ".join(f"{message['role']}: {message.get('content')}" for message in content)


def read(*rows: dict[str, Any], **options: Any) -> list[Row]:
    parsed = [read_json_cells(row) for row in rows]
    form = find_form(parsed, FormOptions(**options), "x.jsonl")
    return [read_row(one) for row in parsed for one in form.rows(row)]


TEXT = ("q", "a", "b")
CHAT = ("user: q", "assistant: a", "assistant: b")
SYSTEM = ("system: s | user: q", "assistant: a", "assistant: b")
LATER = ("user: p | assistant: x | user: q", "assistant: a", "assistant: b")
QA, QB = [user("q"), says("a")], [user("q"), says("b")]

PAIRS: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    # LLaMA-Factory
    "sharegpt, lists": ({"conversations": [human("q")], "chosen": [gpt("a")], "rejected": [gpt("b")]}, CHAT),
    "sharegpt, system column": (
        {"conversations": [human("q")], "system": "s", "chosen": gpt("a"), "rejected": gpt("b")},
        SYSTEM,
    ),
    "sharegpt, later turn": (
        {"conversations": [human("p"), gpt("x"), human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        LATER,
    ),
    "sharegpt, whole": ({"chosen": [human("q"), gpt("a")], "rejected": [human("q"), gpt("b")]}, CHAT),
    "openai messages": ({"messages": [user("q")], "chosen": says("a"), "rejected": says("b")}, CHAT),
    "alpaca, empty columns": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "system": "", "history": []},
        TEXT,
    ),
    "alpaca, history": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "history": [["p", "x"]]},
        LATER,
    ),
    "alpaca, system": ({"instruction": "q", "chosen": "a", "rejected": "b", "system": "s"}, SYSTEM),
    # axolotl
    "chatml.intel": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, SYSTEM),
    "chatml.icr": ({"system": "s", "input": "q", "chosen": "a", "rejected": "b"}, SYSTEM),
    "chatml.argilla": (
        {"system": "s", "instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        SYSTEM,
    ),
    "chatml.argilla_chat": ({"chosen": QA, "rejected": QB}, CHAT),
    "chatml.ultra": ({"system": "s", "prompt": "q", "chosen": QA, "rejected": QB}, SYSTEM),
    "chat_template.default": ({"messages": [user("q")], "chosen": says("a"), "rejected": says("b")}, CHAT),
    # others
    "open orca's system": ({"system_prompt": "s", "question": "q", "chosen": "a", "rejected": "b"}, SYSTEM),
    "openai's preferences": (
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [says("a")],
            "non_preferred_output": [says("b")],
        },
        CHAT,
    ),
    "capybara": (
        {"conversation": [{"input": "q", "output": "a"}], "chosen": QA, "rejected": QB, "source": "x"},
        CHAT,
    ),
    "other roles": (
        {
            "prompt": [{"role": "Human", "content": "q"}],
            "chosen": [{"role": "bot", "content": "a"}],
            "rejected": [{"role": "model", "content": "b"}],
        },
        CHAT,
    ),
    "from and content": (
        {
            "chosen": [{"from": "user", "content": "q"}, {"from": "assistant", "content": "a"}],
            "rejected": [{"from": "user", "content": "q"}, {"from": "assistant", "content": "b"}],
        },
        CHAT,
    ),
    "role and value": (
        {
            "prompt": [{"role": "user", "value": "q"}],
            "chosen": [{"role": "assistant", "value": "a"}],
            "rejected": [{"role": "assistant", "value": "b"}],
        },
        CHAT,
    ),
    "dpo paper": ({"prompt": "q", "y_w": "a", "y_l": "b"}, TEXT),
    "reward modelling": ({"question": "q", "text_chosen": "a", "text_rejected": "b"}, TEXT),
    "capitals": ({"prompt": "q", "Chosen": "a", "Rejected": "b"}, TEXT),
    "accept and reject": ({"prompt": "q", "accept": "a", "reject": "b"}, TEXT),
    "correct and incorrect": ({"prompt": "q", "correct_answer": "a", "incorrect_answer": "b"}, TEXT),
    "preferred and not": ({"prompt": "q", "preferred": "a", "non_preferred": "b"}, TEXT),
    "stack exchange, more columns": (
        {"qid": 1, "question": "q", "date": "2020", "metadata": ["x"], "response_j": "a", "response_k": "b"},
        TEXT,
    ),
    "chosen beside a model and a score": (
        {
            "prompt": "q",
            "chosen": "a",
            "chosen-rating": 5.0,
            "chosen-model": "m",
            "rejected": "b",
            "rejected-rating": 1.0,
            "rejected-model": "n",
        },
        TEXT,
    ),
    # parts
    "typed parts": (
        {
            "prompt": [typed("user", "q")],
            "chosen": [typed("assistant", "a")],
            "rejected": [typed("assistant", "b")],
        },
        CHAT,
    ),
    "responses API": (
        {
            "prompt": [typed("user", "q", "input_text")],
            "chosen": [typed("assistant", "a", "output_text")],
            "rejected": [typed("assistant", "b", "output_text")],
        },
        CHAT,
    ),
    "one part, no list": (
        {
            "prompt": [user("q")],
            "chosen": [{"role": "assistant", "content": {"type": "text", "text": "a"}}],
            "rejected": [{"role": "assistant", "content": {"text": "b"}}],
        },
        CHAT,
    ),
    "parts with the keys of all": (
        {
            "chosen": [
                {"role": "user", "content": [{"type": "text", "text": "q", "image": None}]},
                says("a"),
            ],
            "rejected": QB,
        },
        CHAT,
    ),
    # comparisons
    "second, in words": (
        {"prompt": "q", "response_a": "b", "response_b": "a", "preference": "Response B"},
        TEXT,
    ),
    "letters after the word": ({"prompt": "q", "responseA": "a", "responseB": "b", "Winner": "A"}, TEXT),
    "letters inside": (
        {"prompt": "q", "model_a_response": "a", "model_b_response": "b", "winner": "model_a"},
        TEXT,
    ),
    "ordinals": ({"prompt": "q", "first_response": "b", "second_response": "a", "label": "second"}, TEXT),
    "spaces": ({"Prompt": "x", "prompt": "q", "Response 1": "a", "Response 2": "b", "Preference": 1}, TEXT),
    "a degree": (
        {"prompt": "q", "completion_a": "a", "completion_b": "b", "overall_pref": "A-is-slightly-better"},
        TEXT,
    ),
    "a sign": ({"prompt": "q", "answer_a": "b", "answer_b": "a", "verdict": "B>>A"}, TEXT),
    "a chosen number": ({"prompt": "q", "response_1": "b", "response_2": "a", "chosen": 2}, TEXT),
    "another name": ({"prompt": "q", "output_1": "b", "output_2": "a", "who_won": "output_2"}, TEXT),
    "annotators as objects": (
        {
            "prompt": "q",
            "response_1": "a",
            "response_2": "b",
            "annotations": [
                {"annotator": "x", "label": 1},
                {"annotator": "y", "label": 1},
                {"annotator": "z", "label": 2},
            ],
        },
        TEXT,
    ),
    "annotators with a suffix": (
        {"prompt": "q", "response1": "b", "response2": "a", "rater_1_label": "2", "rater_2_label": "2"},
        TEXT,
    ),
    "numbered labels": (
        {"prompt": "q", "response1": "b", "response2": "a", "label_1": 2, "label_2": 2, "label_3": 1},
        TEXT,
    ),
    "arena": (
        {
            "conversation_a": QB,
            "conversation_b": QA,
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "turn": 1,
            "language": "English",
        },
        CHAT,
    ),
    "arena, flags and turns as JSON": (
        {
            "id": 1,
            "model_a": "m",
            "model_b": "n",
            "prompt": json.dumps(["q"]),
            "response_a": json.dumps(["a"]),
            "response_b": json.dumps(["b"]),
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        CHAT,
    ),
    "safety": (
        {
            "prompt": "q",
            "response_0": "b",
            "response_1": "a",
            "response_0_sha256": "x",
            "response_1_sha256": "y",
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        TEXT,
    ),
    "a list of two": (
        {
            "prompt": "q",
            "summaries": [{"text": "a", "policy": "m"}, {"text": "b", "policy": "n"}],
            "choice": 0,
        },
        TEXT,
    ),
    # scores and ranks
    "scores in columns": (
        {
            "prompt": "q",
            "response_1": "b",
            "response_2": "x",
            "response_3": "a",
            "score_1": 1,
            "score_2": 2,
            "score_3": 3,
        },
        TEXT,
    ),
    "two scores": ({"question": "q", "answer_0": "b", "answer_1": "a", "score_0": 0, "score_1": 0.5}, TEXT),
    "ranks in columns": (
        {"prompt": "q", "response_a": "a", "response_b": "b", "rank_a": 1, "rank_b": 2},
        TEXT,
    ),
    "by model": (
        {"prompt": "q", "responses": {"m": "b", "n": "a"}, "scores": {"n": 9, "m": 1}},
        TEXT,
    ),
    "distilabel": (
        {"instruction": "q", "generations": ["b", "a"], "ratings": [1.0, 4.0], "rationales": ["", ""]},
        TEXT,
    ),
    "gemini": (
        {
            "contents": [gemini("user", "q")],
            "completions": [
                {"score": 0.0, "completion": gemini("model", "b")},
                {"score": 1.0, "completion": gemini("model", "a")},
            ],
        },
        CHAT,
    ),
    "nectar": (
        {
            "prompt": "q",
            "answers": [
                {"answer": "b", "model": "m", "rank": 7.0},
                {"answer": "a", "model": "n", "rank": 1.0},
            ],
            "num_responses": 2,
        },
        TEXT,
    ),
    "a tree that is the row": (
        {
            "text": "q",
            "role": "prompter",
            "message_id": "1",
            "replies": [
                {"text": "a", "role": "assistant", "rank": 0},
                {"text": "b", "role": "assistant", "rank": 1},
            ],
        },
        CHAT,
    ),
    "children with scores": (
        {
            "tree": {
                "content": "q",
                "role": "user",
                "children": [
                    {"content": "b", "role": "assistant", "score": -1},
                    {"content": "a", "role": "assistant", "score": 2},
                ],
            }
        },
        CHAT,
    ),
    # cells of CSV
    "csv scores": (
        {"prompt": "q", "response_1": "b", "response_2": "a", "score_1": "1", "score_2": "2.5"},
        TEXT,
    ),
    "csv lists": ({"prompt": "q", "responses": '["b", "a"]', "scores": "[1, 2]"}, TEXT),
    "csv comparison": ({"prompt": "q", "answer1": "b", "answer2": "a", "label": "2"}, TEXT),
    "one flag": ({"prompt": "q", "response_a": "b", "response_b": "a", "is_a_better": False}, TEXT),
    "a flag of the second": ({"prompt": "q", "answer_1": "b", "answer_2": "a", "answer_2_wins": 1}, TEXT),
    "Cohere's roles": (
        {
            "messages": [{"role": "User", "content": "q"}],
            "chosen": {"role": "Chatbot", "content": "a"},
            "rejected": {"role": "Chatbot", "content": "b"},
        },
        CHAT,
    ),
    "votes": (
        {"question": "q", "answer_list": [{"answer": "b", "vote": 2}, {"answer": "a", "vote": 5}]},
        TEXT,
    ),
    "elo": ({"prompt": "q", "responses": ["b", "a"], "elo": [1000, 1200]}, TEXT),
    # the better answer in the conversation, the worse one beside it
    "swift": ({"messages": [user("q"), says("a")], "rejected_response": "b"}, CHAT),
    "swift, later": (
        {"messages": [user("p"), says("x"), user("q"), says("a")], "rejected_response": "b"},
        LATER,
    ),
    "swift, a message": ({"messages": [user("q"), says("a")], "rejected_response": [says("b")]}, CHAT),
    "swift, whole": ({"messages": [user("q"), says("a")], "rejected_messages": [user("q"), says("b")]}, CHAT),
    "csv messages": ({"chosen": json.dumps(QA), "rejected": json.dumps(QB)}, CHAT),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_rightly(name: str) -> None:
    row, wanted = PAIRS[name]
    [found] = read(row)
    assert (told(found.prompt), told(found.chosen), told(found.rejected)) == wanted


WANTED, UNWANTED = (*TEXT[:2], None), (TEXT[0], None, TEXT[1])
SAID, UNSAID = (*CHAT[:2], None), (CHAT[0], None, CHAT[1])
ONES: dict[str, tuple[dict[str, Any], tuple[str | None, ...]]] = {
    "alpaca kto": ({"instruction": "q", "input": "", "output": "a", "kto_tag": False}, UNWANTED),
    "messages, word": ({"messages": QA, "label": "rejected"}, UNSAID),
    "conversations, number": ({"conversations": [human("q"), gpt("a")], "label": 0}, UNSAID),
    "axolotl, whole completion": ({"completion": QA, "label": True}, SAID),
    "axolotl, intel": ({"system": "", "question": "q", "completion": "a", "label": True}, WANTED),
    "typed parts": ({"messages": [typed("user", "q"), typed("assistant", "a")], "label": 1}, SAID),
    "a thumb": ({"prompt": "q", "response": "a", "thumbs_up": False}, UNWANTED),
    "feedback": ({"prompt": "q", "response": "a", "feedback": "thumbs_down"}, UNWANTED),
    "csv": ({"prompt": "q", "completion": "a", "label": "False"}, UNWANTED),
    "minus one": ({"prompt": "q", "completion": "a", "label": -1}, UNWANTED),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, ("q\nc", "a", None)),
    "open orca": (
        {"system_prompt": "s", "question": "q", "response": "a"},
        ("system: s | user: q", "assistant: a", None),
    ),
    "alpaca with history": (
        {"instruction": "q", "input": "", "output": "a", "history": [["p", "x"]]},
        ("user: p | assistant: x | user: q", "assistant: a", None),
    ),
    "capybara's own": ({"conversation": [{"input": "q", "output": "a"}]}, SAID),
    "a dialogue": ({"dialogue": [{"speaker": "human", "text": "q"}, {"speaker": "bot", "text": "a"}]}, SAID),
    "gemini": ({"contents": [gemini("user", "q"), gemini("model", "a")]}, SAID),
    "prompt beside messages": ({"prompt": "q", "messages": QA}, SAID),
    "sharegpt with a call": (
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "4"},
                gpt("a"),
            ],
            "tools": "[]",
        },
        ("user: q | assistant: None | tool: 4", "assistant: a", None),
    ),
}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "q", "response": "a", "is_safe": True}, True),
        ({"prompt": "q", "response": "a", "label": "unsafe"}, False),
        ({"prompt": "q", "response": "a", "helpful": 0}, False),
        ({"prompt": "q", "response": "a", "feedback": "👍"}, True),
        ({"prompt": "q", "response": "a", "feedback": "👎"}, False),
    ],
)
def test_safety_and_helpfulness_are_labels(row: dict[str, Any], wanted: bool) -> None:
    [found] = read(row)
    assert (found.chosen, found.rejected) == (("a", None) if wanted else (None, "a"))


@pytest.mark.parametrize(("better", "worse"), [("accepted", "rejected"), ("chosen", "reject")])
def test_one_side_may_have_another_name(better: str, worse: str) -> None:
    [found] = read({"prompt": "q", better: "a", worse: "b"})
    assert (found.prompt, found.chosen, found.rejected) == ("q", "a", "b")


@pytest.mark.parametrize("name", ONES)
def test_a_single_answer_is_read_rightly(name: str) -> None:
    row, wanted = ONES[name]
    [found] = read(row)
    assert (told(found.prompt), told(found.chosen), told(found.rejected)) == wanted


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a list of texts": (
        {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]},
        r"data.columns.chosen='COLUMN\[0\]'",
    ),
    "an object with the prompt": (
        {"question": {"id": "1", "full_text": "q"}, "chosen": "a", "rejected": "b"},
        r"data.columns.prompt=COLUMN.full_text",
    ),
    "a conversation of another name": (
        {"parent": "x", "trajectory": [human("q")], "chosen": "a", "rejected": "b"},
        r"data.columns.prompt=trajectory",
    ),
    "a judgment between the numbers": (
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.37},
        r"\"data.columns.judgment='\{\{ \\\"first\\\" if preference < 1.5 else \\\"second\\\" \}\}'\"",
    ),
    "a verdict in other words": (
        {"question": "q", "response": "a", "acceptable?": "2/3"},
        r"data.columns.label='acceptable\?' \"data.labels=\{'2/3': true\}\", with false",
    ),
    "harm": (
        {"prompt": "q", "response": "a", "is_toxic": 1},
        r"data.columns.label='is_toxic' \"data.labels=\{'1': false",
    ),
    "a label that says the contrary": (
        {"prompt": "q", "completion": "a", "disliked": True},
        r"data.columns.label='disliked' \"data.labels=\{'true': false\}",
    ),
    "parts of trees": (
        {"message_id": "1", "parent_id": "0", "text": "a", "role": "assistant", "rank": 0},
        "a whole tree in each",
    ),
    "better and worse in a list": (
        {"instruction": "q", "input": "", "output": ["a", "b"]},
        r"data.columns.chosen='output\[0\]' data.columns.rejected='output\[1\]'",
    ),
    "pictures": ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "field 'images'"),
    "a picture in a part": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}],
            "chosen": [says("a")],
            "rejected": [says("b")],
        },
        "a part of the type 'image'",
    ),
    "two flags": (
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner_a": 1, "winner_b": 1, "winner_tie": 0},
        "not exactly one of 'winner_a', 'winner_b', 'winner_tie' is true",
    ),
    "numbers for a list of two": (
        {"prompt": "q", "answers": ["a", "b"], "label": 1},
        r"which may mean 'first' or 'second'.*data.labels=\{'0': first, '1': second\}, or the other way",
    ),
    "an earlier turn without an answer": (
        {"instruction": "q", "output": "a", "history": [["p"]]},
        "not a question and its answer",
    ),
}


def test_every_answer_of_a_labelled_conversation_has_no_label_to_learn_by() -> None:
    row = {"messages": [user("p"), says("x"), user("q"), says("a")], "label": True}
    assert [told(one.chosen) for one in read(row)] == ["assistant: a"]
    with pytest.raises(ConfigError, match=r"data.learn=all: x.jsonl has a label for each conversation"):
        read(row, learn="all")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_remedy(name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises((BadRow, ConfigError), match=reason):
        read(row)
