"""Which form a file has, and what its rows become; written down by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_dataset import load, write

from rcpo.data.columns import rename
from rcpo.data.detection import find_form
from rcpo.data.forms import (
    Custom,
    FormOptions,
    Renamed,
    after_history,
    register_format,
    registered,
    with_input,
)
from rcpo.data.judged import FIRST, SECOND, TIE, Comparisons, Ranked, Scored, Trees, majority, paired
from rcpo.data.records import BadRow
from rcpo.errors import ConfigError


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def read(rows: list[dict[str, Any]], **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """The form's name, and what the rows become, with the fields that matter here."""
    form = find_form(rows, FormOptions(**options), "x.jsonl")
    kept = ("prompt", "chosen", "rejected", "completion", "label", "messages", "weight", "score_chosen",
            "score_rejected")  # fmt: skip
    return form.name, [{k: row[k] for k in kept if k in row} for one in rows for row in form.rows(one)]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
# name: (row of a file, what is said of it, what it becomes)
FORMS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "plain": ({**PAIR, "other": 1}, "preference pairs", PAIR),
    "sharegpt": (
        {"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        "ShareGPT conversations with two answers (prompt from 'conversations')",
        {"prompt": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
    ),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "o", "chosen": "a", "rejected": "b"},
        "Alpaca instructions with two answers",
        {"prompt": "q\ni", "chosen": "a", "rejected": "b"},
    ),
    "alpaca, no input": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "Alpaca instructions", PAIR
    ),
    "alpaca, supervised": (
        {"instruction": "q", "input": "i", "output": "o"}, "Alpaca instructions",
        {"prompt": "q\ni", "completion": "o"},
    ),
    "stack exchange": ({"question": "q", "response_j": "a", "response_k": "b"}, "preference pairs", PAIR),
    "model-written evaluations": (
        {"question": "q", "answer_matching_behavior": "a", "answer_not_matching_behavior": "b"},
        "preference pairs", PAIR,
    ),
    "axolotl": (
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_score": 2.0},
        "Alpaca instructions with two answers", {**PAIR, "score_chosen": 2.0},
    ),
    "intel": ({"input": "q", "chosen": "a", "rejected": "b"}, "preference pairs (prompt from 'input')", PAIR),
    "better and worse": (
        {"query": "q", "better_answer": "a", "worse_answer": "b", "better_model": "x", "worse_model": "y"},
        "preference pairs", PAIR,
    ),
    "second is better": (
        {"input": "q", "output_1": "b", "output_2": "a", "label": 2}, "comparisons of 'output_1' and", PAIR
    ),
    "a letter": (
        {"question": "q", "answer_a": "a", "answer_b": "b", "winner": "model_a"},
        "comparisons of 'answer_a'", PAIR,
    ),
    "ids": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_id": 0},
        "judged by 'better_response_id'", PAIR,
    ),
    "three annotators": (
        {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2,
         "annotator3": 1},
        "judged by 'annotator1', 'annotator2', 'annotator3'", PAIR,
    ),
    "strength": (
        {"context": "q", "response1": "a", "response2": "b", "overall_preference": -2}, "comparisons", PAIR
    ),
    "scores in a list": (
        {"prompt": "q", "responses": ["x", "a", "b"], "scores": [2, 3.5, 1]},
        "by score ('scores'), paired best",
        {**PAIR, "score_chosen": 3.5, "score_rejected": 1.0},
    ),
    "ranks inside": (
        {"prompt": "q", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1},
                                    {"answer": "?", "rank": None}]},
        "by rank ('rank')", {**PAIR, "score_chosen": -1.0, "score_rejected": -2.0},
    ),
    "ultrafeedback's own": (
        {"instruction": "q", "completions": [{"response": "b", "overall_score": 1},
                                             {"response": "a", "overall_score": 9}]},
        "by score ('overall_score')", {**PAIR, "score_chosen": 9.0, "score_rejected": 1.0},
    ),
    "a label": (
        {"question": "q", "response": "a", "acceptable?": 0},
        "prompt from 'question', completion from 'response', label from 'acceptable?')",
        {"prompt": "q", "completion": "a", "label": False},
    ),
    "a label of a conversation": (
        {"conversations": [human("q"), gpt("a")], "kto_tag": True}, "completions with labels",
        {"messages": [human("q"), gpt("a")], "label": True},
    ),
    "a word": (
        {"prompt": "q", "completion": "a", "label": "Thumbs up"}, "completions with labels",
        {"prompt": "q", "completion": "a", "label": True},
    ),
    "supervised sharegpt": (
        {"conversations": [human("q"), gpt("a")]},
        "ShareGPT conversations (messages from 'conversations'), the",
        {"messages": [human("q"), gpt("a")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_found_and_named(name: str) -> None:
    row, said, wanted = FORMS[name]
    assert (said in (found := read([row]))[0], found[1]) == (True, [wanted]), found


def test_a_majority_decides_and_as_many_for_either_are_a_tie() -> None:
    assert majority([FIRST, FIRST, SECOND]) == FIRST
    assert majority([FIRST, TIE, TIE]) == TIE
    assert majority([FIRST, SECOND, TIE]) == TIE
    assert majority([SECOND, TIE]) == SECOND


def test_a_tie_is_both_orders_at_half_the_weight_or_nothing() -> None:
    row = {"prompt": "q", "output_1": "a", "output_2": "b", "label": "tie"}
    half = {"prompt": "q", "weight": 0.5}
    assert read([row])[1] == [
        half | {"chosen": "a", "rejected": "b"},
        half | {"chosen": "b", "rejected": "a"},
    ]
    assert read([row], ties="drop")[1] == []


@pytest.mark.parametrize(
    ("pairing", "wanted"),
    [("best_worst", ["ac"]), ("adjacent", ["ab", "bc"]), ("all", ["ab", "ac", "bc"])],
)
def test_several_answers_are_paired_as_asked(pairing: str, wanted: list[str]) -> None:
    scored = [Scored("b", 2), Scored("c", 1), Scored("a", 3)]
    pairs = paired({}, scored, pairing, "keep")
    assert [pair["chosen"] + pair["rejected"] for pair in pairs] == wanted
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    with pytest.raises(BadRow, match="fewer than two"):
        paired({}, scored[:1], pairing, "keep")


def test_a_tree_gives_a_pair_for_every_group_of_ranked_replies() -> None:
    def said(text: str, rank: int | None, *replies: Any) -> dict[str, Any]:
        return {"text": text, "role": "assistant", "rank": rank, "replies": list(replies)}

    def asked(text: str, *replies: Any) -> dict[str, Any]:
        return {"text": text, "role": "prompter", "replies": list(replies)}

    tree = asked("q", said("a", 0, asked("more", said("d", 1), said("c", 0))), said("b", 1), said("?", None))
    name, rows = read([{"prompt": tree, "tree_state": "x"}])
    scores = {"score_chosen": 0.0, "score_rejected": -1.0}
    q, a, more = (
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", "a"), ("user", "more"))
    )
    assert name.startswith("trees of replies in 'prompt'")
    assert rows == [
        {"prompt": [q], "chosen": "a", "rejected": "b", **scores},
        {"prompt": [q, a, more], "chosen": "c", "rejected": "d", **scores},
    ]
    [behind_system, _] = read([{"prompt": {"role": "system", "text": "s", "replies": [tree]}}])[1]
    assert behind_system["prompt"] == [{"role": "system", "content": "s"}, q]


JUDGED = Comparisons("", "one", "other", ("judge", "second"), {"1": FIRST, "2": SECOND}, "keep")
LISTED = Comparisons("", "", "", ("judge",), {"1": FIRST}, "keep", listed="answers")
MARKED_OBJECTS = Ranked("", "answers", "marks", "text", None, False, "best_worst", "keep")
MARKED = Ranked("", "answers", "marks", None, None, False, "best_worst", "keep")
OBJECTS = Ranked("", "answers", None, "text", "score", False, "best_worst", "keep")
TREES = Trees("", "root", "best_worst", "keep")


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        (JUDGED, {"one": "a", "judge": "1"}, "no field 'other'"),
        (JUDGED, {"one": "a", "other": "b"}, "no judgment in 'judge', 'second'"),
        (JUDGED, {"one": "a", "other": "b", "judge": "", "second": []}, "no judgment in 'judge', 'second'"),
        (
            JUDGED,
            {"prompt": '["q", "r"]', "one": '["a", null]', "other": '["b", "c"]', "judge": "1"},
            "a turn is not text",
        ),
        (LISTED, {"answers": ["a"], "judge": "1"}, "column 'answers' is not a list of two answers"),
        (LISTED, {"answers": "ab", "judge": "1"}, "column 'answers' is not a list of two answers"),
        (MARKED, {"answers": "ab", "marks": [1, 2]}, "column 'answers' is not a list of answers"),
        (
            MARKED,
            {"answers": ["a", "b"], "marks": [1]},
            "columns 'answers' and 'marks' are not lists of the same length",
        ),
        (MARKED, {"answers": ["a", "b"]}, "columns 'answers' and 'marks' are not lists of the same length"),
        (
            OBJECTS,
            {"answers": [{"text": "a", "score": 1}, "b"]},
            "column 'answers' holds an answer without 'text'",
        ),
        (OBJECTS, {"answers": [{"score": 1}]}, "column 'answers' holds an answer without 'text'"),
        (
            MARKED_OBJECTS,
            {"answers": [{"text": "a"}, {"content": "b"}], "marks": [1, 2]},
            "column 'answers' holds an answer without 'text'",
        ),
        (MARKED, {"answers": ["a", "b"], "marks": [1, 10**400]}, "a score or rank is not a finite number"),
        (TREES, {"root": "q"}, "column 'root' holds no tree of messages"),
        (TREES, {"root": {"text": "q", "replies": ["a", "b"]}}, "a reply of the tree is not an object"),
        (TREES, {"root": {"text": "q", "replies": [{"rank": 1}]}}, "a message of the tree has no text"),
        (
            TREES,
            {"root": {"text": "q", "replies": [{"text": "a", "rank": 1}]}},
            "no two replies of the tree have a rank or score",
        ),
    ],
)
def test_a_row_unlike_its_form_is_refused_with_the_reason(
    form: Comparisons | Ranked | Trees, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadRow) as refused:
        form.rows(row)
    assert str(refused.value) == words


def test_answers_that_are_objects_have_their_text_under_a_known_name() -> None:
    row = {"answers": [{"id": 7, "content": "a"}, {"id": 8, "content": "b"}], "judge": {"vote": "1"}}
    assert [{key: one[key] for key in ("chosen", "rejected")} for one in LISTED.rows(row)] == [
        {"chosen": "a", "rejected": "b"}
    ]


def test_labels_of_minus_one_and_zero_are_not_guessed() -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (-1, 0, 1)]
    with pytest.raises(
        ConfigError, match=r"column 'label' holds -1 and 0; say which .*: data.labels=\{'1': true"
    ):
        read(rows)


