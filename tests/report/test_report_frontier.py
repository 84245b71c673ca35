"""The frontier of a sweep, and the first figure of a calibrated run, from numbers made by hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from report_folders import rows, settings, write_run

from rcpo.report import theme
from rcpo.report.figures import dynamics_of_run
from rcpo.report.frontier import LOSER, WINNER, curves, frontier, frontiers
from rcpo.report.runs import read_run
from rcpo.runs.comparison import RunSummary, conditions


def a_run(winner: float, loser: float, rule: str | None = None, seed: int = 1, **more: Any) -> RunSummary:
    own = {"seed": seed, "rc.enabled": rule is not None, "rc.rule": rule, **more}
    own |= {"objective.name": "dpo", "objective.reduction": "mean"}
    return RunSummary(f"{rule}-{seed}", own, {WINNER: winner, LOSER: loser})


def test_points_are_means_with_their_spread_over_seeds() -> None:
    runs = [a_run(-0.5, -0.6), a_run(-0.3, -0.6, seed=2), a_run(0.1, 0.0, "loop"), a_run(0.2, 0.0, "edge")]
    ((off, loop, _),) = frontiers(conditions(runs))
    assert off.winner.mean == pytest.approx(-0.4) and off.margin.mean == pytest.approx(0.2)  # of 0.1 and 0.3
    assert off.margin.deviation == pytest.approx(0.1 * 2**0.5)
    assert (loop.rule, loop.margin.mean, loop.margin.deviation) == ("loop", pytest.approx(0.1), None)


def test_constants_are_joined_in_their_order_from_the_base() -> None:
    runs = [a_run(0.3, 0.2, "fixed", **{"rc.alpha": alpha}) for alpha in (2.0, 0.5)]
    runs += [a_run(-0.5, -0.6), a_run(0.1, 0.0, "loop")]
    runs += [a_run(0.0, -0.1, **{"objective.nll_coef": weight}) for weight in (1.0, 0.1)]
    (points,) = frontiers(conditions(runs))
    found = curves(points)
    assert [point.alpha for point in found["constant α"]] == [0.5, 1.0, 2.0]
    assert [point.nll for point in found["nll_coef"]] == [0.0, 0.1, 1.0]
    with theme.applied():
        axes = frontier(points).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["constant α", "nll_coef"]
    # both constants fall on one place, and so do both weights
    assert {text.get_text() for text in axes.texts if text.get_text()} == {
        "rc=off",
        "rc=loop",
        "α=2, α=0.5",
        "nll_coef=1, nll_coef=0.1",
    }


def test_labels_neither_leave_the_figure_nor_cover_each_other_or_a_point() -> None:
    winners = [-0.6, 0.0, 0.002, 0.03, 0.033, 0.05, 0.06, 0.07]  # most of them in a corner
    runs = [a_run(winner, -0.05, "fixed", **{"rc.alpha": 2 + winner}) for winner in winners]
    (points,) = frontiers(conditions(runs))
    with theme.applied():
        axes = frontier(points).axes[0]
        named = [text for text in axes.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in named]
        area = axes.get_window_extent()
    assert len(boxes) == len(winners)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(area.x0 < box.x0 and box.x1 < area.x1 for box in boxes)
    places = axes.transData.transform([(point.winner.mean, point.margin.mean) for point in points])
    assert not any(box.contains(x, y) for box in boxes for x, y in places)


def test_two_conditions_and_other_learning_rates_make_no_frontier() -> None:
    runs = [a_run(0.0, 0.0), a_run(0.1, 0.0, "loop")]
    assert frontiers(conditions(runs)) == []
    others = [a_run(0.2, 0.0, rule, **{"optim.lr": 1e-3}) for rule in ("edge", "center")]
    assert frontiers(conditions([*runs, *others])) == []


@pytest.mark.parametrize("rule", ["center", "loop"])
def test_a_calibrated_runs_first_panels(tmp_path: Path, rule: str) -> None:
    looped = {"rc/winner": -0.04, "rc/loser": -0.5, "dynamics/samples/band_center": 1.1}
    bands = {"dynamics/samples/band_lower": 1.0, "dynamics/samples/band_upper": 1.2}
    metrics = [row | bands | (looped if rule == "loop" else {}) for row in rows(4, alpha=1.2)]
    tree = settings(rc=True, rc__rule=rule, rc__target=0.05)
    with theme.applied():
        sides, alpha, ratio, *_ = dynamics_of_run(
            [read_run(write_run(tmp_path / "r", tree, metrics), "r")]
        ).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in sides.lines}
    if rule == "loop":
        assert drawn["winner"] == [-0.04] * 4 and drawn["loser"] == [-0.5] * 4
        assert drawn["target 0.05"] == [0.05, 0.05]
    else:
        assert drawn["winner"] == pytest.approx([row["logratios/chosen"] for row in metrics])
    assert alpha.get_title(loc="left") == "Calibration weight α" and alpha.get_yscale() == "log"
    labels = set(ratio.get_legend_handles_labels()[1])
    assert labels == {"batch's band", "samples' band", "r*", "r", "α² r"}
