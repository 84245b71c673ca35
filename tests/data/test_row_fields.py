"""Each field of a row by itself: what it may hold, what it becomes, and the words of a refusal."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rcpo.data.conversations import read_json_cells, split_texts
from rcpo.data.formats import as_conversation, read_row
from rcpo.data.forms import Custom, Renamed, after_history, register_format, registered, turns, with_input
from rcpo.data.records import PAIRS, SFT, UNPAIRED, BadRow, Row
from rcpo.data.values import read_values
from rcpo.errors import ConfigError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


Q, A, B, G = user("q"), says("a"), says("b"), says("g")
SYSTEM = {"role": "system", "content": "s"}
TEXTS = {"prompt": "p", "chosen": "c", "rejected": "r"}
MESSAGES = {"prompt": [Q], "chosen": [A], "rejected": [B]}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"name": "f"}


def why(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as problem:
        read_row(row)
    return str(problem.value)


# --- what kind a row is ---------------------------------------------------------------------------------


def test_the_kind_follows_from_the_columns() -> None:
    assert read_row(TEXTS) == Row(PAIRS, "p", "c", "r")
    assert read_row({"prompt": "p", "completion": "c"}) == Row(SFT, "p", "c", None)
    assert read_row({"messages": [Q, A]}) == Row(SFT, [Q], [A], None)
    assert read_row({"messages": [Q, A], "label": True}) == Row(UNPAIRED, [Q], [A], None)
    assert read_row({"messages": [Q, A], "label": "0.0"}) == Row(UNPAIRED, [Q], None, [A])
    assert read_row({"text": "t"}) == Row(SFT, "", "t", None)
    assert read_row(TEXTS | {"completion": "x", "messages": 3, "text": 4, "label": 0}) == read_row(TEXTS)
    assert read_row({"prompt": "p", "completion": "c", "text": 3}) == Row(SFT, "p", "c", None)


def test_a_row_without_an_answer_names_its_columns() -> None:
    words = "say what is in them with data.columns"
    assert why({"prompt": "p", "n": 3}) == (
        "no field 'chosen', 'completion', 'messages' or 'text'; the columns are 'prompt', 'n': " + words
    )
    assert why({}) == (
        "no field 'chosen', 'completion', 'messages' or 'text'; the columns are none: " + words
    )
    assert why({"data": [TEXTS, TEXTS]}) == (
        "no field 'chosen', 'completion', 'messages' or 'text'; the columns are 'data': its objects seem to "
        "be the rows; write that array alone to a .json file"
    )
    assert why({"talk": [Q, A]}).endswith("the columns are 'talk': " + words)


@pytest.mark.parametrize("messages", [[A], [Q], [Q, A, Q]])
def test_a_conversation_to_learn_has_a_question_and_ends_with_its_answer(messages: list[Any]) -> None:
    assert why({"messages": messages}) == "messages do not end with an answer of the assistant"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(True, True), (1, True), (1.0, True), (" TRUE ", True), ("1.0", True),
     (False, False), (0, False), (0.0, False), ("0", False), ("false", False)],
)  # fmt: skip
def test_labels(value: Any, wanted: bool) -> None:
    found = read_row({"prompt": "p", "completion": "c", "label": value})
    assert (found.chosen, found.rejected) == (("c", None) if wanted else (None, "c"))


def test_other_labels_are_refused() -> None:
    for value in (2, "yes", "", None):
        assert why({"prompt": "p", "completion": "c", "label": value}) == (
            "field 'label' is not true or false; explain its values with data.labels"
        )


# --- media, tools, options ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "image", "videos", "video", "audios", "audio"])
def test_media_are_refused_unless_they_are_empty(name: str) -> None:
    assert read_row(TEXTS | {name: None}) == read_row(TEXTS | {name: []}) == read_row(TEXTS)
    assert read_row(TEXTS | {name: "[]"}) == read_row(TEXTS)  # a cell of CSV
    assert why(TEXTS | {"audio": None, name: ["x.png"]}) == (
        f"field {name!r} is not empty, and rcpo trains on text alone"
    )


@pytest.mark.parametrize(
    ("tools", "expected"),
    [(None, None), ([], None), ("", None), (" \n", None), ("[]", None), ("null", None),
     ([TOOL], [TOOL]), (json.dumps([TOOL, TOOL]), [TOOL, TOOL])],
)  # fmt: skip
def test_tools(tools: Any, expected: Any) -> None:
    assert read_row(MESSAGES | {"tools": tools}).tools == expected


@pytest.mark.parametrize("tools", ["{}", '["f"]', "3", {"a": 1}, ["f"], [TOOL, "f"], 3])
def test_tools_that_are_not_functions_are_refused(tools: Any) -> None:
    assert why(MESSAGES | {"tools": tools}) == "field 'tools' is not a list of objects"


def test_tools_that_are_not_json_are_refused() -> None:
    for text in ("[{", "[" * 100_000):
        assert why(MESSAGES | {"tools": text}) == "field 'tools' is broken JSON"


def test_a_templates_options_without_values_are_left_out() -> None:
    assert read_row(MESSAGES | {"chat_template_kwargs": None}).options is None
    assert read_row(MESSAGES | {"chat_template_kwargs": {"a": None}}).options is None
    found = read_row(MESSAGES | {"chat_template_kwargs": {"a": None, "b": False, "c": 0}})
    assert found.options == {"b": False, "c": 0}
    for value in ([], "[]", 3):
        assert why(MESSAGES | {"chat_template_kwargs": value}) == (
            "field 'chat_template_kwargs' is not an object"
        )


def test_a_templates_options_may_be_json_in_a_cell() -> None:
    assert read_row(MESSAGES | {"chat_template_kwargs": ""}).options is None  # a CSV has every column
    assert read_row(MESSAGES | {"chat_template_kwargs": '{"b": false}'}).options == {"b": False}
    assert why(MESSAGES | {"chat_template_kwargs": "x"}) == "field 'chat_template_kwargs' is broken JSON"


# --- prompts --------------------------------------------------------------------------------------------


def test_an_empty_system_message_is_none() -> None:
    for empty in (None, ""):
        assert read_row(TEXTS | {"system": empty}) == read_row(TEXTS)
    assert read_row(MESSAGES | {"system": "s"}).prompt == [SYSTEM, Q]
    assert read_row(TEXTS | {"system": "s"}) == Row(PAIRS, [SYSTEM, user("p")], [says("c")], [says("r")])
    assert why(TEXTS | {"system": 3}) == "field 'system' is a number, not a string or a list of messages"


def test_a_system_message_may_be_in_parts_or_under_other_names() -> None:
    gemini = {"role": "user", "parts": [{"text": "s"}]}  # its systemInstruction, whose role is ignored
    for system in (gemini, [{"type": "text", "text": "s"}], SYSTEM):
        assert read_row(MESSAGES | {"system": system}).prompt == [SYSTEM, Q]
    assert "a part of the type 'image'" in why(MESSAGES | {"system": [{"type": "image"}]})


def test_a_system_message_is_written_once() -> None:
    row = MESSAGES | {"prompt": [SYSTEM, Q]}
    assert read_row(row | {"system": "s"}) == read_row(row)
    assert why(row | {"system": "t"}) == (
        "field 'system' differs from the conversation's own system message; to leave out the field: "
        '"data.columns.system=\'{{ \\"\\" }}\'"'
    )
    later = [Q, A, SYSTEM, user("more")]
    assert read_row(row | {"prompt": later, "system": "t"}).prompt[1:] == later


def test_text_with_turns_behind_a_system_message_is_read_as_turns() -> None:
    found = read_row(TEXTS | {"prompt": "Human: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:", "system": "s"})
    assert found.prompt == [SYSTEM, user("1"), says("2"), user("3")]


@pytest.mark.parametrize(
    "answer",
    [
        '{"value": 42}', '{"from": "SFO", "to": "JFK"}', '{"role": "admin", "name": "Bo"}',
        '[{"value": 1}, {"value": 2}]', '{"content": {"a": 1}}', '{"content": "x"} is the request',
        "{'value': 3}", "[{'role': 'admin'}]",
    ],
)  # fmt: skip
def test_an_answer_in_json_is_text_unless_it_is_messages(answer: str) -> None:
    row = TEXTS | {"chosen": answer}
    assert read_json_cells(row) == row
    assert read_row(read_json_cells(row)).chosen == answer


def test_messages_in_a_cell_are_messages_whatever_the_order_of_their_keys() -> None:
    for text in ('[{"content": "q", "role": "user"}]', '{"role": "user", "content": "q"}'):
        assert read_json_cells({"prompt": text}) == {"prompt": [user("q")]}
    call = '[{"role": "assistant", "tool_calls": []}]'
    assert read_json_cells({"chosen": call}) == {"chosen": json.loads(call)}
    damaged = '[{"role": "user", "content": "q"}, {"rolle": "x"}]'  # refused as messages, not read as text
    assert (
        why(TEXTS | read_json_cells({"prompt": damaged})) == "field 'prompt' holds a message without a role"
    )


def test_answers_with_turns_behind_a_system_message_are_read_as_turns() -> None:
    sides = {"chosen": " a\n\nHuman: 4\n\nAssistant: b", "rejected": " c"}
    found = read_row({"prompt": "\n\nHuman: 3\n\nAssistant:", **sides, "system": "s"})
    assert found.chosen == [says("a"), user("4"), says("b")]
    assert found.rejected == [says("c")]
    assert read_row(TEXTS | {"chosen": " c", "system": "s"}).chosen == [says(" c")]  # text without turns


@pytest.mark.parametrize("prompt", ["", " \n", [user(" ")]])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    assert why(TEXTS | {"prompt": prompt}) == "empty prompt"


def test_only_text_alone_needs_no_prompt() -> None:
    assert read_row({"text": "t", "prompt": "ignored"}).prompt == ""
    assert why({"text": "t", "prompt": "", "completion": "c"}) == "empty prompt"
    assert why({"text": "t", "messages": [user(""), A]}) == "empty prompt"
    assert read_row({"text": "t", "system": ""}).prompt == ""
    assert why({"text": "t", "system": "s"}) == (
        "field 'text' is a whole text, to which field 'system' cannot be added"
    )


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            {"My_Question": "x", "user": "y"},
            "; name the column that holds it, such as data.columns.prompt=My_Question",
        ),
        (
            {"user": 3, "title": "t", "body": "b"},
            "; the other columns of text are 'title', 'body'; name the column ",
        ),
        ({"n": 3}, "; name the column that holds it (data.columns.prompt), or take it out of another one "),
    ],
)
def test_a_missing_prompt_is_looked_for_among_the_other_columns(row: dict[str, Any], advice: str) -> None:
    assert why(row | {"chosen": "a", "rejected": "b"}).startswith("no field 'prompt'" + advice)


def test_only_one_side_with_turns_is_split_as_text_with_turns() -> None:
    for chosen, rejected in [("Human: a\n\nAssistant: b", "x"), ("x", "Human: a\n\nAssistant: b")]:
        assert why({"chosen": chosen, "rejected": rejected}).startswith(
            "no field 'prompt', and no common beginning that ends in"
        )


def test_a_prompt_of_text_beside_messages_is_a_question_or_in_them() -> None:
    assert read_row({"prompt": "q", "chosen": [A], "rejected": [B]}) == Row(PAIRS, [Q], [A], [B])
    # a greeting first: the answers begin with the assistant, but the prompt is asked later
    found = read_row({"prompt": " q ", "chosen": [G, Q, A], "rejected": [G, Q, B]})
    assert found == Row(PAIRS, [G, Q], [A], [B])
    assert why({"prompt": "z", "chosen": [Q, A], "rejected": [Q, B]}) == (
        "the prompt is not in the conversations' common beginning"
    )


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ([Q], [Q, A], [B]),
        ([Q], [A], [Q, B]),
        ([A], [A], [B]),  # the answers would follow an answer
        ([user("z")], [Q, A], [Q, B]),
        ([Q], [Q, A], [user("z"), B]),
    ],
)
def test_conversations_repeat_the_prompt_both_or_not_at_all(
    prompt: list[Any], chosen: list[Any], rejected: list[Any]
) -> None:
    assert why({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == (
        "the conversations do not begin with the prompt's messages"
    )


def test_one_message_is_a_list_of_one() -> None:
    assert read_row({"prompt": Q, "chosen": A, "rejected": B}) == Row(PAIRS, [Q], [A], [B])


def test_responses_of_two_kinds_are_refused() -> None:
    for chosen, rejected in [("a", [B]), ([A], "b")]:
        assert why({"prompt": "p", "chosen": chosen, "rejected": rejected}) == (
            "one response is a string, the other a list of messages"
        )


def test_a_prompt_with_turns_is_taken_off_both_texts() -> None:
    prompt = "Human: q\n\nAssistant:"
    row = {"prompt": prompt, "chosen": f"{prompt} a", "rejected": f"{prompt} b"}
    assert read_row(row) == Row(PAIRS, prompt, " a", " b")
    plain = {"prompt": "q", "chosen": "q a", "rejected": "q b"}  # without turns an answer may repeat it
    assert read_row(plain) == Row(PAIRS, "q", "q a", "q b")


def test_what_two_conversations_share_is_who_says_what() -> None:
    """Times and ids of messages differ from side to side."""
    own, other = ({**Q, "id": number} for number in (1, 2))
    for row in (
        {"chosen": [own, A], "rejected": [other, B]},
        {"prompt": [Q], "chosen": [own, A], "rejected": [other, B]},
    ):
        found = read_row(row)
        assert [one["content"] for one in found.prompt] == ["q"]
        assert (found.chosen, found.rejected) == ([A], [B])
    assert why({"chosen": [own, A], "rejected": [other, A]}) == "identical responses"
    assert read_row({"prompt": [Q], "completion": [own, A]}).chosen == [A]
    gold = read_row({"prompt": [Q], "chosen": [A], "rejected": [B], "gold": [own, G]}).gold
    assert gold == [G]


def test_whole_conversations_of_text_beside_their_question_are_taken_apart() -> None:
    asked = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"
    row = {"prompt": "3", "chosen": asked + " a", "rejected": asked + " b"}
    found = read_row(row)
    assert (found.prompt, found.chosen, found.rejected) == (asked, " a", " b")
    assert why(row | {"prompt": "4"}) == "the prompt is not in the conversations' common beginning"
    assert why(row | {"rejected": " b"}) == "one response is a whole conversation, the other is not"
    assert read_row(row | {"chosen": "Human: a", "rejected": "b"}).chosen == "Human: a"  # without an answer


def test_the_longest_common_beginning_is_the_prompt() -> None:
    begin = "Human: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"
    assert split_texts(begin + " x", begin + " y") == (begin, " x", " y")
    assert split_texts(begin, begin + "y") == (begin, "", "y")
    assert split_texts("Assistant:a", "Assistant:b") == ("Assistant:", "a", "b")


# --- completions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("p", "c", ("p", "c")),
        ("q", [A], ([Q], [A])),
        ([Q], "a", ([Q], [A])),
        ([Q], [Q, A], ([Q], [A])),
        ([Q], [A, Q, B], ([Q], [A, Q, B])),
        ("q", [Q, A], ([Q], [A])),
        ("Human: q\n\nAssistant:", "Human: q\n\nAssistant: a", ("Human: q\n\nAssistant:", " a")),
        ("q", "q a", ("q", "q a")),
    ],
)
def test_a_completion_may_repeat_its_prompt(prompt: Any, completion: Any, expected: tuple[Any, Any]) -> None:
    found = read_row({"prompt": prompt, "completion": completion})
    assert (found.kind, found.prompt, found.chosen, found.rejected) == (SFT, *expected, None)


def test_a_completion_has_a_prompt() -> None:
    assert why({"completion": "c"}) == "no field 'prompt'"
    assert why({"prompt": "p", "completion": None}) == (
        "field 'completion' is null, not a string or a list of messages"
    )


# --- gold answers ---------------------------------------------------------------------------------------

TURNS = "Human: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (TEXTS | {"gold": "p g"}, "p g"),  # a text beside a prompt is the answer alone
        (TEXTS | {"gold": []}, None),
        (TEXTS | {"gold": None}, None),
        (MESSAGES | {"gold": [Q, G, Q, A]}, [G, Q, A]),
        (MESSAGES | {"gold": [G, Q, A]}, [G, Q, A]),
        ({"chosen": f"{TURNS} c", "rejected": f"{TURNS} r", "gold": f"{TURNS}g"}, "g"),
    ],
)
def test_a_gold_answer_is_taken_out_of_what_holds_it(row: dict[str, Any], gold: Any) -> None:
    assert read_row(row).gold == gold


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": f"{TURNS} c", "rejected": f"{TURNS} r", "gold": "Human: z\n\nAssistant: g"},
         "field 'gold' does not begin as the two responses do"),
        (TEXTS | {"gold": [Q, G]}, "field 'gold' does not begin with the prompt's messages"),
        (MESSAGES | {"gold": [user("z"), G]}, "field 'gold' does not begin with the prompt's messages"),
        (MESSAGES | {"gold": [Q]}, "empty gold response"),
        (MESSAGES | {"gold": [Q, Q, G]}, "a response does not begin with a message of the assistant"),
        (TEXTS | {"gold": " "}, "empty gold response"),
        (TEXTS | {"gold": "\ud800"}, "invalid Unicode: half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_gold_answer_that_does_not_fit_is_refused(row: dict[str, Any], words: str) -> None:
    assert why(row) == words


# --- what cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (TEXTS | {"chosen": "\t"}, "empty chosen response"),
        (TEXTS | {"rejected": ""}, "empty rejected response"),
        (MESSAGES | {"rejected": [says(" ")]}, "empty rejected response"),
        (MESSAGES | {"chosen": [A, Q, says("")]}, "empty chosen response"),
        ({"messages": [Q, says("")]}, "empty completion"),
        ({"prompt": "p", "completion": " ", "label": 0}, "empty completion"),
        ({"prompt": [Q], "completion": [Q]}, "empty completion"),
        ({"prompt": [Q], "completion": [user("z"), A]},
         "a response does not begin with a message of the assistant"),
        (MESSAGES | {"rejected": [A]}, "identical responses"),
    ],
)  # fmt: skip
def test_answers_without_words_are_refused(row: dict[str, Any], words: str) -> None:
    assert why(row) == words


def test_a_call_of_a_function_is_an_answer_without_words() -> None:
    assert read_row(MESSAGES | {"chosen": [CALL]}).chosen == [CALL]
    assert read_row(MESSAGES | {"chosen": [CALL | {"content": ""}]}).chosen == [CALL | {"content": ""}]


@pytest.mark.parametrize(
    "row",
    [
        TEXTS | {"prompt": "p\udc00"},
        TEXTS | {"rejected": "\ud83d r"},
        MESSAGES | {"chosen": [A | {"name": "\ud800"}]},
        MESSAGES | {"tools": [{"name": "f", "parameters": {"a": ["\udfff"]}}]},
        MESSAGES | {"chat_template_kwargs": {"\ud83d": 1}},
    ],
)
def test_half_of_a_surrogate_pair_is_found_anywhere(row: dict[str, Any]) -> None:
    assert why(row) == "invalid Unicode: half of a surrogate pair"


def test_other_unicode_is_text() -> None:
    for text in ("é", "\ud7ff", "\ue000", "😀"):
        assert read_row(TEXTS | {"chosen": text}).chosen == text


def test_text_is_made_a_conversation_part_by_part() -> None:
    assert as_conversation(Row(PAIRS, "q", "a", "b", gold="g")) == Row(PAIRS, [Q], [A], [B], gold=[G])
    row = Row(PAIRS, [Q], [A], [B])
    assert as_conversation(row) is row
    found = as_conversation(Row(UNPAIRED, "Human: q\n\nAssistant:", None, " b\n\nHuman: q"))
    assert (found.prompt, found.chosen, found.rejected, found.gold) == ([Q], None, [B, Q], None)


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": 1e-300}, {"weight": 1e-300}),
        ({"weight": "0.5"}, {"weight": 0.5}),
        ({"weight": " ", "margin": None, "score_chosen": "\n"}, {}),
        ({"score_rejected": -2}, {"score_rejected": -2.0}),
        ({"score_chosen": 0, "score_rejected": 0}, {"score_chosen": 0, "score_rejected": 0, "margin": 0}),
        # a margin may be rounded in its seventh digit, or by 1e-6 where it is small
        ({"score_chosen": 1e6, "score_rejected": 0, "margin": 1e6 + 0.9},
         {"score_chosen": 1e6, "score_rejected": 0, "margin": 1e6 + 0.9}),
        ({"score_chosen": 1, "score_rejected": 1, "margin": 9e-7},
         {"score_chosen": 1, "score_rejected": 1, "margin": 9e-7}),
    ],
)  # fmt: skip
def test_the_numbers_of_a_row(fields: dict[str, Any], expected: dict[str, float]) -> None:
    assert read_values(fields) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "0"}, "field 'weight' is not positive"),
        ({"weight": -1e-9}, "field 'weight' is not positive"),
        ({"margin": math.inf}, "field 'margin' is not a finite number"),
        ({"score_chosen": False}, "field 'score_chosen' is not a finite number"),
        ({"score_chosen": 10**400}, "field 'score_chosen' is not a finite number"),
        ({"score_chosen": {}}, "field 'score_chosen' is not a finite number"),
        ({"score_chosen": 1e6, "score_rejected": 0, "margin": 1e6 + 1.1},
         "field 'margin' is not the difference of the two scores"),
        ({"score_chosen": 1, "score_rejected": 1, "margin": 1.1e-6},
         "field 'margin' is not the difference of the two scores"),
        ({"score_chosen": 2, "score_rejected": 3, "margin": 1},
         "field 'margin' is not the difference of the two scores"),
    ],
)  # fmt: skip
def test_numbers_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow) as problem:
        read_values(fields)
    assert str(problem.value) == words


# --- forms ----------------------------------------------------------------------------------------------


def test_a_renamed_column_is_gone_under_its_old_name() -> None:
    form = Renamed("x", {"prompt": "question", "chosen": "chosen", "rejected": "worse"})
    row = {"question": "q", "chosen": "a", "n": 3}
    assert form.rows(row) == [{"prompt": "q", "chosen": "a", "n": 3}]  # the missing one is for read_row
    assert row == {"question": "q", "chosen": "a", "n": 3}  # as it was


def test_an_input_and_a_history_are_part_of_the_prompt_and_no_columns_of_their_own() -> None:
    form = Renamed("alpaca", {"prompt": "instruction"}, more="input", history="history")
    assert form.rows({"instruction": "do", "input": "it"}) == [{"prompt": "do\nit"}]
    assert form.rows({"instruction": "do", "input": None, "history": []}) == [{"prompt": "do"}]
    assert form.rows({"instruction": "do", "input": "it", "history": [["1", "2"]]}) == [
        {"prompt": [user("1"), says("2"), user("do\nit")]}
    ]
    assert form.rows({"instruction": "do"}) == [{"prompt": "do"}]
    plain = Renamed("plain", {"prompt": "instruction"})
    assert plain.rows({"instruction": "do", "input": "it", "history": [["1", "2"]]}) == [
        {"prompt": "do", "input": "it", "history": [["1", "2"]]}
    ]


def test_an_input_of_messages_brings_its_tools_unless_the_row_has_some() -> None:
    form = Renamed("openai", {"prompt": "input"})
    row: dict[str, Any] = {"input": {"messages": [Q], "tools": [TOOL]}, "chosen": [A]}
    assert form.rows(row) == [{"tools": [TOOL], "prompt": [Q], "chosen": [A]}]
    assert form.rows(row | {"tools": []})[0]["tools"] == []
    assert form.rows({"input": {"messages": [Q]}})[0] == {"tools": None, "prompt": [Q]}
    for other in ({"messages": "q"}, {"role": "user"}):
        assert form.rows({"input": other}) == [{"prompt": other}]


@pytest.mark.parametrize("more", [None, "", " \n"])
def test_an_empty_input_adds_nothing(more: Any) -> None:
    assert with_input("do", more) == "do" and with_input(3, more) == 3


def test_a_history_is_turns_of_two_texts_or_messages() -> None:
    assert after_history([], "q") == [Q]
    assert after_history([["1", "2"], SYSTEM], "q") == [user("1"), says("2"), SYSTEM, Q]
    for history in ([["1", "2", "3"]], [["1"]], ["12"], [("1", "2")], [["1", None]]):
        with pytest.raises(BadRow) as problem:
            after_history(history, "q")
        assert str(problem.value) == "an earlier turn is not a question and its answer"
    for history, prompt in (({}, "q"), ([], None)):
        with pytest.raises(BadRow) as problem:
            after_history(history, prompt)
        assert str(problem.value) == "earlier turns are not a list, or the prompt after them is not text"


def test_every_answer_but_a_greeting_and_those_marked_is_learned() -> None:
    marked = [A | {"weight": 0}, A | {"loss_weight": 0}, A | {"train": False}]
    kept = [A | {"weight": 1}, A | {"loss_weight": 1.0}, A | {"train": True}, A | {"train": None}, A]
    messages = [G, Q, *marked, *kept]
    found = turns({"messages": messages, "n": 3})
    assert found == [{"messages": messages[: 6 + place], "n": 3} for place in range(5)]
    for none in ([G, Q], [Q, *marked], [G]):
        with pytest.raises(BadRow) as problem:
            turns({"messages": none})
        assert str(problem.value) == "the conversation holds no answer of the assistant"


def test_every_turn_is_taken_of_conversations_alone() -> None:
    form = Renamed("chats", {"messages": "conversations"}, every_turn=True)
    assert form.rows({"conversations": [Q, A, Q, B]}) == [
        {"messages": [Q, A]}, {"messages": [Q, A, Q, B]},
    ]  # fmt: skip
    assert form.rows({"conversations": "x"}) == [{"messages": "x"}]
    assert form.rows({"prompt": "p"}) == [{"prompt": "p"}]


@pytest.mark.parametrize(
    "returned",
    [None, "x", 3, [{"a": 1}, None], ({"a": 1}, "x"), iter([{"a": 1}])],
    ids=lambda value: type(value).__name__,
)
def test_a_format_of_ones_own_returns_rows(returned: Any) -> None:
    register_format("own")(lambda row: returned)
    with pytest.raises(BadRow) as problem:
        Custom("own", None).rows({})
    assert str(problem.value) == "format own returns something other than rows"


def test_rows_of_a_format_of_ones_own_may_be_none_or_a_tuple() -> None:
    for returned in ([], (), ({"a": 1}, {"a": 2})):
        register_format("own")(lambda row, returned=returned: returned)
        assert Custom("own", None).rows({}) == list(returned)


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, TypeError, ZeroDivisionError, AssertionError, NameError]
)
def test_what_a_format_of_ones_own_raises_makes_the_row_bad(error: type[Exception]) -> None:
    def refuses(row: dict[str, Any]) -> Any:
        raise error("why")

    assert register_format("own")(refuses) is refuses
    with pytest.raises(BadRow) as problem:
        Custom("own", None).rows({})
    assert str(problem.value) == f"format own refuses the row: {error.__name__}: {error('why')}"


def test_a_format_that_nobody_registered_is_refused_with_those_that_there_are() -> None:
    register_format("own")(lambda row: row)
    known = "preferences, comparisons, trees, ranked, labelled, supervised"
    advice = "register it (rcpo.data.forms.register_format) in a module: data.format_module=MODULE"
    with pytest.raises(ConfigError) as refusal:
        registered("nix", None)
    assert str(refusal.value) == (
        f"data.format=nix: there is no such format; give one of {known}, or {advice}"
    )
    with pytest.raises(ConfigError, match=r"there is no such format; json registers .*own.*; give one of"):
        registered("nix", "json")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("a", "field 'messages' holds a message that is not an object"),
        ({"from": "function_call", "value": "[]"}, "field 'messages' holds a function_call without a name"),
        (
            {"from": "function_call", "value": '["f"]'},
            "field 'messages' holds a function_call without a name",
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": 3}]},
            "messages[1].content[0] is a part without text; only parts of text can be used",
        ),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message: Any, words: str) -> None:
    assert why({"messages": [Q, message]}) == words


def test_conversations_that_do_not_differ_are_identical_responses() -> None:
    assert why({"chosen": [Q, A], "rejected": [Q, A]}) == "identical responses"
