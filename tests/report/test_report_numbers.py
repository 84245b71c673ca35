"""Series, first-order prediction and probe statistics against hand arithmetic and an exact simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_folders import rows, settings, write_run

from rcpo.report.dynamics import margin, margin_rate, predict_margin
from rcpo.report.probes import Crossings, crossed_share, crossings, fan, first_and_last, pooled, read_probes
from rcpo.report.runs import Run, read_run
from rcpo.report.series import Curve, binned, mean_line, stretch

NAN = float("nan")


def a_run(folder: Path, metrics: list[dict[str, Any]], **more: Any) -> Run:
    return read_run(write_run(folder, settings(**more), metrics), "run")


def test_points_are_means_of_stretches_without_what_is_not_known() -> None:
    steps = np.arange(1.0, 7.0)
    line = binned(steps, np.array([1.0, 3.0, NAN, 5.0, NAN, NAN]), 2)
    np.testing.assert_array_equal(line.steps, [1.5, 3.5, 5.5])
    np.testing.assert_array_equal(line.values, [2.0, 5.0, NAN])


def test_ratios_are_averaged_by_their_logarithm_and_only_where_positive() -> None:
    line = binned(np.arange(1.0, 5.0), np.array([2.0, 8.0, -1.0, 3.0]), 2, geometric=True)
    np.testing.assert_allclose(line.values, [4.0, 3.0])


def test_a_resumed_log_with_gaps_keeps_its_steps() -> None:
    line = binned(np.array([10.0, 20.0, 40.0]), np.array([1.0, 2.0, 4.0]), 10)
    assert line.steps.tolist() == [10, 20, 40] and line.values.tolist() == [1, 2, 4]


def test_the_mean_over_runs_goes_on_where_one_has_ended() -> None:
    lines = [Curve(np.array([1.0, 2.0]), np.array([1.0, 3.0])), Curve(np.array([1.0]), np.array([5.0]))]
    mean = mean_line(lines)
    assert mean.steps.tolist() == [1, 2] and mean.values.tolist() == [3, 3]
    lines = [Curve(np.array([1.0]), np.array([value])) for value in (2.0, 8.0)]
    assert mean_line(lines, geometric=True).values.tolist() == pytest.approx([4.0])
    assert mean_line([]).values.tolist() == []


def test_a_stretch_that_a_run_has_only_begun_is_the_same_stretch() -> None:
    full, begun = Curve(np.array([3.0, 8.0]), np.array([1.0, 2.0])), Curve(np.array([1.0]), np.array([3.0]))
    mean = mean_line([full, begun], 5)
    assert mean.steps.tolist() == [2.0, 8.0] and mean.values.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("last", "width"), [(0, 1), (1, 1), (50, 1), (51, 2), (200, 5), (2000, 50)])
def test_a_line_has_at_most_fifty_points(tmp_path: Path, last: int, width: int) -> None:
    metrics = [{"step": last, "loss": 0.5}] if last else []
    assert stretch([a_run(tmp_path / "run", metrics)]) == width


def test_the_rate_is_that_of_the_flow(tmp_path: Path) -> None:
    rate, norm = margin_rate(a_run(tmp_path / "run", rows(1)))
    # m' = 0.5·1 + 0.25·4 − 0.75·0.6·2 and θ' = 0.5 (1, 0) − 0.25 (1.2, 1.6) = (0.2, −0.4)
    assert rate.tolist() == pytest.approx([0.6])
    assert norm.tolist() == pytest.approx([np.hypot(0.2, 0.4)])


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_plain_sgd_on_a_linear_model_is_predicted_exactly(tmp_path: Path, alpha: float | None) -> None:
    run = a_run(tmp_path / "run", rows(30, alpha), rc=alpha is not None)
    found = predict_margin(run, 1)
    assert found is not None and found.in_nats and found.factor == pytest.approx(1.0)
    np.testing.assert_allclose(found.change, margin(run), atol=1e-12)
    assert margin(run)[-1] > 0.1 and found.correlation == pytest.approx(1.0)


def test_clipping_shortens_the_prediction(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", rows(3), train__max_grad_norm=0.5)  # the rows' norm is 1
    found = predict_margin(run, 1)
    # half as much is predicted as these rows, which no clipping made, then show
    assert found is not None and found.factor == pytest.approx(2.0)


def test_other_optimizers_give_the_shape_with_one_fitted_number(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", rows(30), optim__name="adamw")
    found = predict_margin(run, 1)
    # a step of unit length moves m by 0.6/‖θ'‖ · lr, plain SGD by 0.6 · lr: their quotient is ‖θ'‖
    assert found is not None and not found.in_nats
    assert found.factor == pytest.approx(np.hypot(0.2, 0.4))
    np.testing.assert_allclose(found.change, margin(run), atol=1e-12)


def test_thinned_dynamics_hold_until_the_next(tmp_path: Path) -> None:
    metrics = rows(9)
    for row in metrics:
        if row["step"] % 4 != 1:
            row.update({key: None for key in row if key.startswith("dynamics/")})
    run = a_run(tmp_path / "run", metrics)
    found = predict_margin(run, 1)
    assert found is not None
    np.testing.assert_allclose(found.change, margin(run), atol=1e-12)
    apart = a_run(tmp_path / "apart", rows(9)[::4])  # log.every=4: three rows
    thinned = predict_margin(apart, 1)
    assert thinned is not None
    np.testing.assert_allclose(thinned.change, margin(apart), atol=1e-12)


def test_without_dynamics_nothing_is_predicted(tmp_path: Path) -> None:
    assert predict_margin(a_run(tmp_path / "run", [{"step": 1, "loss": 0.5}]), 1) is None
    one = predict_margin(a_run(tmp_path / "one", rows(1)), 1)
    assert one is not None and one.change.tolist() == [0.0] and one.correlation is None


def probes(
    folder: Path, winners: list[list[float]], losers: list[list[float]], reference: bool = True
) -> Path:
    """probes.parquet of (S, E) log-ratios, over a start of −1 (winner) and −2 (loser)."""
    records = [
        {
            "step": 10 * step,
            "example_id": f"pair-{pair}",
            "chosen_logps": -1.0 + winners[step][pair],
            "rejected_logps": -2.0 + losers[step][pair],
            "chosen_logratios": winners[step][pair] if reference else None,
            "rejected_logratios": losers[step][pair] if reference else None,
            "greedy_mass": None if step else -0.5,
            "greedy_length": None if step == 1 else 4 + 2 * pair + step,
        }
        for step in range(len(winners))
        for pair in range(len(winners[0]))
    ]
    folder.mkdir(exist_ok=True)
    schema = pa.schema(
        [("step", pa.int64()), ("example_id", pa.string())]
        + [("greedy_length", pa.int32())]
        + [(name, pa.float64()) for name in records[0] if name not in ("step", "example_id", "greedy_length")]
    )
    pq.write_table(pa.Table.from_pylist(records, schema), folder / "probes.parquet")
    return folder


WINNERS = [[0.0, 0.0, 0.0], [-0.5, -0.2, 0.1], [-0.6, 0.0, 0.2]]  # falls; falls and comes back; rises
LOSERS = [[0.0, 0.0, 0.0], [-1.0, 1.5, 0.0], [-1.0, 0.5, 0.005]]  # falls; rises; stays


@pytest.mark.parametrize("reference", [True, False])
def test_pairs_that_crossed_are_counted(tmp_path: Path, reference: bool) -> None:
    found = read_probes(probes(tmp_path, WINNERS, LOSERS, reference))
    assert found is not None and found.steps.tolist() == [0, 10, 20]
    expected = Crossings(pairs=3, winner_ever=2, winner_ended=1, winner_returned=1, loser_ended=1)
    assert crossings([found]) == expected
    steps, disordered = pooled([found], "disordered")
    assert (disordered.sum(axis=1) == [0, 1, 0]).all() and steps.tolist() == [0, 10, 20]  # −1.2 < −0.5
    assert crossed_share(found.changes["winner"], "winner").tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert crossed_share(found.changes["loser"], "loser").tolist() == pytest.approx([0, 1 / 3, 1 / 3])
    assert found.has("greedy_mass") and not found.has("chosen_mass")
    assert first_and_last([found], "greedy_length") == (6.0, 8.0)  # 4, 6, 8 and two steps later 6, 8, 10
    assert first_and_last([found], "sample_length") is None


def test_fans_are_quantiles_over_the_pairs_of_all_runs(tmp_path: Path) -> None:
    first = read_probes(probes(tmp_path / "a", WINNERS, LOSERS))
    second = read_probes(probes(tmp_path / "b", [[0.0] * 2, [0.3, 0.5]], [[0.0] * 2, [0.0] * 2]))
    assert first is not None and second is not None
    steps, values = pooled([first, second], "winner")
    assert steps.tolist() == [0, 10] and values.shape == (2, 5)
    # at step 10: −0.5 −0.2 0.1 0.3 0.5
    assert fan(values)[:, 1].tolist() == pytest.approx([-0.44, -0.2, 0.1, 0.3, 0.46])


def test_pairs_that_are_not_known_are_left_out_of_shares_and_fans() -> None:
    values = np.array([[-1.0, NAN, 0.0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(crossed_share(values, "winner"), [0.5, NAN])
    np.testing.assert_array_equal(fan(values)[2], [-0.5, NAN])


def test_missing_torn_or_foreign_probes_are_none(tmp_path: Path) -> None:
    assert read_probes(tmp_path) is None
    (tmp_path / "probes.parquet").write_bytes(b"PAR1")
    assert read_probes(tmp_path) is None
    pq.write_table(pa.table({"x": [1]}), tmp_path / "probes.parquet")
    assert read_probes(tmp_path) is None
