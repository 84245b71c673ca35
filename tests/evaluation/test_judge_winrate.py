"""Win rates from verdicts: by hand, in closed form, and against a search for the likelihood's maximum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rcpo.evaluation.judge.winrate import (
    RIDGE,
    JudgedPairs,
    cohens_kappa,
    judge_metrics,
    length_controlled_win_rates,
)


def judged(
    verdicts: Any, longer: Any = None, labels: Any = None, asked: Any = None, prompts: Any = None
) -> JudgedPairs:
    verdicts = np.asarray(verdicts, np.float64)
    count = len(verdicts)
    return JudgedPairs(
        ids=[str(number) for number in range(count)],
        verdicts=verdicts,
        asked=np.ones(count, bool) if asked is None else np.array(asked),
        longer=np.zeros(count) if longer is None else np.asarray(longer, np.float64),
        labels=np.full(count, math.nan) if labels is None else np.asarray(labels, np.float64),
        prompts=np.arange(count) if prompts is None else np.asarray(prompts),
    )


def controlled(preferences: Any, longer: Any, weights: Any = None) -> float:
    preferences = np.asarray(preferences, np.float64)
    weights = np.ones(len(preferences)) if weights is None else np.asarray(weights, np.float64)
    found = length_controlled_win_rates(preferences, np.asarray(longer, np.float64), weights[None])
    assert found is not None
    return float(found[0])


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_five_pairs_by_hand() -> None:
    # both orders for us; both against; for us, then against; tie and for us; equal answers, not asked
    verdicts = [[1, 1], [0, 0], [1, 0], [0.5, 1], [0.5, 0.5]]
    record = judge_metrics(
        judged(verdicts, asked=[True] * 4 + [False], labels=[1, 1, math.nan, 0.9, 0.5]), seed=0
    )
    # preferences 1, 0, ½, ¾, ½
    assert record["eval/judge/examples"] == 5
    assert record["eval/judge/win_rate"] == pytest.approx(2.75 / 5)
    shares = {name: record[f"eval/judge/{name}"] for name in ("wins", "losses", "ties")}
    assert shares == pytest.approx({"wins": 2 / 5, "losses": 1 / 5, "ties": 2 / 5})
    # of the four that were asked two agree; shares first: 2 for us, 1 against, 1 tie; second: 2, 2, 0
    assert record["eval/judge/agreement"] == 0.5
    expected = (2 / 4) * (2 / 4) + (1 / 4) * (2 / 4)
    assert record["eval/judge/kappa"] == pytest.approx((0.5 - expected) / (1 - expected))
    # decided verdicts for what was shown first: order 1: yes, no, yes; order 2, ours second: no, yes, yes, no
    assert record["eval/judge/first_position_rate"] == pytest.approx(4 / 7)
    # labels: won, won, won, tie against won, lost, won, tie
    assert record["eval/judge/labelled"] == 4
    assert record["eval/judge/label_agreement"] == 0.75
    # equal lengths: nothing to control for
    assert record["eval/judge/length_controlled_win_rate"] == pytest.approx(2.75 / 5)
    low, high = (record[f"eval/judge/length_controlled_win_rate/{end}"] for end in ("low", "high"))
    assert (low, high) == (record["eval/judge/win_rate/low"], record["eval/judge/win_rate/high"])


def test_a_judge_that_takes_what_comes_first() -> None:
    record = judge_metrics(judged([[1, 0]] * 20), seed=0)
    assert record["eval/judge/win_rate"] == 0.5 and record["eval/judge/ties"] == 1
    assert record["eval/judge/agreement"] == 0 and record["eval/judge/first_position_rate"] == 1
    assert record["eval/judge/kappa"] == 0  # all of one kind in each order: chance agrees never
    assert "eval/judge/labelled" not in record


def test_cohens_kappa_of_a_textbook_table() -> None:
    # 20 both yes, 5 yes-no, 10 no-yes, 15 both no: observed 0.7, expected 0.5·0.6 + 0.5·0.4 = 0.5
    one = np.array([1] * 25 + [0] * 25)
    other = np.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert cohens_kappa(one, other) == pytest.approx(0.4)
    assert cohens_kappa(one[:5], one[:5]) is None


def test_intervals_are_those_of_the_binomial_and_of_the_logit() -> None:
    count, share = 900, 0.7
    wins = np.arange(count) < share * count
    longer = np.where(np.arange(count) % 2, 40.0, -40.0)
    record = judge_metrics(judged(np.repeat(wins[:, None], 2, axis=1), longer), seed=3)
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    for name in ("win_rate", "length_controlled_win_rate"):
        # balanced lengths that do not matter: the two are the same, up to one pair in 900
        assert record[f"eval/judge/{name}"] == pytest.approx(share, abs=2e-3)
        assert record[f"eval/judge/{name}/low"] == pytest.approx(share - half, abs=0.15 * half)
        assert record[f"eval/judge/{name}/high"] == pytest.approx(share + half, abs=0.15 * half)


def test_two_lengths_in_closed_form() -> None:
    """A model of two parameters fits two groups exactly: θ ± φ t are their logits, θ the logits' mean."""
    count = 4000
    longer = np.where(np.arange(count) % 2, 100.0, -100.0)
    preferences = np.where(longer > 0, 0.8, 0.4)
    expected = 1 / (1 + math.exp(-(logit(0.8) + logit(0.4)) / 2))
    assert controlled(preferences, longer) == pytest.approx(expected, abs=1e-5)
    # a model that only writes longer is worth a half
    assert controlled(np.where(longer > 0, 0.9, 0.1), longer) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("resampled", [False, True])
