"""Preference metrics against numbers worked out by hand, and the bootstrap against closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcpo.evaluation.lengths import by_length
from rcpo.evaluation.preference import (
    PreferenceScores,
    bootstrap_interval,
    means_with_intervals,
    preference_metrics,
    write_examples,
)


def three() -> PreferenceScores:
    """Three pairs with β = 2: rewards are twice the log-ratios."""
    return PreferenceScores(
        example_ids=["a", "b", "c"],
        sources=["x:1", "x:2", "x:9"],
        indices=np.array([0, 1, 2]),
        chosen_logps=np.array([-1.0, -2.0, -3.0]),
        rejected_logps=np.array([-2.0, -1.0, -5.0]),
        chosen_logratios=np.array([-0.5, 0.25, -0.25]),
        rejected_logratios=np.array([-1.0, 0.5, -0.75]),
        chosen_rewards=np.array([-1.0, 0.5, -0.5]),
        rejected_rewards=np.array([-2.0, 1.0, -1.5]),
        losses=np.array([0.25, 0.5, 0.75]),
        chosen_incentives=np.array([0.5, 1.0, 1.5]),
        rejected_incentives=np.array([0.25, 0.5, 2.0]),
        chosen_lengths=np.array([3, 4, 5]),
        rejected_lengths=np.array([3, 2, 9]),
        chosen_token_logps=np.array([-0.25, -0.5, -0.75]),
        chosen_token_logratios=np.array([-0.5, 0.5, -0.75]),
        rejected_token_logratios=np.array([-1.0, 0.25, -0.75]),
        prompts=np.array([11, 12, 13], np.uint64),
        score_chosen=np.array([9.0, 8.0, 7.0]),
        score_rejected=np.array([6.0, 8.5, 5.0]),
        margin=np.array([3.0, -0.5, 2.0]),
        weight=np.array([1.0, math.nan, 0.5]),
    )


def test_three_pairs_by_hand() -> None:
    found = preference_metrics(three(), seed=1)
    means = {name: value for name, value in found.items() if not name.endswith(("/low", "/high"))}
    assert means == pytest.approx(
        {
            "eval/examples": 3,
            "eval/loss": 0.5,  # (0.25 + 0.5 + 0.75) / 3
            "eval/rewards/chosen": -1 / 3,  # (−1 + 0.5 − 0.5) / 3
            "eval/rewards/rejected": -2.5 / 3,  # (−2 + 1 − 1.5) / 3
            "eval/rewards/margins": 0.5,  # 1, −0.5, 1
            "eval/rewards/accuracies": 2 / 3,  # all but b
            "eval/token_logps/chosen": -0.5,
            "eval/token_logratios/chosen": -0.25,  # (−0.5 + 0.5 − 0.75) / 3
            "eval/token_logratios/rejected": -0.5,  # (−1 + 0.25 − 0.75) / 3
            "eval/token_logratios/chosen/median": -0.5,  # −0.75, −0.5, 0.5
            "eval/token_logratios/rejected/median": -0.75,  # −1, −0.75, 0.25
            "eval/logps/chosen": -2.0,
            "eval/logps/rejected": -8 / 3,
            "eval/logps/accuracies": 2 / 3,  # −1 > −2, −2 < −1, −3 > −5
            "eval/logratios/chosen": -0.5 / 3,  # (−0.5 + 0.25 − 0.25) / 3
            "eval/logratios/rejected": -1.25 / 3,  # (−1 + 0.5 − 0.75) / 3
            "eval/winner_fell": 2 / 3,  # a and c
        },
        rel=1e-15,
    )
    # Of the 27 equally likely resamples one (3.7 % > 2.5 %) holds the smallest value thrice, one the largest.
    assert (found["eval/loss/low"], found["eval/loss/high"]) == (0.25, 0.75)
    # All misses (b thrice) has 1/27; all hits (a or c, thrice) has 8/27.
    assert (found["eval/rewards/accuracies/low"], found["eval/rewards/accuracies/high"]) == (0.0, 1.0)


def test_a_tie_is_a_miss() -> None:
    scores = replace(three(), rejected_rewards=three().chosen_rewards)
    assert preference_metrics(scores, seed=1)["eval/rewards/accuracies"] == 0.0


def test_without_reference_or_rejected_side_the_names_are_left_out() -> None:
    alone = replace(
        three(),
        rejected_logps=None,
        rejected_rewards=None,
        rejected_lengths=None,
        chosen_logratios=None,
        rejected_logratios=None,
        chosen_token_logratios=None,
        rejected_token_logratios=None,
        losses=None,
    )
    names = {name for name in preference_metrics(alone, seed=1) if not name.endswith(("/low", "/high"))}
    assert names == {"eval/examples", "eval/rewards/chosen", "eval/logps/chosen", "eval/token_logps/chosen"}


def test_a_nan_is_neither_hidden_nor_counted_as_a_miss() -> None:
    found = preference_metrics(replace(three(), rejected_rewards=np.array([-2.0, math.nan, -1.5])), seed=1)
    assert math.isnan(found["eval/rewards/accuracies"]) and math.isnan(found["eval/rewards/margins/low"])
    assert found["eval/rewards/chosen"] == pytest.approx(-1 / 3)


def test_log_ratios_are_of_the_examples_that_were_compared() -> None:
    """a and c were compared with the reference, b was not: its NaN is nothing that went wrong."""
    ratios = np.array([-0.5, math.nan, -0.25])
    scores = replace(
        three(),
        chosen_logratios=ratios,
        rejected_logratios=ratios * 2,
        chosen_token_logratios=ratios,
        rejected_token_logratios=ratios,
        tracked=np.array([True, False, True]),
    )
    found = preference_metrics(scores, seed=1)
    assert found["eval/logratios/chosen"] == -0.375 and found["eval/logratios/rejected"] == -0.75
    assert found["eval/token_logratios/chosen"] == -0.375 and found["eval/winner_fell"] == 1.0
    assert found["eval/token_logratios/chosen/median"] == -0.375
    assert (found["eval/examples"], found["eval/logratios/examples"]) == (3, 2)
    assert (found["eval/logratios/chosen/low"], found["eval/logratios/chosen/high"]) == (-0.5, -0.25)
    assert found["eval/logps/chosen"] == -2.0 and found["eval/rewards/accuracies"] == pytest.approx(2 / 3)
    buckets = by_length(scores)  # 3 tokens; 4 and 5
    assert buckets["eval/by_length/2-3/logratios/chosen"] == -0.5
    assert buckets["eval/by_length/4-7/logratios/chosen"] == -0.25
    assert buckets["eval/by_length/4-7/examples"] == 2
    lost = preference_metrics(replace(scores, tracked=np.ones(3, bool)), seed=1)
    assert math.isnan(lost["eval/logratios/chosen"])


def test_interval_of_a_mean_is_the_normal_one() -> None:
    generator = np.random.default_rng(5)
    values = generator.normal(3.0, 2.0, (4000, 1))
    error = values.std() / math.sqrt(4000)  # the standard error of a bootstrap mean, by definition
    low, high = bootstrap_interval(values, seed=11)
    # 2,000 resamples know a 2.5 % quantile to sqrt(0.025 · 0.975 / 2000) / φ(1.96) = 0.06 standard errors.
    assert low[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high[0] == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_interval_of_a_share_is_the_binomial_one() -> None:
    """The number of hits in a resample of 100 with 30 hits is binomial(100, 0.3)."""
    values = np.array([1.0] * 30 + [0.0] * 70)[:, None]
    mass = np.array([math.comb(100, hits) * 0.3**hits * 0.7 ** (100 - hits) for hits in range(101)])
    exact = [float(np.searchsorted(np.cumsum(mass), tail)) / 100 for tail in (0.025, 0.975)]
    low, high = bootstrap_interval(values, seed=3)
    assert [low[0], high[0]] == pytest.approx(exact, abs=0.011)  # one hit


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    """Copies add nothing: with each prompt's pair sixteen times over, the interval is that of the prompts."""
    values = np.random.default_rng(2).normal(size=(40, 1))
    once = bootstrap_interval(values, seed=7)
    copies = bootstrap_interval(values.repeat(16, 0), seed=7, prompts=np.arange(40).repeat(16))
    assert np.allclose(copies, once, rtol=0, atol=1e-12)
    apart = bootstrap_interval(values.repeat(16, 0), seed=7)
    # sixteen times as many independent pairs would give a quarter of the width
    assert (apart[1] - apart[0]) / (once[1] - once[0]) == pytest.approx(0.25, rel=0.1)


