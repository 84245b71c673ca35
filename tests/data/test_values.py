"""Scores, margins, weights and gold answers: from a row to a batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import rcpo.data
from rcpo.config.data import DataConfig, check_data
from rcpo.data.collate import collate_indices
from rcpo.data.dataset import load_datasets
from rcpo.data.formats import read_row
from rcpo.data.records import BadRow, Example
from rcpo.data.selection import by_margin
from rcpo.data.store import PairDataset
from rcpo.data.values import read_values
from rcpo.errors import ConfigError

TOKENIZER = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / "assets" / "tiny")
NAN = math.nan


def load(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"name": "pairs", "path": str(path), "eval_fraction": 0.0, "cache": "off", **settings}
    return load_datasets(DataConfig(**settings), TOKENIZER, seed=1)


def pair(number: int, **values: Any) -> dict[str, Any]:
    return {"prompt": f"q{number}", "chosen": "yes", "rejected": "no", **values}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"weight": 2}, {"weight": 2.0}),
        (
            {"score_chosen": 9, "score_rejected": 7.5},
            {"score_chosen": 9, "score_rejected": 7.5, "margin": 1.5},
        ),
        (
            {"score_chosen": "9", "score_rejected": "-1"},
            {"score_chosen": 9, "score_rejected": -1, "margin": 10},
        ),
        ({"margin": 0.25}, {"margin": 0.25}),
        (
            {"score_chosen": 3.0, "margin": None, "weight": ""},
            {"score_chosen": 3.0},
        ),  # as CSV and Arrow have it
        (
            {"score_chosen": 0.3, "score_rejected": 0.1, "margin": 0.2},
            {"score_chosen": 0.3, "score_rejected": 0.1, "margin": 0.2},
        ),
    ],
)
def test_numbers_of_a_row(fields: dict[str, Any], expected: dict[str, float]) -> None:
    assert read_values(fields) == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": 0}, "field 'weight' is not positive"),
        ({"weight": -1.0}, "field 'weight' is not positive"),
        ({"weight": True}, "field 'weight' is not a finite number"),
        ({"margin": "much"}, "field 'margin' is not a finite number"),
        ({"score_chosen": NAN}, "field 'score_chosen' is not a finite number"),
        ({"score_rejected": [1]}, "field 'score_rejected' is not a finite number"),
        ({"score_chosen": 2, "score_rejected": 1, "margin": 3}, "not the difference of the two scores"),
    ],
)
def test_numbers_that_make_no_sense(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read_values(fields)


TURNS = "\n\nHuman: q\n\nAssistant:"
Q, A, B, G = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "assistant", "content": "g"},
)


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r", "gold": "g"}, "g"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "gold": ""}, None),
        ({"prompt": [Q], "chosen": [A], "rejected": [B], "gold": [G]}, [G]),
        ({"prompt": [Q], "chosen": [A], "rejected": [B], "gold": "g"}, [G]),
        ({"chosen": [Q, A], "rejected": [Q, B], "gold": [Q, G]}, [G]),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "gold": [Q, G]}, [G]),
        ({"chosen": f"{TURNS} c", "rejected": f"{TURNS} r", "gold": f"{TURNS} g"}, " g"),
    ],
)
def test_gold_answers(row: dict[str, Any], gold: Any) -> None:
    assert read_row(row).gold == gold


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": f"{TURNS} c", "rejected": f"{TURNS} r", "gold": "g"}, "as the two responses"),
        ({"chosen": [Q, A], "rejected": [Q, B], "gold": [Q | {"content": "z"}, G]}, "the prompt's messages"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "gold": "  "}, "empty gold response"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "gold": 3}, "field 'gold' is a number"),
    ],
)
def test_gold_answers_that_do_not_fit(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read_row(row)


def test_numbers_and_gold_reach_the_batch(tmp_path: Path) -> None:
    rows = [
        pair(0, score_chosen=8, score_rejected=5, weight=0.1, gold="yes!"),
        pair(1, margin=-0.5),
        pair(2, score_chosen=1, score_rejected=1, weight=3),
    ]
    train = load(tmp_path, rows).train
    expected = [[8, 5, 3, 0.1], [NAN, NAN, -0.5, NAN], [1, 1, 0, 3]]
    np.testing.assert_array_equal(train.values, expected)
    assert train.weights.tolist() == [0.1, 1, 3]
    assert TOKENIZER.decode(train[0].gold[:-1]) == "yes!" and train[1].gold == []
    batch = collate_indices(train, [2, 0, -1], 0)
    assert batch.weights.tolist() == [3, 0.1, 0]  # a filler has none; 0.1 in full precision
    assert batch.margins is not None and batch.margins[:2].tolist() == [0, 3]
    assert collate_indices(PairDataset.of([Example("x", [1], [2], [3])]), [0], 0).margins is None


def test_numbers_are_read_from_the_cache_too(tmp_path: Path) -> None:
    rows = [pair(n, weight=n + 0.5, gold=f"g{n}") for n in range(5)]
    made, mapped = (load(tmp_path, rows, cache=str(tmp_path / "cache")).train for _ in range(2))
    assert mapped.weights.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert mapped.fingerprint == made.fingerprint and mapped[3] == made[3]
    rows[3]["weight"] = 9
    assert load(tmp_path, rows, cache=str(tmp_path / "cache")).train.fingerprint != made.fingerprint


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [pair(0, importance=2.5, best="yes, surely")]
    train = load(tmp_path, rows, columns={"weight": "importance", "gold": "best"}).train
    assert train.weights.tolist() == [2.5] and TOKENIZER.decode(train[0].gold[:-1]) == "yes, surely"


def test_margins_out_of_bounds_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [pair(n, margin=margin) for n, margin in enumerate([0, 0.5, 1, 2, 3, 0, 7])]
    data = load(tmp_path, rows, min_margin=0.5, max_margin=3.0, ties="drop")
    assert [example.id.rpartition(":")[2] for example in data.train] == ["2", "3", "4", "5"]  # lines from 1
    assert data.report.left_out == {
        "tied scores (data.ties=drop)": 2,  # counted once, though they are below 0.5 too
        "a margin above data.max_margin=3.0": 1,
    }
    lines = "\n".join(data.report.lines())
    assert (
        "left out: 2 pairs with tied scores (data.ties=drop) (first: " in lines and "pairs.jsonl:1)" in lines
    )
    assert data.report.as_dict()["left_out"]["a margin above data.max_margin=3.0"] == 1


def test_held_out_pairs_are_held_to_the_same_margins(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(pair(n, margin=n)) + "\n" for n in range(4)))
    data = load(tmp_path, [pair(n, margin=n) for n in range(5)], min_margin=2.0, eval_path=str(other))
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert data.report.left_out["a margin below data.min_margin=2.0"] == 4
    half = load(tmp_path, [pair(n, margin=n) for n in range(8)], min_margin=2.0, eval_fraction=0.5)
    assert sorted(margin for side in (half.train, half.evaluation) for margin in side.margins.tolist()) == [
        2,
        3,
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [pair(0, margin=1), pair(1)],
            {"min_margin": 0.0},
            r"pairs\.jsonl:2: neither a margin nor two scores",
        ),
        ([pair(0)], {"ties": "drop"}, r"pairs\.jsonl:1: neither a margin nor two scores"),
        (
            [pair(0, margin=1)],
            {"min_margin": 2.0},
            r"no pair is left: 1 with a margin below data\.min_margin=2",
        ),
    ],
)
def test_margins_that_cannot_be_held_to_bounds(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, rows, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "pairs", "path": "a/b", "min_margin": 2.0, "max_margin": 1.0}, "min_margin=2 is above"),
        ({"name": "sums", "min_margin": 1.0}, "data.min_margin=1: data=sums has no scores"),
        ({"name": "sums", "max_margin": 1.0}, "data.max_margin=1: data=sums has no scores"),
        ({"name": "sums", "ties": "drop"}, "data.ties=drop: data=sums has no scores"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_data(DataConfig(**settings))


def test_a_row_counts_for_the_first_reason() -> None:
    left_out = by_margin(np.array([0.0, -1.0, 5.0, 0.2]), 0.1, 4.0, ties=False)
    assert [rows.tolist() for rows in left_out.values()] == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
    ]