def test_the_likelihood_s_maximum_by_search(resampled: bool) -> None:
    generator = np.random.default_rng(5)
    preferences = generator.choice([0, 0.25, 0.5, 0.75, 1.0], 15)
    longer = generator.normal(30, 80, 15).round()
    counts = generator.integers(0, 4, 15) if resampled else np.ones(15)
    feature = np.tanh(longer / longer.std(ddof=1))  # the scale is that of all pairs, in a resample too

    def value(theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
        chance = 1 / (1 + np.exp(-(theta[..., None] + phi[..., None] * feature)))
        terms = preferences * np.log(chance) + (1 - preferences) * np.log(1 - chance)
        return (counts * terms).sum(-1) - RIDGE / 2 * phi**2

    center, width = np.zeros(2), 8.0
    for _ in range(40):
        axes = np.linspace(-width, width, 21)
        theta, phi = np.meshgrid(center[0] + axes, center[1] + axes, indexing="ij")
        best = np.unravel_index(value(theta, phi).argmax(), theta.shape)
        center, width = np.array([theta[best], phi[best]]), width * 0.5
    found = controlled(preferences, longer, counts)
    assert found == pytest.approx(1 / (1 + math.exp(-center[0])), abs=1e-6)


def test_where_the_likelihood_has_no_end() -> None:
    longer = np.array([-30.0, -10.0, 10.0, 30.0])
    assert controlled([1, 1, 1, 1], longer) == 1 and controlled([0, 0, 0, 0], longer) == 0
    # length tells all: finite by the prior, and symmetric
    assert controlled([0, 0, 1, 1], longer) == pytest.approx(0.5, abs=1e-9)
    assert 0.5 < controlled([0, 1, 1, 1], longer) < 1
    # always longer by the same: not to be told apart from quality, so it is left out
    record = judge_metrics(judged([[1, 1], [0, 1]], longer=[7, 7]), seed=0)
    assert "eval/judge/length_controlled_win_rate" not in record and "eval/judge/win_rate" in record
    one = judge_metrics(judged([[1, 1]], longer=[7]), seed=0)
    assert one["eval/judge/win_rate"] == 1 and "eval/judge/kappa" not in one


def test_pairs_of_one_instruction_are_resampled_together() -> None:
    """Sixteen copies of a prompt's verdict say no more than one: the intervals are those of the prompts."""
    generator = np.random.default_rng(0)
    verdicts = generator.integers(0, 2, (30, 2)).astype(np.float64)
    longer = generator.integers(-50, 50, 30)
    once = judge_metrics(judged(verdicts, longer), seed=1)
    copies = judged(verdicts.repeat(16, 0), longer.repeat(16), prompts=np.arange(30).repeat(16))
    found = judge_metrics(copies, seed=1)
    for name in ("win_rate", "win_rate/low", "win_rate/high"):
        assert found[f"eval/judge/{name}"] == pytest.approx(once[f"eval/judge/{name}"], abs=1e-12)
    width = [
        each["eval/judge/length_controlled_win_rate/high"] - each["eval/judge/length_controlled_win_rate/low"]
        for each in (once, found)
    ]
    assert width[1] == pytest.approx(width[0], rel=0.05)  # the ridge weighs less against more pairs