def test_prompts_with_more_pairs_weigh_more() -> None:
    """Two prompts, of one pair (0) and of three (1): a resample's mean is 0, 3/4 or 1."""
    values, prompts = np.array([0.0, 1, 1, 1])[:, None], np.array([9, 4, 4, 4])
    low, high = bootstrap_interval(values, seed=1, prompts=prompts)
    assert (low[0], high[0]) == (0, 1)  # each of the same prompt twice has a chance of 1/4
    middle = [[0.0], [1.0], [1.0], [1.0], [1.0]]  # five prompts of one pair each beside them
    both = np.concatenate([values, middle])
    found = means_with_intervals({"x": both[:, 0]}, 1, prompts=np.array([9, 4, 4, 4, 0, 1, 2, 3, 5]))
    assert found["eval/x"] == pytest.approx(7 / 9)  # the mean stays that of the pairs


def test_unpaired_columns_keep_their_prompts_together() -> None:
    scores = replace(
        three(),
        chosen_lengths=np.array([3, 0, 5]),
        rejected_lengths=np.array([0, 2, 0]),
        prompts=np.array([7, 1, 7], np.uint64),
    )
    found = preference_metrics(scores, seed=1)
    # both chosen responses are of one prompt: every resample is the same
    assert found["eval/rewards/chosen/low"] == found["eval/rewards/chosen"] == -0.75


