"""Reward calibration in LLaMA-Factory: three lines in place of its command.

    from rcpo.integrations.llamafactory import RewardCalibrationConfig, run_exp

    run_exp(RewardCalibrationConfig())

Then `python calibrated.py run.yaml` trains as `llamafactory-cli train run.yaml` does, calibrated:
`stage: dpo` with every `pref_loss`, and `stage: kto`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcpo.integrations.adapters import Sequences, Unpaired
from rcpo.integrations.calibrated import Calibrated, RewardCalibrationConfig

try:
    from llamafactory.train import tuner
    from llamafactory.train.dpo import trainer as dpo
    from llamafactory.train.dpo import workflow as dpo_workflow
    from llamafactory.train.kto import trainer as kto
    from llamafactory.train.kto import workflow as kto_workflow
except ModuleNotFoundError as error:
    raise ImportError(f"rcpo.integrations.llamafactory needs LLaMA-Factory's environment: {error}") from error

__all__ = ["RewardCalibrationConfig", "calibrate", "run_exp"]


class FactoryPairs(Sequences):
    """For LLaMA-Factory's trainer of pairs, which has losses and log-probs of its own."""

    _sees_reference = True

    def _averages(self) -> bool:
        return self.loss_type in ("ipo", "orpo", "simpo")

    def _tail(self) -> float | None:
        return self.ld_alpha

    def _labels(self, batch: Any) -> Tensor:
        return batch["labels"]

    def _steer_output(self, batch: Any, output: Any) -> Any:
        chosen, average = output["chosen_logps"], output["chosen_logps_avg"]
        output["chosen_logps"], output["rejected_logps"] = self._steer_sides(chosen, output["rejected_logps"])
        # the supervised term (pref_ftx) is made of the chosen log-probs: theirs times a number
        output["chosen_logps_avg"] = output["chosen_logps"] * (average / chosen).detach()
        return output


class FactoryUnpaired(Unpaired):
    """For LLaMA-Factory's KTO trainer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(Unpaired, self).forward(*args, **kwargs)

    def _steer_output(self, batch: Any, output: Any) -> Any:
        chosen, rejected, *others, average = output
        sides = self._steer_sides(chosen, rejected)
        return (*sides, *others, sides[0] * (average / chosen).detach())

    def _labels(self, batch: Any) -> Tensor:
        return batch["labels"]

    def _desirable(self, batch: Any) -> Tensor:
        return torch.as_tensor(batch["kto_tags"], dtype=torch.bool, device=self.accelerator.device)


def calibrate(rc: RewardCalibrationConfig | None = None) -> None:
    """Put calibrated trainers in the place of LLaMA-Factory's own."""
    rc = rc or RewardCalibrationConfig()
    pairs = _calibrated(FactoryPairs, dpo.CustomDPOTrainer, rc)
    unpaired = _calibrated(FactoryUnpaired, kto.CustomKTOTrainer, rc)
    # a workflow takes its trainer from the trainer's module, when it is imported or when it runs
    dpo.CustomDPOTrainer = dpo_workflow.CustomDPOTrainer = pairs
    kto.CustomKTOTrainer = kto_workflow.CustomKTOTrainer = unpaired


def run_exp(rc: RewardCalibrationConfig | None = None, args: Any = None) -> None:
    """LLaMA-Factory's `run_exp`, calibrated: the run that the command line names, or `args`."""
    calibrate(rc)
    tuner.run_exp(args)


def _calibrated(adapter: type[Calibrated], trainer: Any, rc: RewardCalibrationConfig) -> Any:
    """A class that LLaMA-Factory can use in the place of `trainer`, which may be one of an earlier call."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        adapter.__init__(self, *args, rc=rc, **kwargs)

    plain = trainer.plain if issubclass(trainer, Calibrated) else trainer
    return type(f"Calibrated{plain.__name__}", (adapter, plain), {"__init__": __init__, "plain": plain})
