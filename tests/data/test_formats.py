"""Rows in every form, good and bad."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.conversations import read_json_cells
from rcpo.data.detection import find_form
from rcpo.data.formats import as_conversation, read_row
from rcpo.data.forms import FormOptions
from rcpo.data.readers import parse_line
from rcpo.data.records import PAIRS, SFT, UNPAIRED, BadRow, Row

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Q, A, B = user("q"), says("a"), says("b")
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
PARTS = [{"type": "text", "text": "What is "}, {"text": "1\n"}, {"type": "text", "value": "+ "}, "1?"]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}

# name: (row, what it is)
FORMS: dict[str, tuple[dict[str, Any], Row]] = {
    "strings": ({"prompt": "p", "chosen": "c", "rejected": "r"}, Row(PAIRS, "p", "c", "r")),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, Row(PAIRS, [Q], [A], [B])),
    "prompt string": ({"prompt": "q", "chosen": [A], "rejected": [B]}, Row(PAIRS, [Q], [A], [B])),
    "answer strings": ({"prompt": [Q], "chosen": "a", "rejected": "b"}, Row(PAIRS, [Q], [A], [B])),
    "ultrafeedback": (
        {"prompt": "q", "prompt_id": "1", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A],
         "score_chosen": 8.0, "score_rejected": 2.0},
        Row(PAIRS, [Q], [A], [B], score_chosen=8.0, score_rejected=2.0, margin=6.0),
    ),
    "whole, with prompt": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, Row(PAIRS, [Q], [A], [B])),
    "whole": ({"chosen": [Q, A], "rejected": [Q, B]}, Row(PAIRS, [Q], [A], [B])),
    "whole, longer": (
        {"chosen": [Q, A, user("x"), A], "rejected": [Q, A, user("x"), B]},
        Row(PAIRS, [Q, A, user("x")], [A], [B]),
    ),
    "whole, one goes on": (
        {"chosen": [Q, A], "rejected": [Q, A, user("x"), B]},
        Row(PAIRS, [Q], [A], [A, user("x"), B]),
    ),
    "whole, other questions": (
        {"chosen": [Q, A, user("x"), A], "rejected": [Q, A, user("y"), A]},
        Row(PAIRS, [Q], [A, user("x"), A], [A, user("y"), A]),
    ),
    "hh": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: yesterday"},
        Row(PAIRS, "\n\nHuman: hi\n\nAssistant:", " yes", " yesterday"),
    ),
    "hh, later turn": (
        {"chosen": "\n\nHuman: 1\n\nAssistant: A\n\nHuman: 2\n\nAssistant: x",
         "rejected": "\n\nHuman: 1\n\nAssistant: A\n\nHuman: 2\n\nAssistant: y"},
        Row(PAIRS, "\n\nHuman: 1\n\nAssistant: A\n\nHuman: 2\n\nAssistant:", " x", " y"),
    ),
    "hh, other questions": (
        {"chosen": "\n\nHuman: 1\n\nAssistant: A\n\nHuman: 2\n\nAssistant: x",
         "rejected": "\n\nHuman: 1\n\nAssistant: A\n\nHuman: 3\n\nAssistant: x"},
        Row(PAIRS, "\n\nHuman: 1\n\nAssistant:", " A\n\nHuman: 2\n\nAssistant: x",
            " A\n\nHuman: 3\n\nAssistant: x"),
    ),
    "hh, prompt repeated": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: a",
         "rejected": "\n\nHuman: q\n\nAssistant: b"},
        Row(PAIRS, "\n\nHuman: q\n\nAssistant:", " a", " b"),
    ),
    "hh, prompt repeated by a completion": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "\n\nHuman: q\n\nAssistant: a"},
        Row(SFT, "\n\nHuman: q\n\nAssistant:", " a", None),
    ),
    "a greeting first, repeated": (
        {"prompt": [A, Q], "chosen": [A, Q, A], "rejected": [A, Q, B]}, Row(PAIRS, [A, Q], [A], [B]),
    ),
    "a greeting first, the prompt as text": (
        {"prompt": "q", "chosen": [A, Q, A], "rejected": [A, Q, B]}, Row(PAIRS, [A, Q], [A], [B]),
    ),
    "a completion that repeats the prompt": (
        {"prompt": [Q], "completion": [Q, A]}, Row(SFT, [Q], [A], None),
    ),
    "messages as JSON text": (
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A], indent=1), "rejected": json.dumps([B])},
        Row(PAIRS, [Q], [A], [B]),
    ),
    "answers as JSON text": (
        {"prompt": "q", "chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])},
        Row(PAIRS, [Q], [A], [B]),
    ),
    "a conversation as JSON text": ({"messages": json.dumps([Q, A])}, Row(SFT, [Q], [A], None)),
    "text that is JSON, not messages": (
        {"prompt": "p", "chosen": '[{"a": 1}]', "rejected": "[]"}, Row(PAIRS, "p", '[{"a": 1}]', "[]"),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Row(SFT, [Q], [A], None),
    ),
    "sft messages": ({"messages": [Q, A, user("x"), B]}, Row(SFT, [Q, A, user("x")], [B], None)),
    "sft strings": ({"prompt": "p", "completion": "c"}, Row(SFT, "p", "c", None)),
    "sft completion messages": ({"prompt": "q", "completion": [A]}, Row(SFT, [Q], [A], None)),
    "sft text": ({"text": "all of it"}, Row(SFT, "", "all of it", None)),
    "wanted": ({"prompt": "p", "completion": "c", "label": True}, Row(UNPAIRED, "p", "c", None)),
    "unwanted": ({"prompt": [Q], "completion": [A], "label": 0}, Row(UNPAIRED, [Q], None, [A])),
    "label in a csv": ({"prompt": "p", "completion": "c", "label": "False"}, Row(UNPAIRED, "p", None, "c")),
    "system": (
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        Row(PAIRS, [{"role": "system", "content": "s"}, Q], [A], [B]),
    ),
    "arrow's empty keys": (
        {"prompt": [Q | {"tool_calls": None}], "chosen": [A | {"name": None}], "rejected": [B]},
        Row(PAIRS, [Q], [A], [B]),
    ),
    "tools": (
        {"prompt": [Q], "chosen": [CALL], "rejected": [B], "tools": [FUNCTION]},
        Row(PAIRS, [Q], [CALL], [B], [FUNCTION]),
    ),
    "tools as text": (
        {"prompt": [Q], "chosen": [A], "rejected": [B], "tools": json.dumps([FUNCTION])},
        Row(PAIRS, [Q], [A], [B], [FUNCTION]),
    ),
    "parts of text": (
        {"prompt": [{"role": "user", "content": PARTS}], "chosen": [A], "rejected": [B]},
        Row(PAIRS, [user("What is 1\n+ 1?")], [A], [B]),
    ),
}  # fmt: skip


def read(row: Any) -> Row:
    """A row as an encoder reads it, in the form that a file of such rows has."""
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    fields = read_json_cells(row)
    [found] = find_form([fields], FormOptions(), "x.jsonl").rows(fields)
    return read_row(found)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(name: str) -> None:
    row, wanted = FORMS[name]
    assert read(row) == wanted
    assert read(json.loads(json.dumps(row))) == wanted


BAD_ROWS: dict[bytes, str] = {
    b'{"prompt": "p", "chosen": "c"': "broken JSON",
    b"nonsense": "broken JSON",
    b"[" * 100_000: "broken JSON",
    b'{"prompt": "p", "chosen": ' + b"1" * 5000 + b', "rejected": "r"}': "broken JSON",
    b'["p", "c", "r"]': "not a JSON object",
    b"null": "not a JSON object",
    b"{}": "no field 'chosen', 'completion', 'messages' or 'text'",
    b'{"prompt": "p", "rejected": "r"}': "no field 'chosen'",
    b'{"prompt": "p", "best_of": "b", "rejected": "r"}':
        "no field 'chosen'; name the column that holds it (data.columns.chosen): there are 'best_of'",
    b'{"prompt": {"0": "p"}, "chosen": {"0": "c"}, "rejected": {"0": "r"}}':
        "field 'chosen' holds a whole column by row numbers, as pandas writes it; write rows: to_json(FILE, ",
    b'{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure"}], "chosen": '
    b'[{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}':
        "the prompt ends with an answer, which the responses do not repeat",
    b'{"prompt": "p", "chosen": "c"}': "no field 'rejected'",
    b'{"prompt": null, "chosen": "c", "rejected": "r"}': "field 'prompt' is null, not a string",
    b'{"prompt": "p", "chosen": ["c"], "rejected": "r"}': "field 'chosen' is a list of texts",
    b'{"prompt": "p", "chosen": [], "rejected": "r"}': "field 'chosen' has no message",
    b'{"prompt": "p", "chosen": "c", "rejected": 3}': "field 'rejected' is a number, not a string",
    b'{"prompt": " ", "chosen": "c", "rejected": "r"}': "empty prompt",
    b'{"prompt": "p", "chosen": "", "rejected": "r"}': "empty chosen response",
    b'{"prompt": "p", "chosen": "c", "rejected": " \\n"}': "empty rejected response",
    b'{"prompt": "p", "chosen": "c", "rejected": "c"}': "identical responses",
    b'{"chosen": "Human: a", "rejected": "Human: b"}': "no common beginning that ends in 'Assistant:'",
    b'{"chosen": "The sky is blue.", "rejected": "The sky is green."}':
        "no field 'prompt'; name the column that holds it (data.columns.prompt)",
    b'{"n": 3, "title": "t", "my_task": "i", "chosen": "45 kilometers is 45,000 m", "rejected": '
    b'"45 kilometers is far"}': "no field 'prompt'; name the column that holds it, such as "
        "data.columns.prompt=my_task",
    b'{"title": "t", "chosen": "a", "rejected": "b"}':
        "the other columns of text are 'title'; name the column",
    b'{"prompt": "\\n\\nHuman: q\\n\\nAssistant:", "chosen": "\\n\\nHuman: q\\n\\nAssistant: a",'
    b'"rejected": "b"}': "one response repeats the prompt, the other does not",
    b'{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],'
    b'"rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}':
        "the conversations do not begin with the prompt's messages",
    b'{"prompt": "p", "chosen": "[{\\"role\\": \\"user\\", \\"content\\": \\"x\\"}]", "rejected": "b"}':
        "one response is a string",
    b'{"prompt": "p", "chosen": "[{\\"role\\": ", "rejected": "b"}': "'chosen' holds messages as broken JSON",
    b"""{"prompt": "p", "chosen": "[{'content': 'a', 'role': 'assistant'}]", "rejected": "b"}""":
        "field 'chosen' holds messages as Python prints them",
    b"""{"messages": "array([{'from': 'gpt', 'value': 'a'}])"}""": "holds messages as Python prints",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "tools": [{"name": "\\ud83d"}]}': "invalid Unicode",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "chat_template_kwargs": {"\\ud83d": 1}}':
        "invalid Unicode",
    b'{"chosen": "Assistant:", "rejected": "Assistant: b"}': "empty chosen response",
    b'{"prompt": "p", "chosen": "caf\xe9", "rejected": "r"}': "invalid UTF-8",
    b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}': "invalid Unicode",
    b'{"prompt": "p", "completion": "c", "label": "meh"}': "field 'label' is not true or false",
    b'{"prompt": "p", "completion": "c", "label": null}': "field 'label' is not true or false",
    b'{"completion": "c", "label": true}': "no field 'prompt'",
    b'{"prompt": "p", "completion": ""}': "empty completion",
    b'{"text": " "}': "empty completion",
    b'{"messages": [{"role": "user", "content": "q"}]}': "messages do not end with an answer",
    b'{"messages": "q"}': "field 'messages' is not a list of messages",
    b'{"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}': "a message without a role",
    b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}': "a message without content",
    b'{"messages": [{"role": "user", "content": 3}]}': "holds a message whose content is not a string",
    b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "a part of the type 'image'",
    b'{"prompt": "x", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
    b'"rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}':
        "the prompt is not in the conversations' common beginning",
    b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
    b'"rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]}':
        "no common beginning that the assistant answers",
    b'{"prompt": "p", "chosen": "c", "rejected": [{"role": "assistant", "content": "a"}]}':
        "one response is a string",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "tools": "[{"}': "field 'tools' is broken JSON",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "tools": {"a": 1}}': "'tools' is not a list of objects",
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
def test_a_bad_row_says_why(row: bytes, reason: str) -> None:
    with pytest.raises(BadRow) as problem:
        read(parse_line(row))
    assert reason in str(problem.value)


def test_unwanted_messages_lose_their_last_answer_to_the_rejected_side() -> None:
    found = read({"messages": [user("q"), says("a")], "label": False})
    assert (found.prompt, found.chosen, found.rejected) == ([user("q")], None, [says("a")])


def test_text_as_a_conversation() -> None:
    assert as_conversation(Row(PAIRS, "q", "a", "b")) == Row(PAIRS, [Q], [A], [B])
    text = "\n\nHuman: q\n\nAssistant: a\n\nHuman: x y\n\nAssistant:"
    conversation = as_conversation(Row(PAIRS, text, " a", " b\n\nHuman: z\n\nAssistant: a"))
    assert conversation == Row(PAIRS, [Q, A, user("x y")], [A], [B, user("z"), A])
    # a question that speaks of turns, and an answer that has some, are one question and one answer
    row = Row(PAIRS, "what does Human: mean?", "\n\nHuman: this", "b")
    assert as_conversation(row) == Row(PAIRS, [user(row.prompt)], [says("\n\nHuman: this")], [B])
    assert as_conversation(Row(SFT, "", "a text", None)) == Row(SFT, "", "a text", None)
    assert as_conversation(Row(UNPAIRED, "q", None, "b")) == Row(UNPAIRED, [Q], None, [B])
    with pytest.raises(BadRow, match="not turns"):
        as_conversation(Row(PAIRS, "Well.\n\nHuman: q\n\nAssistant:", " a", " b"))


@given(place=st.integers(0, len(GOOD) - 1), piece=st.binary(max_size=4))
def test_a_damaged_row_is_a_pair_or_a_bad_row(place: int, piece: bytes) -> None:
    damaged = GOOD[:place] + piece + GOOD[place + 1 :]
    try:
        pair = read(parse_line(damaged))
    except BadRow as problem:
        assert str(problem)
    else:
        row = json.loads(damaged)
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(shared=texts, chosen=texts, rejected=texts)
def test_an_implicit_prompt_loses_no_character(shared: str, chosen: str, rejected: str) -> None:
    begin = f"Human: {shared}\n\nAssistant:"
    try:
        row = read({"chosen": begin + chosen, "rejected": begin + rejected})
    except BadRow:
        return
    assert isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str)
    assert (row.prompt + row.chosen, row.prompt + row.rejected) == (begin + chosen, begin + rejected)


def test_marks_of_what_is_learned_are_not_part_of_a_prompt() -> None:
    turns = [
        {"role": "user", "content": "p", "loss_weight": 0.0},
        {"role": "assistant", "content": "x", "loss_weight": 0.0},
        {"role": "user", "content": "q", "loss_weight": 0.0},
    ]
    sides = {
        side: [*turns, {"role": "assistant", "content": text, "loss_weight": 1.0}]
        for side, text in (("chosen", "a"), ("rejected", "b"))
    }
    row = read_row(sides)
    plain = [{name: message[name] for name in ("role", "content")} for message in turns]
    assert row.prompt == plain and row.chosen == [{"role": "assistant", "content": "a"}]