def test_every_answer_of_a_conversation_can_be_learned() -> None:
    talk = [human("1"), gpt("a"), human("2"), gpt("b")]
    assert read([{"conversations": talk}])[1] == [{"messages": talk}]
    assert read([{"conversations": talk}], learn="all")[1] == [{"messages": talk[:2]}, {"messages": talk}]


def test_columns_are_names_paths_and_templates() -> None:
    row = {"instruction": "do", "input": "it", "a": {"b": [{"text": "yes"}]}, "chosen": "not this"}
    columns = {"prompt": "{{ instruction }}\n{{ input }}", "chosen": "a.b[0].text", "rejected": "none"}
    assert rename(row, columns) == {"prompt": "do\nit", "chosen": "yes"}
    with pytest.raises(BadRow, match=r"does not fit: .nothing. is undefined"):
        rename(row, {"prompt": "{{ nothing }}"})
    with pytest.raises(BadRow, match="does not fit"):
        rename(row, {"prompt": "{{ ''.__class__.__mro__ }}"})  # a sandbox


def test_a_template_writes_no_python_names_of_values() -> None:
    row = {"title": "t", "body": None, "parts": [{"text": "p"}]}
    with pytest.raises(BadRow, match=r"writes a value that the row leaves empty; {{ NAME or '' }}"):
        rename(row, {"prompt": "{{ title }}: {{ body }}"})
    with pytest.raises(BadRow, match="writes a list or an object; take a part of it"):
        rename(row, {"prompt": "{{ title }}: {{ parts }}"})
    columns = {"prompt": "{{ title }}{{ body or '' }} {{ parts[0].text }} {{ parts | tojson }}"}
    assert rename(row, columns)["prompt"] == 't p [{"text": "p"}]'


