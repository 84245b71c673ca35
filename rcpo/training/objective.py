"""The configured objective and calibration: the one place where their settings become objects."""

from __future__ import annotations

from rcpo.config.schema import CalibrationConfig, RunConfig
from rcpo.data.records import SFT, UNPAIRED
from rcpo.errors import ConfigError
from rcpo.method.calibration import RewardCalibrator
from rcpo.method.objectives import Objective, get_objective
from rcpo.method.pairwise import PairCalibrator


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
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if config.rc.enabled and not objective.needs_rejected:
        raise ConfigError(
            f"rc=on has nothing to calibrate: objective={wanted.name} has no rejected side; choose rc=off"
        )
    return objective


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


def refuse_kind(objective: Objective, kind: str) -> None:
    """Raises ConfigError for an objective that does not go with pairs, unpaired or supervised data."""
    if kind == SFT and objective.needs_rejected:
        raise ConfigError(
            f"objective={objective.spec.name} needs a rejected response, and the data has one completion a "
            "prompt: use objective=sft, or give pairs"
        )
    if kind == UNPAIRED and not objective.spec.takes_unpaired:
        raise ConfigError(
            f"objective={objective.spec.name} needs pairs, and the data has single completions with labels: "
            "use objective=kto, or give pairs"
        )