def test_intervals_are_seeded_shared_and_independent_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=50)
    found = means_with_intervals({"x": first, "shifted": first + 7}, seed=4)
    assert found == means_with_intervals({"x": first, "shifted": first + 7}, seed=4)
    assert found["eval/shifted/low"] - found["eval/x/low"] == pytest.approx(
        7, abs=1e-12
    )  # the same resamples
    assert found["eval/x/low"] != means_with_intervals({"x": first}, seed=5)["eval/x/low"]
    monkeypatch.setattr("rcpo.evaluation.preference._DRAWS_AT_ONCE", 50 * 64)
    assert means_with_intervals({"x": first}, seed=4)["eval/x/low"] == pytest.approx(found["eval/x/low"])


def test_no_example_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(ValueError, match=r"data\.eval_fraction"):
        means_with_intervals({"x": np.zeros(0)}, seed=1)
    with pytest.raises(ValueError, match=r"data\.eval_fraction"):
        PreferenceScores.gather([])


def part(scores: PreferenceScores, rows: list[int], filler: int = 0) -> PreferenceScores:
    """Some rows of the scores, as a rank has them, and fillers."""
    kept = rows + [0] * filler
    columns = {
        name: None if value is None else np.asarray(value)[kept] for name, value in vars(scores).items()
    }
    columns["indices"][len(rows) :] = -1
    texts = {name: list(columns[name]) for name in ("example_ids", "sources")}
    return PreferenceScores(**{**columns, **texts})


def test_gathering_gives_one_record_for_any_split_over_ranks() -> None:
    whole = three()
    splits = [
        [part(whole, [0, 1, 2])],
        [part(whole, [2, 0]), part(whole, [1], filler=1)],
        [part(whole, [1]), part(whole, [0]), part(whole, [2], filler=2), part(whole, [], filler=1)],
        [part(whole, [0, 1]), part(whole, [1, 2])],
    ]
    for parts in splits:
        gathered = PreferenceScores.gather(parts)
        assert gathered.example_ids == ["a", "b", "c"]
        for name, value in vars(whole).items():
            np.testing.assert_array_equal(getattr(gathered, name), value)


def test_gathering_and_building_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="losses"):
        PreferenceScores.gather([part(three(), [0]), replace(part(three(), [1]), losses=None)])
    with pytest.raises(ValueError, match=r"losses has shape \(2,\)"):
        replace(three(), losses=np.zeros(2))


def test_examples_file_is_keyed_by_id(tmp_path: Path) -> None:
    scores = replace(three(), losses=np.array([0.25, math.nan, 0.75]))
    write_examples(tmp_path / "examples.jsonl", scores, {"b": {"answer": "17 – süß", "correct": True}})
    lines = [
        json.loads(line) for line in (tmp_path / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[1] == {
        "id": "b",
        "source": "x:2",
        "index": 1,
        "loss": None,
        "nonfinite": 1,
        "rewards/chosen": 0.5,
        "rewards/rejected": 1.0,
        "rewards/margins": -0.5,
        "rewards/accuracies": 0.0,
        "logps/chosen": -2.0,
        "logps/rejected": -1.0,
        "logps/accuracies": 0.0,
        "logratios/chosen": 0.25,
        "logratios/rejected": 0.5,
        "token_logps/chosen": -0.5,
        "token_logratios/chosen": 0.5,
        "token_logratios/rejected": 0.25,
        "winner_fell": 0.0,
        "dynamics/incentive_chosen": 1.0,
        "dynamics/incentive_rejected": 0.5,
        "lengths/chosen": 4,
        "lengths/rejected": 2,
        "score_chosen": 8.0,
        "score_rejected": 8.5,
        "margin": -0.5,
        "answer": "17 – süß",
        "correct": True,
    }
    assert [line.get("weight") for line in lines] == [1.0, None, 0.5]  # b's row gives none


def test_unpaired_examples_count_for_the_side_that_they_have() -> None:
    """a and b wanted, c unwanted: the winner's means are over a and b, the loser's over c alone."""
    scores = replace(
        three(), chosen_lengths=np.array([3, 4, 0]), rejected_lengths=np.array([0, 0, 9]), losses=None
    )
    found = preference_metrics(scores, seed=1)
    means = {name: value for name, value in found.items() if not name.endswith(("/low", "/high"))}
    assert means == pytest.approx(
        {
            "eval/examples": 3,
            "eval/rewards/chosen": -0.25,  # (−1 + 0.5) / 2
            "eval/rewards/rejected": -1.5,
            "eval/logps/chosen": -1.5,
            "eval/logps/rejected": -5.0,
            "eval/logratios/chosen": -0.125,
            "eval/logratios/rejected": -0.75,
            "eval/token_logps/chosen": -0.375,  # (−0.25 − 0.5) / 2
            "eval/token_logratios/chosen": 0.0,
            "eval/token_logratios/chosen/median": 0.0,
            "eval/token_logratios/rejected": -0.75,
            "eval/token_logratios/rejected/median": -0.75,
            "eval/winner_fell": 0.5,
        }
    )
    buckets = by_length(scores)
    assert buckets["eval/by_length/2-3/logratios/chosen"] == -0.5
    assert buckets["eval/by_length/4-7/examples"] == 1
    assert not any(name.endswith("rejected") or "accuracies" in name for name in buckets)