@pytest.mark.parametrize(("good", "bad"), [("high", "low"), ([5, 4], [1, 2]), (True, False)])
def test_a_column_of_scores_without_numbers_is_none(good: Any, bad: Any) -> None:
    """Its name is like that of scores, and its values would refuse every row."""
    row = {**PAIR, "chosen_rating": good, "rejected_rating": bad}
    assert read([row]) == ("preference pairs", [PAIR])
    scores = {"score_chosen": "5", "score_rejected": 4}
    assert read([{**PAIR, "chosen_rating": "5", "rejected_rating": 4}])[1] == [{**PAIR, **scores}]
    nan = {**PAIR, "chosen_rating": float("nan"), "rejected_rating": 4}  # refused, for the others have one
    assert "score_chosen" in read([nan, {**PAIR, "chosen_rating": "5", "rejected_rating": 4}])[1][0]
    assert read([{**PAIR, "score_chosen": good}])[1] == [
        {**PAIR, "score_chosen": good}
    ]  # its own name: refused


@pytest.mark.parametrize("answers", [{"chosen": "a", "rejected": "b"}, {"output": "o"}])
def test_an_input_that_few_rows_have_follows_their_instructions(answers: dict[str, str]) -> None:
    """JSON leaves it out of the rows that have none, which may be most."""
    row = {"instruction": "q", **answers}
    name, rows = read([row, row, row | {"input": "i"}, row])
    assert "with 'input' after it where it is not empty" in name
    assert [one["prompt"] for one in rows] == ["q", "q", "q\ni", "q"]


