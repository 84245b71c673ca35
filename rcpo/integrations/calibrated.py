"""The calibration of a trainer of transformers: α, metrics, checkpoints, and checks, whatever the trainer.

`Calibrated` is the one class that steers. An adapter (`rcpo.integrations.adapters`) tells it which tokens are
responses and passes the trainer's log-probs through `_steer`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rcpo.config.fields import check_keys
from rcpo.config.schema import CalibrationConfig
from rcpo.config.validation import check_calibration
from rcpo.integrations.steering import Factor, Responses, Seen, last_hidden_states, score_head, steer
from rcpo.method.calibration import RewardCalibrator, StepCalibration
from rcpo.method.geometry import Sketch
from rcpo.models.policy import head_shape
from rcpo.training.objective import build_calibrator

STATE_FILE = "reward_calibration.json"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass(kw_only=True)
class RewardCalibrationConfig(CalibrationConfig):
    """How to calibrate; the keys of rcpo's `rc` group. `enabled=False` measures the dynamics alone.

    `reduction` is what z is, which fixes the units of incentives and scores but hardly α: `mean` or `sum` of
    the response tokens' log-probs; None takes what the trainer's loss works with.

    `rule="loop"` is for trainers of pairs whose reference is the starting policy: it reads the log-ratios of
    training pairs in the first epoch, while they are new, and keeps its last α afterwards.
    """

    enabled: bool = True
    reduction: str | None = None

    def __post_init__(self) -> None:
        check_keys(self, "rc.")
        check_calibration(self)
        if self.geometry != "head":
            raise ValueError(f"rc.geometry={self.geometry}: inside TRL the head's geometry is the only one")
        if self.scope != "batch":
            raise ValueError(f"rc.scope={self.scope}: inside TRL there is one α per batch")
        if self.signal == "control":
            raise ValueError("rc.signal=control: inside TRL, rule=loop reads training pairs alone")
        if self.reduction not in (None, "sum", "mean"):
            raise ValueError(f"rc.reduction={self.reduction}: sum or mean is expected, or None")


if TYPE_CHECKING:
    from typing import Any as _Trainer  # the trainer that a mixin stands before
else:
    _Trainer = object


class Calibrated(_Trainer):
    """Steer a trainer's log-probs, and read its incentives off its own loss."""

    _sees_reference = False  # whether the adapter shows the responses' log-ratios
    _thorough = False  # whether the first micro-batch checks log-probs and gradients: with an untested TRL

    def __init__(self, *args: Any, rc: RewardCalibrationConfig | None = None, **kwargs: Any) -> None:
        if rc is not None:
            self._refuse(*args, **kwargs)
            if rc.loops and getattr(_settings(*args, **kwargs), "sync_ref_model", False):
                raise ValueError(
                    "rc.rule=loop reads log-ratios against the start, and sync_ref_model=True moves the "
                    "reference: set sync_ref_model=False, or use another rule"
                )
        super().__init__(*args, **kwargs)
        self.rc = rc
        self.calibrator: RewardCalibrator | None = None
        self._seen: Seen | None = None
        self._readings: defaultdict[str, list[float]] = defaultdict(list)
        if rc is None:
            return
        self._policy = _causal_model(self.accelerator.unwrap_model(self.model))
        self._shape = head_shape(self._policy)
        vocabulary = int(self._policy.get_output_embeddings().out_features)
        self._sketch = Sketch(vocabulary, rc.sketch, rc.sketch_seed)
        if rc.loops and not self._sees_reference:
            raise ValueError(
                f"rc.rule=loop reads log-ratios against the reference, which {type(self).__name__} does not "
                "show; use CalibratedDPOTrainer, or another rule"
            )
        self.calibrator = build_calibrator(rc)
        self._statistics = StepCalibration(self.calibrator, update=rc.update, reduce=self._sum_over_ranks)
        self._factor = Factor()
        self._verified = False

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for settings under which the trainer does not show its log-probs."""
        given = _settings(*args, **kwargs)
        for name in ("use_liger_loss", "use_liger_kernel"):
            if hasattr(type(self), "_compute_loss_liger") and getattr(given, name, False):
                raise ValueError(
                    f"{name}=True computes the loss inside Liger's kernel, which shows no log-probs to "
                    f"calibrate: set {name}=False, use TRL 1.14 or newer, or rc=None"
                )

    # What an adapter tells and calls.

    def _responses(self, batch: Any) -> Responses:
        """The responses of a micro-batch, in the order of the log-probs that the trainer works with."""
        raise NotImplementedError

    def _steering(self) -> AbstractContextManager[Any]:
        """While it is open, the trainer's log-probs pass through `_steer`."""
        return nullcontext()

    def _by_z(self, loss: Tensor, seen: Seen, responses: Responses, batch: Any) -> tuple[Tensor, Tensor]:
        """∂loss/∂z and z of each response, (S,) both."""
        raise NotImplementedError

    def _logratios(self, seen: Seen, responses: Responses, batch: Any) -> Tensor:
        """Log-ratios per token of each response against the reference, (S,)."""
        raise NotImplementedError

    def _steer(self, values: Tensor) -> Tensor:
        """Log-probs on their way into the loss: steer the policy's, note the reference's.

        The copy is for trainers that mask in place.
        """
        assert self._seen is not None
        if not values.requires_grad:
            self._seen.reference = values
            return values
        self._seen.steered = steer(values, self._seen.winners, self._factor)
        return self._seen.steered.clone()

    def _steer_nll(self, nll: Tensor) -> Tensor:
        """A negative log-likelihood of chosen responses, steered as they are."""
        assert self._seen is not None
        if not nll.requires_grad:
            return nll
        winner = torch.ones(1, dtype=torch.bool, device=nll.device)
        self._seen.nll = steer(nll.reshape(1), winner, self._factor)
        return self._seen.nll[0]

    def _nll_weights(self, responses: Responses, batch: Any) -> Tensor:
        """Each chosen token's part in the log-likelihood, (B, T)."""
        inside = (responses.weights[responses.winners] != 0).float()
        return inside / inside.sum()

    def _by_nll(self, pull: Tensor, responses: Responses, batch: Any) -> Tensor:
        """∂loss/∂z (S,) through the NLL, whose own gradient is `pull`."""
        tokens = torch.zeros_like(responses.weights)
        tokens[responses.winners] = -pull * self._nll_weights(responses, batch)
        return responses.by_z(tokens)

    def _calibrate(self, batch: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, a loss or a tuple that begins with it; calibrated where it learns."""
        if self.rc is None or not self.model.training or not torch.is_grad_enabled():
            return compute()
        responses = self._responses(batch)
        seen = self._seen = Seen(responses.winners)
        # a micro-batch starts with the α that is known; a micro-batch update may still replace it
        self._factor = Factor(1.0 if self.calibrator is None else self.calibrator.alpha)
        try:
            with last_hidden_states(self._policy.base_model, seen), self._steering():
                result = compute()
        finally:
            self._seen = None
        self._observe(result[0] if isinstance(result, tuple) else result, seen, responses, batch)
        return result

    def _observe(self, loss: Tensor, seen: Seen, responses: Responses, batch: Any) -> None:
        """Add a micro-batch to the statistics; close a step with its last one."""
        assert self.rc is not None
        if seen.hidden is None or (seen.steered is None and seen.nll is None):
            raise ValueError(
                f"{type(self).__name__} computed its loss without log-probs that rcpo can see; use a tested "
                "TRL (rcpo/integrations/README.md), or rc=None"
            )
        by_z, z = (values.detach() for values in self._by_z(loss, seen, responses, batch))
        head = self._policy.get_output_embeddings()
        own, scores = score_head(
            responses, responses.align(seen.hidden.detach()), head, self._shape, self._sketch, _gathered(head)
        )
        if not self._verified:
            self._verify(own - z, responses)
            if self._thorough:
                self._verify_forward(z, seen, responses)
                self._verify_gradients(loss, seen.hidden, responses)
            self._verified = True
        ratios = None
        if self.rc.loops and self.state.epoch is not None and self.state.epoch < 1:  # the pairs are new
            of = self._logratios(seen, responses, batch).detach()
            ratios = of[responses.winners], of[~responses.winners]
        self._statistics.observe(responses.by_side(by_z.double()), scores, logratios=ratios)
        if self._statistics.by_microbatch and self.calibrator is not None:
            self._factor.alpha = self.calibrator.alpha
        if self.accelerator.sync_gradients:
            for name, value in self._statistics.end().items():
                if value is not None:
                    self._readings[name].append(float(value))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        on_device = values.to(self.accelerator.device)
        return self.accelerator.reduce(on_device, reduction="sum").to(values.device)

    # Checks of the first micro-batch.

    def _tolerance(self) -> float:
        device = self.accelerator.device.type
        half = self._policy.dtype != torch.float32 or torch.is_autocast_enabled(device)
        return 5e-2 if half else 1e-3

    def _verify(self, difference: Tensor, responses: Responses) -> None:
        """The head that is measured is the one that the trainer uses."""
        worst = _per_token(difference, responses)
        if not worst <= self._tolerance():
            raise ValueError(
                f"the output head of {type(self._policy).__name__} is not W h + b with a known scale or cap: "
                f"its log-probs differ by {worst:.2g} nats per token from the trainer's; use rc=None"
            )

    def _verify_forward(self, z: Tensor, seen: Seen, responses: Responses) -> None:
        """The trainer's log-probs are those of a plain forward pass; dropout would make any two differ."""
        if any(m.training and m.p > 0 for m in self._policy.modules() if isinstance(m, torch.nn.Dropout)):
            return
        args, kwargs = seen.arguments
        inputs = {name: value for name, value in kwargs.items() if name in TOKEN_INPUTS}
        with torch.no_grad():
            logits = responses.align(self._policy(*args, **inputs, use_cache=False).logits).float()
            logps = logits.log_softmax(-1).gather(-1, responses.labels[..., None]).squeeze(-1)
        worst = _per_token((logps * responses.weights).sum(1) - z, responses)
        if not worst <= self._tolerance():
            raise ValueError(
                f"this TRL was not tested with rcpo, and its log-probs differ by {worst:.2g} nats per token "
                "from a plain forward pass; use a tested TRL (rcpo/integrations/README.md), or rc=None"
            )

    def _verify_gradients(self, loss: Tensor, hidden: Tensor, responses: Responses) -> None:
        """The loss's gradients at the head are twice and half as large with α = 2; not under sharding."""
        if _sharded(self._policy.get_output_embeddings().weight):
            return
        alpha, pulls = self._factor.alpha, []
        for self._factor.alpha in (1.0, 2.0):
            (pull,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            pulls.append(responses.align(pull).float() * (responses.weights != 0)[..., None])
        self._factor.alpha = alpha
        scale = torch.where(responses.winners, 2.0, 0.5)[:, None, None]
        worst, largest = (float(t.abs().max()) for t in (pulls[1] - scale * pulls[0], pulls[1]))
        if not worst <= self._tolerance() * largest:
            raise ValueError(
                "this TRL was not tested with rcpo, and a part of its loss goes around the log-probs that "
                "rcpo steers; use a tested TRL (rcpo/integrations/README.md), or rc=None"
            )

    # Log and checkpoints.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's `log`, with the means of what was read since the last training entry."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._readings.items()}}
            self._readings.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.calibrator is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE_FILE).write_text(json.dumps(self.calibrator.state_dict()), encoding="utf-8")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """The trainer's `train`; a resumed run continues with the calibration that its checkpoint holds."""
        if self.calibrator is not None and resume_from_checkpoint:
            folder = resume_from_checkpoint
            if not isinstance(folder, str | os.PathLike):
                folder = get_last_checkpoint(self.args.output_dir)
            if folder is not None:
                self._load_calibration(Path(folder))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_calibration(self, folder: Path) -> None:
        assert self.calibrator is not None
        if not (folder / STATE_FILE).exists():
            raise ValueError(
                f"{folder} holds no {STATE_FILE}: it was saved without reward calibration; use rc=None"
            )
        self.calibrator.load_state_dict(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))


def _settings(*args: Any, **kwargs: Any) -> TrainingArguments | None:
    """The arguments that a trainer is given, however it is given them."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)


def _per_token(difference: Tensor, responses: Responses) -> float:
    """The largest difference of z (S,), in nats per token."""
    return float((difference.abs() / responses.weights.sum(1).clamp(min=1e-30)).max())


def _sharded(parameter: Any) -> bool:
    """Whether a parameter is split over ranks, by ZeRO-3 or by FSDP2."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def _gathered(head: Any) -> AbstractContextManager[Any]:
    """Inside it, parameters of the head that ZeRO-3 has split are whole."""
    split = [parameter for parameter in (head.weight, head.bias) if hasattr(parameter, "ds_id")]
    if not split:
        return nullcontext()
    from rcpo.engine.backend import gathered  # imports deepspeed, which a head without ZeRO-3 does not need

    return gathered(split)


def _causal_model(model: Any) -> PreTrainedModel:
    """The language model inside adapters; raises ValueError where its head is not a plain linear layer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"the output head is a {type(head).__name__}; reward calibration measures a plain linear one: "
            "leave lm_head out of the adapter's target_modules and modules_to_save"
        )
    return inner
