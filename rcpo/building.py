"""The configured objective: the one place where its settings become an `Objective`."""

from __future__ import annotations

from rcpo.config import ConfigError, RunConfig
from rcpo.objectives import Objective, get_objective


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