def test_what_labels_and_judgments_mean_can_be_said() -> None:
    row = {"prompt": "q", "completion": "a", "label": "meh"}
    assert read([row], labels={"meh": False})[1][0]["label"] is False
    first = {"prompt": "q", "output_1": "a", "output_2": "b", "label": 1}
    zero = first | {"label": 0}
    with pytest.raises(ConfigError, match=r"holds 0, 1, which may mean .*; say which: data\.labels"):
        read([first, zero])
    meaning = {1: "first", 0: "second"}
    assert [row["chosen"] for row in read([first, zero], labels=meaning)[1]] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"1 is explained as 'best'; the meanings are first, second"):
        read([first], labels={1: "best"})
    with pytest.raises(ConfigError, match="read as preference pairs; leave it out"):
        read([PAIR], labels={1: "first"})
    with pytest.raises(BadRow, match="a judgment that is not explained"):
        read([first, first | {"label": "unsure"}])


def test_renamed_columns_may_change_places_and_keep_what_a_prompt_holds() -> None:
    swapped = Renamed("swapped", {"chosen": "rejected", "rejected": "chosen"})
    assert swapped.rows(PAIR) == [{"prompt": "q", "chosen": "b", "rejected": "a"}]
    asked, tools = [{"role": "user", "content": "q"}], [{"name": "clock"}]
    row = {"input": {"messages": asked, "tools": tools}, "chosen": "a"}
    assert Renamed("openai", {"prompt": "input"}).rows(row) == [
        {"tools": tools, "prompt": asked, "chosen": "a"}
    ]


def test_instructions_and_earlier_turns_of_other_types_are_refused() -> None:
    assert with_input("q", "x") == "q\nx" and with_input("q", " ") == "q"
    for instruction, more in (("q", 3), (3, "x")):
        with pytest.raises(BadRow, match="not both text"):
            with_input(instruction, more)
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    assert after_history([["1?", "2"]], "3?") == [*turns, {"role": "user", "content": "3?"}]
    assert after_history(turns, "3?") == [*turns, {"role": "user", "content": "3?"}]
    for history, prompt in (("1?", "3?"), ([], 3), ([["1?"]], "3?"), ([["1?", 2]], "3?")):
        with pytest.raises(BadRow, match="earlier turn"):
            after_history(history, prompt)


def test_a_format_of_one_s_own_may_return_several_rows_and_its_module_has_to_exist() -> None:
    register_format("each-answer")(lambda row: [{"completion": answer} for answer in row["answers"]])
    rows = Custom("each-answer", None).rows({"answers": ["a", "b"]})
    assert rows == [{"completion": "a"}, {"completion": "b"}]
    with pytest.raises(ConfigError, match=r"data\.format_module=no\.such cannot be imported"):
        registered("each-answer", "no.such")


