"""Reward calibration in TRL's trainers: the same constructors, and `rc=RewardCalibrationConfig(...)`.

    from rcpo.integrations.trl import CalibratedDPOTrainer, RewardCalibrationConfig
    trainer = CalibratedDPOTrainer(model=..., args=..., train_dataset=..., rc=RewardCalibrationConfig())

Losses, log-probs and metrics stay TRL's, whatever `loss_type`; the incentives are the gradient of TRL's own
loss. With `rc=None` the trainer is TRL's. The head geometry costs one more pass of the output head over the
response tokens. `RewardCalibrationMixin` goes before your own subclass of `DPOTrainer`:

    class MyTrainer(RewardCalibrationMixin, MyDPOTrainer): ...
"""

from __future__ import annotations

import warnings
from importlib import metadata

from packaging.version import Version

from rcpo.integrations.adapters import Sequences, SequencesWithPrompts, pair_adapter, single_adapter
from rcpo.integrations.calibrated import RewardCalibrationConfig

__all__ = [
    "CalibratedCPOTrainer",
    "CalibratedDPOTrainer",
    "CalibratedKTOTrainer",
    "CalibratedORPOTrainer",
    "RewardCalibrationConfig",
    "RewardCalibrationMixin",
]

OLDEST, TESTED = Version("0.24"), Version("1.16")


def _is_newer_than_tested() -> bool:
    """Whether the installed TRL is newer than any that was tested; raises ImportError for an old one."""
    try:
        version = Version(metadata.version("trl"))
    except metadata.PackageNotFoundError as error:
        raise ImportError("rcpo.integrations.trl needs TRL: pip install 'rcpo[trl]'") from error
    if version < OLDEST:
        raise ImportError(
            f"rcpo.integrations.trl needs TRL {OLDEST} or newer; {version} is installed: "
            "pip install 'rcpo[trl]'"
        )
    newer = version.release[:2] > TESTED.release
    if newer:
        warnings.warn(
            f"rcpo was tested with TRL {OLDEST} to {TESTED}, not with {version}: the first micro-batch of "
            "each run compares log-probs with a plain forward pass, and checks that gradients are scaled",
            stacklevel=2,
        )
    return newer


_NEWER = _is_newer_than_tested()

try:
    from trl import DPOTrainer, KTOTrainer

    try:
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    except ModuleNotFoundError:  # until TRL 0.27
        from trl import CPOTrainer, ORPOTrainer
except (ImportError, RuntimeError) as error:
    raise ImportError(
        f"TRL {metadata.version('trl')} could not be imported beside transformers "
        f"{metadata.version('transformers')} (TRL before 0.29 needs transformers 4): {error}"
    ) from error

if KTOTrainer.__mro__[1].__module__.startswith("trl.experimental"):  # a name that only warns of having moved
    KTOTrainer = KTOTrainer.__mro__[1]


class RewardCalibrationMixin(pair_adapter(DPOTrainer)):  # type: ignore[misc]
    """For `DPOTrainer` and its subclasses; stands before them in the list of bases."""

    _thorough = _NEWER


class CalibratedDPOTrainer(RewardCalibrationMixin, DPOTrainer):
    """`trl.DPOTrainer` with reward calibration: every `loss_type`, weighted mixes included."""


class CalibratedKTOTrainer(single_adapter(KTOTrainer), KTOTrainer):  # type: ignore[misc]
    """`trl.KTOTrainer` with reward calibration; desirable answers are the winners."""

    _thorough = _NEWER


class CalibratedCPOTrainer(Sequences, CPOTrainer):
    """TRL's CPO and SimPO with reward calibration, the NLL term included."""

    _thorough = _NEWER


class CalibratedORPOTrainer(SequencesWithPrompts, ORPOTrainer):
    """TRL's ORPO with reward calibration. Its NLL covers the prompts too; their part is left as it is."""

    _thorough = _NEWER
