"""rcpo: preference optimization with reward calibration (arXiv 2604.18239).

The library's names are imported on first use, so that `import rcpo` loads neither torch nor anything heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo.method.band import DisentanglementBand, Dynamics, Movement
    from rcpo.method.calibration import DynamicsMeter, RewardCalibrator, StepCalibration
    from rcpo.method.geometry import ScoreGeometry, Sketch, head_scores
    from rcpo.method.incentives import incentives
    from rcpo.method.logps import score_sides, token_logps
    from rcpo.method.objectives import Objective, get_objective, register
    from rcpo.method.samples import CrossSamples, SampleGeometry
    from rcpo.method.types import PairLogps, TokenBatch

__version__ = "0.1.0"

_HOME = {
    "CrossSamples": "samples",
    "DisentanglementBand": "band",
    "Dynamics": "band",
    "DynamicsMeter": "calibration",
    "Movement": "band",
    "RewardCalibrator": "calibration",
    "SampleGeometry": "samples",
    "ScoreGeometry": "geometry",
    "Sketch": "geometry",
    "StepCalibration": "calibration",
    "head_scores": "geometry",
    "incentives": "incentives",
    "score_sides": "logps",
    "token_logps": "logps",
    "Objective": "objectives",
    "get_objective": "objectives",
    "register": "objectives",
    "PairLogps": "types",
    "TokenBatch": "types",
}

__all__ = [
    "CrossSamples",
    "DisentanglementBand",
    "Dynamics",
    "DynamicsMeter",
    "Movement",
    "Objective",
    "PairLogps",
    "RewardCalibrator",
    "SampleGeometry",
    "ScoreGeometry",
    "Sketch",
    "StepCalibration",
    "TokenBatch",
    "get_objective",
    "head_scores",
    "incentives",
    "register",
    "score_sides",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rcpo' has no attribute {name!r}")
    module = importlib.import_module(f"rcpo.method.{_HOME[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