def test_a_module_that_cannot_be_used_is_refused_before_tokens_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_format.py").write_text("def read(row) return row\n", encoding="utf-8")
    for module, reason in (("no.such", "ModuleNotFoundError: "), ("broken_format", "SyntaxError: ")):
        with pytest.raises(ConfigError, match=rf"data\.format_module={module} cannot be imported: {reason}"):
            FormOptions(module=module).describe()
    with pytest.raises(ConfigError, match=r"data\.format_module=sys has no Python file"):
        FormOptions(module="sys").describe()


def test_a_module_of_formats_may_lie_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "formats_of_here.py").write_text(
        "from rcpo.data.forms import register_format\n"
        "register_format('of here')(lambda row: {'completion': row['q']})\n"
    )
    assert registered("of here", "formats_of_here")({"q": 1}) == {"completion": 1}
    assert sys.path[-1] == str(tmp_path)  # after all that is installed


def test_tokens_follow_the_files_of_a_package_of_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_formats").mkdir()
    (tmp_path / "own_formats" / "__init__.py").write_text("from own_formats import reading\n")
    (tmp_path / "own_formats" / "reading.py").write_text("SIDE = 1\n")
    before = FormOptions(module="own_formats").describe()
    assert FormOptions(module="own_formats").describe() == before
    (tmp_path / "own_formats" / "reading.py").write_text("SIDE = 2\n")
    assert FormOptions(module="own_formats").describe() != before


def test_a_form_that_a_file_does_not_have_is_refused_with_what_it_needs() -> None:
    reason = (
        r"has no such columns; it has prompt, chosen, rejected. Name them with data.columns: prompt, first"
    )
    with pytest.raises(ConfigError, match=reason):
        read([PAIR], format="comparisons")
    with pytest.raises(
        ConfigError, match=r"data.format=nix: there is no such format; give one of preferences"
    ):
        read([PAIR], format="nix")


def test_a_registered_function_is_a_format() -> None:
    @register_format("best of three")
    def best_of_three(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["q"], "chosen": row["answers"][0], "rejected": row["answers"][2]}

    rows = [{"q": "q", "answers": ["a", "x", "b"]}]
    assert read(rows, format="best of three") == ("best of three", [PAIR])
    with pytest.raises(BadRow, match="format best of three refuses the row: KeyError"):
        find_form(rows, FormOptions(format="best of three"), "x").rows({})


def test_an_array_under_the_name_of_lines_is_told_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps([PAIR, PAIR]))
    with pytest.raises(ConfigError, match=r"x\.jsonl:1: an array of objects in one line; .* is named \.json"):
        load(path=str(path))


def test_a_column_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [PAIR])
    reason = r"data.columns.chosen=good: .*x.jsonl has no such column; it has prompt, chosen, rejected"
    with pytest.raises(ConfigError, match=reason):
        load(path=path, columns={"chosen": "good"})
    with pytest.raises(ConfigError, match=r"data.columns.chosen=.* is not a Jinja template"):
        load(path=path, columns={"chosen": "{{ good"})


def test_comparisons_in_a_file_are_trained_counted_and_kept(tmp_path: Path) -> None:
    """The form, the ties and the ids survive the cache."""
    rows = [{"q": f"q{n}", "output_1": "a", "output_2": f"b{n}", "label": n % 3} for n in range(30)]
    path = write(tmp_path / "x.jsonl", rows)
    settings = {
        "path": path,
        "eval_fraction": 0,
        "columns": {"prompt": "q"},
        "cache": str(tmp_path / "cache"),
    }
    for _ in range(2):
        data = load(**settings)
        assert len(data.train) == 40 and data.train.weights.tolist().count(0.5) == 20
        assert list(data.train.ids)[:3] == ["x.jsonl:1", "x.jsonl:1", "x.jsonl:2"]
        said = data.report.lines()
        assert any(
            "x.jsonl: read as comparisons of 'output_1' and 'output_2' judged by 'label'" in x for x in said
        )
        assert "10 ties are learned in both orders at half the weight (data.ties=keep)" in said
    assert len(load(**settings, ties="drop").train) == 20


def test_a_csv_of_messages_as_json_is_a_conversation(tmp_path: Path) -> None:
    cell = json.dumps(json.dumps([human("q"), gpt("a")]))
    (tmp_path / "x.jsonl").write_text(f'{{"conversations": {cell}}}\n' * 4)
    data = load(path=str(tmp_path / "x.jsonl"), eval_fraction=0, template="plain")
    assert data.train.kind == "sft" and len(data.train) == 4
