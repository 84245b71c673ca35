"""The configured objective and calibration: where their settings become objects, and which data they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rcpo.config.schema import CalibrationConfig, RunConfig
from rcpo.data.dataset import Datasets
from rcpo.data.records import PAIRS, SFT, UNPAIRED
from rcpo.data.store import RESPONSES, PairDataset
from rcpo.errors import ConfigError
from rcpo.method.calibration import RewardCalibrator
from rcpo.method.objectives import Objective, get_objective
from rcpo.method.pairwise import PairCalibrator
from rcpo.method.types import PAIR, SIDES


def build_objective(config: RunConfig) -> Objective:
    """The objective of a configuration.

    Raises ConfigError for an unknown name or hyper-parameter, a module that cannot be imported, and for
    calibration of an objective without a rejected side.
    """
    wanted = config.objective
    try:
        objective = get_objective(
            wanted.name,
            module=wanted.module,
            reduction=wanted.reduction,
            nll_coef=wanted.nll_coef,
            optional=wanted.optional,
            weighting=wanted.weighting,
            length_alpha=wanted.length_alpha,
            **wanted.hyperparameters,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.rc.enabled and not objective.needs_rejected:
        raise ConfigError(
            f"rc=on has nothing to calibrate: objective={wanted.name} has no rejected side; choose rc=off"
        )
    return objective


def restore_objective(objective: Objective, state: Mapping[str, Any] | None) -> None:
    """Give an objective the progress and running means of a run's `state`; None is a run that is done.

    The means of another objective, with which `resume_changed=allow` goes on from this state, begin anew.
    """
    known = state or {}
    objective.progress = known.get("progress", 1.0)  # checkpoints of earlier versions lack it
    means, own = known.get("objective"), objective.state
    if own is not None and means is not None and means.keys() == own.state_dict().keys():
        own.load_state_dict(means)


def build_calibrator(rc: CalibrationConfig) -> RewardCalibrator | None:
    """The calibrator of `rc.*` with one α per batch; None with `rc=off` or `rc.scope=pair`."""
    if not rc.enabled or rc.scope == "pair":
        return None
    return RewardCalibrator(
        rc.rule, band=rc.band, ema=rc.decay, alpha_max=rc.alpha_max, alpha=rc.alpha, target=rc.target
    )


def build_pair_calibrator(rc: CalibrationConfig) -> PairCalibrator | None:
    """The calibrator of `rc.scope=pair`; None without it."""
    if not rc.enabled or rc.scope != "pair":
        return None
    return PairCalibrator(edge=rc.rule == "edge", alpha_max=rc.alpha_max)


def refuse_unmeasured(config: RunConfig, objective: Objective, kind: str, *, compared: bool) -> None:
    """Raise ConfigError where no evaluation of a run will measure `checkpoint.best`.

    The held-out data are of a `kind`; `compared` says whether any of them are compared with a reference.
    """
    best, reason = config.checkpoint.best, None
    if best is None:
        return
    if best == "eval/loss" and not objective.has_pair_losses:
        reason = (
            f"objective={objective.name} has no loss of a pair by itself; choose eval/rewards/chosen, say"
        )
    elif ("logratios" in best or best == "eval/winner_fell") and not compared:
        reason = "no held-out pair is compared with a reference; set reference.track=true"
    elif best.endswith(("margins", "accuracies")) and kind != PAIRS:
        reason = "the held-out data are single completions; choose eval/rewards/chosen, say"
    elif best == "eval/exact_match" and config.eval.generate_examples == 0:
        reason = "eval.generate_examples=0 asks for no answers; set it to null or above 0"
    if reason is not None:
        raise ConfigError(f"checkpoint.best={best} is not measured in this run: {reason}")


def scored_sides(objective: Objective, dataset: PairDataset) -> tuple[str, ...]:
    """The responses that are scored outside training: both of each pair too where there are two."""
    compared = PAIR if (dataset.lengths[:, 2] > 0).all() else ()
    return tuple(side for side in SIDES if side in objective.sides or side in compared)


def refuse_kind(objective: Objective, kind: str) -> None:
    """Raise ConfigError for an objective that does not go with pairs, unpaired or supervised data."""
    if kind == SFT and objective.needs_rejected:
        raise ConfigError(
            f"objective={objective.spec.name} needs a rejected response, and the data has one completion a "
            "prompt: use objective=sft, or give pairs"
        )
    if kind == UNPAIRED and not objective.needs_rejected:
        raise ConfigError(
            f"objective={objective.spec.name} would imitate unwanted completions too: give a file of the "
            "wanted ones without the label, or use objective=kto"
        )
    if kind == UNPAIRED and not objective.spec.takes_unpaired:
        raise ConfigError(
            f"objective={objective.spec.name} needs pairs, and the data has single completions with labels: "
            "use objective=kto, or give pairs"
        )


def refuse_options(objective: Objective, kind: str) -> None:
    """Raise ConfigError for options that compare the two responses of a pair, where the data has one."""
    for key, wanted in (
        ("weighting", objective.needs_likelihoods),
        ("length_alpha", objective.length_alpha != 1),
    ):
        if wanted and kind != PAIRS:
            raise ConfigError(
                f"objective.{key} needs pairs, and the data has single completions; leave it out"
            )


def refuse_numbers(objective: Objective, datasets: Datasets) -> None:
    """Raise ConfigError for weights that the objective cannot use, and for scores or answers it lacks."""
    weighted = np.flatnonzero(datasets.train.weights != 1)
    if objective.sorts_batch and len(weighted):
        raise ConfigError(
            f"{datasets.train.id(int(weighted[0]))}: a weight, and objective={objective.name} sorts the "
            "pairs of a batch, so that no loss belongs to one pair; choose another objective, or remove them"
        )
    for dataset in filter(None, (datasets.train, datasets.evaluation)):
        _refuse_margins(objective, dataset)
        _refuse_no_gold(objective, dataset)


def _refuse_no_gold(objective: Objective, dataset: PairDataset) -> None:
    """Raise ConfigError for a pair without the gold answer that the objective needs."""
    without = np.flatnonzero(dataset.lengths[:, RESPONSES.index("gold") + 1] == 0)
    if objective.spec.needs_gold and len(without):
        raise ConfigError(
            f"{dataset.id(int(without[0]))}: no gold answer, and objective={objective.name} needs one for "
            "each pair; give it in the column gold (data.columns.gold=NAME names another)"
        )


def _refuse_margins(objective: Objective, dataset: PairDataset) -> None:
    """Raise ConfigError for pairs whose margins the objective needs, and that have none or another range."""
    for scale, bounds in objective.margin_ranges:
        _refuse_scaled_margins(objective, dataset, scale, bounds)


def _refuse_scaled_margins(
    objective: Objective, dataset: PairDataset, scale: float, bounds: tuple[float, float]
) -> None:
    margins, (lowest, highest) = scale * dataset.margins, bounds
    wrong = np.flatnonzero(~((margins >= lowest) & (margins <= highest)))
    if not len(wrong):
        return
    place, margin = dataset.id(int(wrong[0])), margins[wrong[0]]
    if np.isnan(margin):
        raise ConfigError(
            f"{place}: no scores, and objective={objective.name} needs them; give score_chosen and "
            "score_rejected, or their margin (data.columns names other columns)"
        )
    raise ConfigError(
        f"{place}: objective.score_scale times the margin is {margin:g}, and objective={objective.name} "
        f"takes {lowest:g} to {highest:g}; set objective.score_scale, data.min_margin or data.max_margin"
    )
