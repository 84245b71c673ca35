"""What calibration changed, in one figure: rows and scale."""

from __future__ import annotations

import pytest

from rcpo.report.overview import Row, overview
from rcpo.runs.comparison import Condition, RunSummary


def row(winner: float, loser: float) -> Row:
    values = {"eval/token_logratios/chosen": winner, "eval/token_logratios/rejected": loser}
    return Row("dpo", Condition("dpo", (RunSummary("run", {}, values),)), None)


@pytest.mark.parametrize(("loser", "scale"), [(-0.4, "linear"), (-4.0, "symlog")])
def test_a_row_that_is_far_out_does_not_press_the_others_together(loser: float, scale: str) -> None:
    rows = [row(0.01, -0.1), row(-0.02, -0.15), row(0.0, -0.2), row(-0.01, loser)]
    (axes,) = overview(rows, []).axes
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < loser and axes.get_xlabel().startswith("nats")


def test_rows_without_log_ratios_are_drawn() -> None:
    empty = Row("sft", Condition("sft", (RunSummary("run", {}, {}),)), None)
    assert overview([empty], []).axes[0].get_xscale() == "linear"
