"""What the logged dynamics predict: the margin's first-order movement, and the ratio after calibration.

Gradient flow of the two sides, θ' = d_w s_w − d_l s_l, moves the margin m = z_w − z_l by

    m' = d_w ‖s_w‖² + d_l ‖s_l‖² − (d_w + d_l) ρ ‖s_w‖ ‖s_l‖,        ‖θ'‖² = <θ', θ'>

a unit of learning rate. d are the incentives that were used: with calibration α d_w and d_l / α.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcpo.report.runs import Column, Run
from rcpo.report.series import binned


@dataclass(frozen=True)
class Prediction:
    """The margin's change since the first step as the dynamics predict it, (N,), times a fitted `factor`.

    `in_nats` says that the steps were added up in nats; else they are of unit length. `correlation` is that
    of prediction and measurement, smoothed alike; None where it is not defined.
    """

    change: Column
    factor: float
    in_nats: bool
    correlation: float | None


def used_incentives(run: Run) -> tuple[Column, Column]:
    """d_w and d_l of each step as the update saw them, (N,) each."""
    alpha = run.column("rc/alpha") if run.calibrated else np.ones(len(run.steps))
    return run.column("dynamics/incentive_chosen") * alpha, run.column("dynamics/incentive_rejected") / alpha


def margin_rate(run: Run) -> tuple[Column, Column]:
    """m' and ‖θ'‖ of each step, (N,) each; NaN where the dynamics were not measured."""
    d_w, d_l = used_incentives(run)
    s_w, s_l = run.column("dynamics/score_norm_chosen"), run.column("dynamics/score_norm_rejected")
    inner = run.column("dynamics/score_cosine") * s_w * s_l
    rate = d_w * s_w**2 + d_l * s_l**2 - (d_w + d_l) * inner
    squared = (d_w * s_w) ** 2 + (d_l * s_l) ** 2 - 2 * d_w * d_l * inner
    return rate, np.sqrt(np.maximum(squared, 0))


def margin(run: Run) -> Column:
    """u_w − u_l, or z_w − z_l of a run without a reference, (N,): each step's own batch."""
    names = "logratios" if run.has("logratios/chosen") else "logps"
    return run.column(f"{names}/chosen") - run.column(f"{names}/rejected")


def predict_margin(run: Run, width: int) -> Prediction | None:
    """The predicted change of the margin before each step; None without dynamics.

    Plain SGD moves a step's own batch by lr m' (after clipping) where all parameters are measured. Other
    optimizers rescale the gradient, and the head's geometry is a part of the whole: there the steps add up
    lr m'/‖θ'‖, what a step of unit length does. Later batches hold other pairs, to which only a part carries
    over; so one factor is fitted, by least squares, to the measured change over stretches of `width` steps.
    """
    rate, norm = margin_rate(run)
    if np.isnan(rate).all():
        return None
    in_nats = _moves_by_rate(run)
    with np.errstate(invalid="ignore", divide="ignore"):
        speed = rate * _clipping(run) if in_nats else np.where(norm > 0, rate / norm, 0.0)
    gaps = np.diff(run.steps)  # rows may be further apart than a step
    moves = np.nan_to_num(_held(speed) * run.column("learning_rate"))
    change = np.concatenate([[0.0], np.cumsum(moves[:-1] * gaps)])
    measured = binned(run.steps, margin(run) - _start(run), width).values
    predicted = binned(run.steps, change, width).values
    known = ~np.isnan(measured)
    length = float(predicted[known] @ predicted[known])
    factor = float(predicted[known] @ measured[known]) / length if length > 0 else 1.0
    return Prediction(change * factor, factor, in_nats, _correlation(predicted, measured))


def _moves_by_rate(run: Run) -> bool:
    """Whether learning rate times m' is a step's own first order: plain SGD, all parameters measured."""
    settings = run.settings
    plain = settings.get("optim.name") == "sgd" and not settings.get("optim.momentum")
    return plain and settings.get("rc.geometry") == "parameters"


def _start(run: Run) -> float:
    """The margin that changes are counted from: 0 against a reference, the first step's without one."""
    if run.has("logratios/chosen"):
        return 0.0
    known = margin(run)
    known = known[~np.isnan(known)]
    return float(known[0]) if len(known) else 0.0


def _clipping(run: Run) -> Column:
    """By how much each step's gradient was shortened."""
    limit = run.settings.get("train.max_grad_norm")
    norm = run.column("grad_norm")
    if limit is None:
        return np.ones(len(norm))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm > limit, limit / norm, 1.0)


def _held(values: Column) -> Column:
    """NaN replaced by the last known value: dynamics may be measured every few steps only."""
    known = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(known)
    return np.where(last >= 0, values[np.maximum(last, 0)], np.nan)


def _correlation(one: Column, other: Column) -> float | None:
    known = ~(np.isnan(one) | np.isnan(other))
    one, other = one[known], other[known]
    if len(one) < 3 or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
