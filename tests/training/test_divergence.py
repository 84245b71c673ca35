"""One warning for each sign, when it is due and not before."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from rcpo.config.schema import RunConfig
from rcpo.training.watch import DivergenceWatch, tokens_per_winner


def watch(reduction: str = "mean", tokens: float = 1.0, **settings: Any) -> DivergenceWatch:
    config = RunConfig()
    tokens = tokens_per_winner(reduction, np.array([tokens]))
    config.watch.patience = 3
    for key, value in settings.items():
        setattr(config.watch, key, value)
    return DivergenceWatch(config, tokens)


def said(rows: list[dict[str, Any]], judge: DivergenceWatch) -> list[str]:
    return [line for step, row in enumerate(rows, 1) for line in judge.look({"step": step, **row})]


@pytest.mark.parametrize(
    ("reduction", "tokens", "first"),
    [("mean", 20.0, -0.31), ("sum", 20.0, -6.2), ("importance", 20.0, -0.31)],
)
def test_a_falling_winner_is_said_once(reduction: str, tokens: float, first: float) -> None:
    # 0.3 nats per token: for sums over 20 tokens that is 6 nats
    rows = [{"logratios/chosen": value} for value in (0.1, first * 0.96, first, 2 * first)]
    lines = said(rows, watch(reduction, tokens))
    assert len(lines) == 1 and lines[0].startswith("step 3: the winner lost 0.31 nats per token")
    assert not said(rows, watch(reduction, tokens, winner=None))


def test_only_the_winners_that_are_there_count() -> None:
    # unpaired data: half the rows have no chosen response; those that have one are 18 and 22 tokens long
    lengths = np.array([18, 0, 22, 0])
    assert tokens_per_winner("sum", lengths) == 20.0
    judge = watch("sum", tokens_per_winner("sum", lengths))
    # 0.3 nats per token are 6 nats of a sum; with the empty ones counted, 3 would do
    lines = said([{"logratios/chosen": -3.5}, {"logratios/chosen": -5.9}, {"logratios/chosen": -6.1}], judge)
    assert len(lines) == 1 and lines[0].startswith("step 3:")
    assert tokens_per_winner("sum", np.zeros(3)) == tokens_per_winner("mean", lengths) == 1.0


ADVICE = "rc=loop holds the winner near rc.target=0, and a lower optim.lr slows it"


@pytest.mark.parametrize(
    ("rule", "band"),
    [
        (None, {"dynamics/in_band": False}),
        (None, {"dynamics/in_band": None}),
        ("center", {"dynamics/in_band": True, "rc/in_band": False}),
        ("edge", {}),
        ("fixed", {}),
    ],
)
def test_the_loop_is_advised_to_runs_without_it(rule: str | None, band: dict[str, Any]) -> None:
    (line,) = said([{"logratios/chosen": -9.0, **band}], by_rule(rule))
    assert line.endswith(f"(watch.winner=0.3); {ADVICE}")


@pytest.mark.parametrize(
    ("rule", "band"),
    [
        (None, {"dynamics/in_band": True}),
        ("center", {"dynamics/in_band": False, "rc/in_band": True}),
    ],
)
def test_a_fall_inside_the_band_is_explained(rule: str | None, band: dict[str, Any]) -> None:
    (line,) = said([{"logratios/chosen": -9.0, **band}], by_rule(rule))
    assert line.endswith(f"; this batch's band, in which the step is, does not govern other text: {ADVICE}")


def test_what_cannot_be_calibrated_is_not_advised_to_be() -> None:
    (line,) = said([{"logratios/chosen": -9.0}], DivergenceWatch(RunConfig(), 1.0, paired=False))
    assert line.endswith("(watch.winner=0.3); a lower optim.lr slows it")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"rc/alpha": 2.0, "rc/saturated": 0}, "rc=loop has not caught up"),
        ({"rc/alpha": 10.0}, "rc=loop does not hold it: it asked for more than rc.alpha_max=10.0"),
        (
            {"rc/alpha": 9.0, "rc/saturated": 7},
            "rc=loop does not hold it: it asked for more than rc.alpha_max=10.0 in 7 readings",
        ),
        # 20 tokens: −9 nats of a sum, from −1 under the reference to −10
        (
            {"logps/chosen": -10.0},
            "rc=loop does not hold it: the winner was almost certain under the reference "
            "(-0.05 nats per token) and can only fall",
        ),
        ({"logps/chosen": -12.0}, "rc=loop has not caught up"),  # from −3: −0.15 a token
        (
            {"rc/saturated": 1, "logps/rejected": -320.0},
            "rc=loop does not hold it: it asked for more than rc.alpha_max=10.0 in 1 reading and "
            "the loser is at its floor (-16.0 nats per token)",
        ),
    ],
)
def test_a_loop_that_lets_the_winner_fall_is_explained(row: dict[str, Any], why: str) -> None:
    (line,) = said([{"logratios/chosen": -9.0, **row}], by_rule("loop", tokens=20.0))
    assert line.endswith(f"; {why}; a lower optim.lr slows it")


def by_rule(rule: str | None, tokens: float = 1.0) -> DivergenceWatch:
    config = RunConfig()
    config.rc.enabled = rule is not None
    config.rc.rule = rule or config.rc.rule
    return DivergenceWatch(config, tokens)


def test_a_clamped_loop_points_to_its_own_figures() -> None:
    clamped = [{"rc/alpha": 10.0}] * 50
    assert "the loop asks for more, see rc/winner and rc/saturated" in said(clamped, by_rule("loop"))[0]
    assert "score has nearly vanished" in said(clamped, by_rule("edge"))[0]


def test_certainty_with_a_growing_margin() -> None:
    right = [{"rewards/accuracies": 1.0, "rewards/margins": margin} for margin in (1.0, 1.5, 1.9, 2.0, 9.0)]
    lines = said(right, watch())
    assert len(lines) == 1 and lines[0].startswith("step 4: every pair has been right for 4 steps")
    broken = [*right[:2], {"rewards/accuracies": 0.9, "rewards/margins": 2.0}, *right[3:]]
    assert not said(broken, watch())  # the streak starts again, at a margin of 2
    still = [{"rewards/accuracies": 1.0, "rewards/margins": 1.0}] * 9
    assert not said(still, watch())


def test_alpha_at_its_clamp() -> None:
    at = [{"rc/alpha": 10.0}] * 2
    assert not said([*at, {"rc/alpha": 9.0}, *at], watch())
    lines = said([*at, {"rc/alpha": 0.1}, *at], watch())
    assert len(lines) == 1 and lines[0].startswith("step 3: α has been at its clamp (0.1) for 3 steps")
    free = watch()
    free._alpha_max = None
    assert not said([{"rc/alpha": 88.0}] * 9, free)


def test_values_that_are_missing_say_nothing() -> None:
    row = {"logratios/chosen": None, "rewards/accuracies": None, "rewards/margins": None, "rc/alpha": None}
    assert not said([row, {}] * 5, watch())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_neither_warns_nor_uses_up_the_warning(bad: float) -> None:
    # train.on_nonfinite=skip goes on after a step whose means are NaN, or infinite with every pair right
    judge = watch()
    right = {"rewards/accuracies": 1.0}
    assert not said([{"logratios/chosen": bad, "rewards/margins": bad, **right}] * 5, judge)
    json.dumps(judge.state_dict(), allow_nan=False)  # a checkpoint can hold it
    lines = said([{"logratios/chosen": -0.4}], judge)
    assert len(lines) == 1 and "the winner lost 0.40 nats per token" in lines[0]


def test_what_was_saved_stays_as_it_was() -> None:
    judge = watch()
    state = judge.state_dict()
    said([{"rc/alpha": 10.0}] * 2, judge)
    assert state["in_a_row"] == {"margin": 0, "alpha": 0}
    assert judge.state_dict()["in_a_row"] == {"margin": 0, "alpha": 2}


def test_a_resumed_run_says_what_an_uninterrupted_one_does() -> None:
    # the winner has fallen by 0.4 at step 3, α was at its clamp for 3 steps at 4, the margin doubled at 5
    margins, alphas = (1.0, 1.2, 1.4, 1.6, 2.0), (9.0, 10.0, 10.0, 10.0, 10.0)
    rows = [
        {
            "logratios/chosen": -0.2 * n,
            "rewards/accuracies": 1.0,
            "rewards/margins": margins[n],
            "rc/alpha": alpha,
        }
        for n, alpha in enumerate(alphas)
    ]
    whole = said(rows, watch())
    assert [line.split(":")[0] for line in whole] == ["step 3", "step 4", "step 5"]
    for stop in range(1, 5):
        first, then = watch(), watch()
        lines = said(rows[:stop], first)
        then.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step, row in enumerate(rows[stop:], stop + 1):
            lines += then.look({"step": step, **row})
        assert lines == whole, stop
