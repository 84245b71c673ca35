"""The sentence and the table about what happened to winner and loser."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rcpo.evaluation.summary import Move, describe, interval, move, summary_table

Values = dict[str, float | None]


def values(winner: tuple[float, float, float] | None, loser: tuple[float, float, float] | None) -> Values:
    record: Values = {"eval/examples": 1280, "eval/rewards/accuracies": 0.95, "eval/exact_match": 0.976}
    for name, triple in (("chosen", winner), ("rejected", loser)):
        if triple is not None:
            for end, value in zip(("", "/low", "/high"), triple, strict=True):
                record[f"eval/logratios/{name}{end}"] = value
    return record


def test_log_ratios_of_some_pairs_say_of_how_many() -> None:
    record = values((-1.2, -1.3, -1.1), (-1.2, -1.3, -1.1)) | {"eval/logratios/examples": 256}
    assert "(mean log-ratio −1.20 [−1.30, −1.10] nats per token of 256 pairs; the loser's" in describe(
        record, "mean"
    )
    assert summary_table(record).title == "Held-out evaluation on 1,280 pairs, log-ratios on 256 of them"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.5, -0.11, Move.FELL),
        (-0.1, 0.1, Move.KEPT),
        (0.11, 0.5, Move.ROSE),
        (-0.2, -0.05, Move.SLIPPED),
        (0.05, 0.3, Move.GAINED),
        (-3.0, 3.0, Move.OPEN),
        (-0.2, 0.0, Move.OPEN),
        (0.0, 0.2, Move.OPEN),
    ],
)
def test_an_interval_tells_where_a_side_went_and_whether_it_tells_how_far(
    low: float, high: float, expected: Move
) -> None:
    assert move(low, high) is expected


KEPT, FELL, ROSE, OPEN = (-0.03, -0.05, -0.01), (-1.2, -1.3, -1.1), (0.5, 0.4, 0.6), (0.0, -0.4, 0.4)
SLIPPED, GAINED = (-0.12, -0.18, -0.05), (0.12, 0.05, 0.18)
GOOD = "; held-out accuracy 95 %, exact match 98 %."


@pytest.mark.parametrize(
    ("winner", "loser", "sentence"),
    [
        (
            KEPT,
            FELL,
            "On average the winner moved by less than 0.1 (mean log-ratio −0.03 [−0.05, −0.01] nats per "
            "token) while the loser fell (−1.20 [−1.30, −1.10])",
        ),
        (
            FELL,
            FELL,
            "On average the winner fell with the loser: likelihood displacement (mean log-ratio "
            "−1.20 [−1.30, −1.10] nats per token; the loser's −1.20 [−1.30, −1.10])",
        ),
        (
            FELL,
            KEPT,
            "On average the winner fell (mean log-ratio −1.20 [−1.30, −1.10] nats per token) although the "
            "loser did not (−0.03 [−0.05, −0.01])",
        ),
        (
            ROSE,
            ROSE,
            "On average the winner rose (mean log-ratio 0.50 [0.40, 0.60] nats per token) and the loser rose "
            "(0.50 [0.40, 0.60])",
        ),
        (
            OPEN,
            FELL,
            "On average the winner moved too unevenly to call (mean log-ratio 0.00 [−0.40, 0.40] nats per "
            "token) while the loser fell (−1.20 [−1.30, −1.10])",
        ),
        (
            SLIPPED,
            FELL,
            "On average the winner fell, perhaps by less than 0.1 (mean log-ratio −0.12 [−0.18, −0.05] nats "
            "per token) while the loser fell (−1.20 [−1.30, −1.10])",
        ),
        (
            SLIPPED,
            GAINED,
            "On average the winner fell, perhaps by less than 0.1 (mean log-ratio −0.12 [−0.18, −0.05] nats "
            "per token) although the loser rose, perhaps by less than 0.1 (0.12 [0.05, 0.18])",
        ),
        (ROSE, None, "On average the winner rose (mean log-ratio 0.50 [0.40, 0.60] nats per token)"),
    ],
)
def test_the_sentence(
    winner: tuple[float, float, float], loser: tuple[float, float, float] | None, sentence: str
) -> None:
    assert describe(values(winner, loser), "mean") == sentence + GOOD


@pytest.mark.parametrize(
    ("winner", "share", "said"),
    [
        (KEPT, 0.7, "[−0.05, −0.01] nats per token; the winner fell in 70 % of the pairs) while"),
        (KEPT, 0.5, "[−0.05, −0.01] nats per token) while"),
        (ROSE, 0.575, "[0.40, 0.60] nats per token; the winner fell in 57 % of the pairs) while"),
        (FELL, 0.4, "[−1.30, −1.10] nats per token; the winner fell in only 40 % of the pairs; the loser's"),
        (FELL, 0.9, "[−1.30, −1.10] nats per token; the loser's"),
        (SLIPPED, 0.66, "[−0.18, −0.05] nats per token) while"),
        (SLIPPED, 0.4, "; the winner fell in only 40 % of the pairs) while"),
    ],
)
def test_pairs_that_contradict_the_mean_are_counted(
    winner: tuple[float, float, float], share: float, said: str
) -> None:
    assert said in describe(values(winner, FELL) | {"eval/winner_fell": share}, "mean")


@pytest.mark.parametrize(
    ("reduction", "unit"), [("mean", "nats per token"), ("sum", "nats per response"), (None, "nats")]
)
def test_log_ratios_have_the_unit_of_the_reduction(reduction: str | None, unit: str) -> None:
    assert f"[−0.05, −0.01] {unit}) while" in describe(values(KEPT, FELL), reduction)


@pytest.mark.parametrize("winner", [KEPT, FELL, ROSE, OPEN])
def test_a_loser_that_stays_is_not_called_preserved(winner: tuple[float, float, float]) -> None:
    sentence = describe(values(winner, KEPT), "mean")
    assert "kept" not in sentence and "−0.03 [−0.05, −0.01]" in sentence


def test_without_a_reference_it_says_so() -> None:
    record: Values = {"eval/logps/chosen": -0.5, "eval/logps/rejected": -2.0, "eval/rewards/accuracies": 1.0}
    assert describe(record, "sum") == (
        "There is no reference to compare with (mean log-probs: winner −0.50 and loser −2.00 nats per "
        "response); held-out accuracy 100 %."
    )


def test_a_policy_that_is_its_own_reference_has_no_accuracy_by_rewards() -> None:
    zero = (0.0, 0.0, 0.0)
    record = values(zero, zero) | {"eval/rewards/accuracies": 0.0, "eval/logps/accuracies": 0.67}
    for end in ("", "/low", "/high"):
        record[f"eval/rewards/margins{end}"] = 0.0
    assert describe(record, "mean") == (
        "The policy gives the held-out pairs the same probabilities as the reference; held-out accuracy by "
        "log-probs 67 %, exact match 98 %."
    )
    assert interval(record, "rewards/accuracies", "percent") == "– (equal rewards)"
    assert interval(record | {"eval/rewards/margins/high": 0.01}, "rewards/accuracies", "percent") == "0 %"


def test_missing_and_nan_figures_are_not_invented() -> None:
    assert describe({"eval/logratios/chosen": None, "eval/exact_match": float("nan")}, None) == (
        "There is no reference to compare with (mean log-probs: unknown)."
    )
    assert interval({}, "loss") == "–"
    assert interval({"eval/exact_match": 0.996}, "exact_match", "percent") == "99.6 %"
    assert interval({"eval/exact_match": 1.0}, "exact_match", "percent") == "100 %"


def test_the_table_has_the_rows_that_are_known() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(values(KEPT, FELL)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Held-out evaluation on 1,280 pairs" in text
    assert "−0.03 [−0.05, −0.01]" in text and "98 %" in text
    assert "reward margin" not in text
