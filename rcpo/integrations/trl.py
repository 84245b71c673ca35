"""Reward calibration in TRL's trainers: the same constructors, and `rc=RewardCalibrationConfig(...)`.

    from rcpo.integrations.trl import CalibratedDPOTrainer, RewardCalibrationConfig
    trainer = CalibratedDPOTrainer(model=..., args=..., train_dataset=..., rc=RewardCalibrationConfig())

Losses, log-probs and metrics stay TRL's, whatever `loss_type`; the incentives are the gradient of TRL's own
loss. With `rc=None` the trainer is TRL's. The head geometry costs one more pass of the output head over the
response tokens. `RewardCalibrationMixin` goes before your own subclass of `DPOTrainer`:

    class MyTrainer(RewardCalibrationMixin, MyDPOTrainer): ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from rcpo.config.schema import CalibrationConfig
from rcpo.integrations.steering import Factor, Responses, Seen, last_hidden_states, score_head, steer
from rcpo.method.calibration import RewardCalibrator, StepCalibration
from rcpo.method.geometry import Sketch
from rcpo.models.policy import head_shape
from rcpo.training.objective import build_calibrator

# 1.15 has the same trainers, but runs on GPUs alone; before it log-probs came another way.
OLDEST, BEFORE = Version("1.16"), Version("1.17")
STATE_FILE = "reward_calibration.json"


def _require_trl() -> None:
    try:
        version = Version(metadata.version("trl"))
    except metadata.PackageNotFoundError as error:
        raise ImportError("rcpo.integrations.trl needs TRL: pip install 'rcpo[trl]'") from error
    if not OLDEST <= version < BEFORE:
        raise ImportError(
            f"rcpo.integrations.trl was made for TRL from {OLDEST} to before {BEFORE}; "
            f"{version} is installed: pip install 'rcpo[trl]'"
        )


_require_trl()

from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.utils import maybe_gather_lm_head_ctx  # noqa: E402


@dataclass(kw_only=True)
class RewardCalibrationConfig(CalibrationConfig):
    """How to calibrate; the keys of rcpo's `rc` group. `enabled=False` measures the dynamics alone.

    `reduction` is what z is, which fixes the units of incentives and scores but hardly α: `mean` or `sum` of
    the response tokens' log-probs; None takes what the trainer's loss works with.

    `rule="loop"` is for `DPOTrainer`, whose reference has to be the starting policy: it reads the log-ratios
    of training pairs in the first epoch, while they are new, and keeps its last α afterwards.
    """

    enabled: bool = True
    reduction: str | None = None

    def __post_init__(self) -> None:
        if self.geometry != "head":
            raise ValueError(f"rc.geometry={self.geometry}: inside TRL the head's geometry is the only one")
        if self.scope != "batch":
            raise ValueError(f"rc.scope={self.scope}: inside TRL there is one α per batch")
        if self.reduction not in (None, "sum", "mean"):
            raise ValueError(f"rc.reduction={self.reduction}: sum or mean is expected, or None")


if TYPE_CHECKING:
    from typing import Any as _Trainer  # the trainer that a mixin stands before
else:
    _Trainer = object


class _Calibrated(_Trainer):
    """What all calibrated trainers share: the calibration's state, its metrics and its checkpoints."""

    _sees_reference = False  # whether `_observe` is given the responses' log-ratios

    def __init__(self, *args: Any, rc: RewardCalibrationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rc = rc
        self.calibrator: RewardCalibrator | None = None
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

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        on_device = values.to(self.accelerator.device)
        return self.accelerator.reduce(on_device, reduction="sum").to(values.device)

    def _calibrates(self) -> bool:
        """Whether this forward pass is one that learns."""
        return self.rc is not None and self.model.training and torch.is_grad_enabled()

    def _begin(self) -> None:
        """A micro-batch starts with the α that is known; a micro-batch update may still replace it."""
        self._factor = Factor(1.0 if self.calibrator is None else self.calibrator.alpha)

    def _observe(
        self,
        seen: Seen,
        responses: Responses,
        d: tuple[Tensor, Tensor],
        z: Tensor,
        logratios: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Adds a micro-batch, `z` (S,) as the trainer itself has it; closes a step with its last one.

        `logratios` are the sides' log-ratios per token, while their pairs are new.
        """
        assert seen.hidden is not None, "the backbone was not called"
        head = self._policy.get_output_embeddings()
        gathered = maybe_gather_lm_head_ctx(head.weight, head.bias)
        # the last position predicts nothing; prompt learning puts its own positions before the others
        hidden = seen.hidden[:, :-1][:, -responses.labels.shape[1] :]
        own, scores = score_head(responses, hidden, head, self._shape, self._sketch, gathered)
        self._verify(own - z, responses)
        self._statistics.observe(d, scores, logratios=logratios)
        if self._statistics.by_microbatch and self.calibrator is not None:
            self._factor.alpha = self.calibrator.alpha
        if self.accelerator.sync_gradients:
            metrics = self._statistics.end()
            self._log_metrics({k: float(v) for k, v in metrics.items() if v is not None})

    def _verify(self, difference: Tensor, responses: Responses) -> None:
        """Once: the head that is measured is the one that the trainer uses."""
        if self._verified:
            return
        half = self._policy.dtype != torch.float32 or torch.is_autocast_enabled(difference.device.type)
        worst = float((difference.abs() / responses.weights.sum(1).clamp(min=1e-30)).max())
        if not worst <= (5e-2 if half else 1e-3):
            raise ValueError(
                f"the output head of {type(self._policy).__name__} is not W h + b with a known scale or cap: "
                f"its log-probs differ by {worst:.2g} nats a token from the trainer's; use rc=None"
            )
        self._verified = True

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.calibrator is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE_FILE).write_text(json.dumps(self.calibrator.state_dict()), encoding="utf-8")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's `train`; a resumed run continues with the calibration that its checkpoint holds."""
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


class RewardCalibrationMixin(_Calibrated):
    """For `DPOTrainer` and its subclasses; stands before them in the list of bases."""

    _sees_reference = True

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        if not self._calibrates():
            return super()._compute_loss(model, inputs, return_outputs)
        self._begin()
        responses, seen = self._responses(inputs), Seen()
        with last_hidden_states(self._policy.base_model, seen), self._steering(seen, responses.winners):
            result = super()._compute_loss(model, inputs, return_outputs)
        assert seen.steered is not None, "the policy's log-probs were not seen"
        loss = result[0] if return_outputs else result
        (gradients,) = torch.autograd.grad(loss, seen.steered, retain_graph=True)
        gradients, logps = (t.detach()[:, -responses.labels.shape[1] :] for t in (gradients, seen.steered))
        d, z = responses.incentives(gradients), (logps * responses.weights).sum(1)
        self._observe(seen, responses, d, z, self._logratios(inputs, seen, responses))
        return result

    def _logratios(
        self, inputs: Mapping[str, Any], seen: Seen, responses: Responses
    ) -> tuple[Tensor, Tensor] | None:
        """The sides' log-ratios per token; None unless the loop reads them, and after the first epoch."""
        assert self.rc is not None and seen.steered is not None
        if not self.rc.loops or self.state.epoch is None or self.state.epoch >= 1:
            return None
        mask = inputs["completion_mask"][:, 1:].bool()
        weights, width = self._token_weights(mask), mask.shape[1]
        ratios = (seen.steered.detach()[:, -width:] * weights).sum(1)
        if self.precompute_ref_logps:
            ratios = ratios - torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            assert seen.reference is not None, "the reference's log-probs were not seen"
            ratios = ratios - (seen.reference[:, -width:] * weights).sum(1)
        ratios = ratios / responses.lengths
        return ratios[responses.winners], ratios[~responses.winners]

    @contextmanager
    def _steering(self, seen: Seen, winners: Tensor) -> Any:
        """TRL's fused head returns log-probs; those of the policy's pass are steered on their way out."""

        def hook(_: Any, __: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                seen.reference = output.log_probs
            elif output.log_probs is not None:
                output.log_probs = seen.steered = steer(output.log_probs, winners, self._factor)
            return output

        models = [self._policy]
        if getattr(self, "ref_model", None) is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        handles = [model.register_forward_hook(hook) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _responses(self, inputs: Mapping[str, Any]) -> Responses:
        mask = inputs["completion_mask"][:, 1:].bool()
        weights = self._token_weights(mask)
        if self._reduction() == "mean":
            weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
        return Responses(inputs["input_ids"][:, 1:], weights, self._winners(inputs))

    def _winners(self, inputs: Mapping[str, Any]) -> Tensor:
        """TRL's batch is all chosen, then all rejected."""
        rows = len(inputs["input_ids"])
        return torch.arange(rows, device=self.accelerator.device) < rows // 2

    def _reduction(self) -> str:
        assert self.rc is not None
        by_length = {"ipo", "sigmoid_norm", "sft"}  # these divide the log-ratios by the response's length
        return self.rc.reduction or ("mean" if by_length.issuperset(self.loss_types) else "sum")

    def _token_weights(self, mask: Tensor) -> Tensor:
        """1 a response token; beyond the shorter response of a pair `ld_alpha` (LD-DPO)."""
        if self.ld_alpha is None:
            return mask.float()
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
        return torch.where(mask.cumsum(1) <= shared[:, None], 1.0, float(self.ld_alpha)) * mask


class CalibratedDPOTrainer(RewardCalibrationMixin, DPOTrainer):
    """`trl.DPOTrainer` with reward calibration: every `loss_type`, weighted mixes included."""


class CalibratedKTOTrainer(RewardCalibrationMixin, KTOTrainer):
    """`trl.KTOTrainer` with reward calibration; desirable answers are the winners."""

    _sees_reference = False

    def _winners(self, inputs: Mapping[str, Any]) -> Tensor:
        return torch.as_tensor(inputs["label"], dtype=torch.bool, device=self.accelerator.device)

    def _reduction(self) -> str:
        assert self.rc is not None
        return self.rc.reduction or "sum"

    def _token_weights(self, mask: Tensor) -> Tensor:
        return mask.float()


class _ConcatenatedMixin(_Calibrated):
    """For CPO and ORPO, whose `concatenated_forward` returns log-probs of whole responses and an NLL."""

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        if train_eval == "eval" or not self._calibrates():
            return super().get_batch_loss_metrics(model, batch, train_eval)
        self._begin()
        self._seen = Seen()
        with last_hidden_states(self._policy.base_model, self._seen):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        seen, responses = self._seen, self._responses
        del self._seen, self._responses
        assert seen.steered is not None, "concatenated_forward was not called"
        (by_z,) = torch.autograd.grad(loss, seen.steered, retain_graph=True)
        self._observe(seen, responses, responses.by_side(by_z.double()), seen.steered.detach())
        return loss, metrics

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        chosen, rejected, *logits, nll = (output := super().concatenated_forward(model, batch))[:5]
        if not self._calibrates():
            return output
        self._responses = self._batch_responses(batch)
        logps = torch.cat([chosen, rejected])
        self._seen.steered = steered = steer(logps, self._responses.winners, self._factor)
        if nll.requires_grad:  # its responses are the chosen ones: steer their part of it
            part = self._nll_part(batch)
            nll = nll + (chosen * part).sum() - (steered[: len(chosen)] * part).sum()
        return (steered[: len(chosen)], steered[len(chosen) :], *logits, nll, *output[5:])

    def _averages(self) -> bool:
        """Whether `concatenated_forward` returns mean log-probs a token, not sums."""
        raise NotImplementedError

    def _nll_tokens(self, batch: Any) -> Tensor:
        """How many tokens the NLL is a mean over."""
        raise NotImplementedError

    def _nll_part(self, batch: Any) -> Tensor:
        """∂(−NLL)/∂z_w of each chosen response, (B,)."""
        lengths = (batch["chosen_labels"][:, 1:] != -100).sum(1)
        return (lengths if self._averages() else torch.ones_like(lengths)) / self._nll_tokens(batch)

    def _batch_responses(self, batch: Any) -> Responses:
        both = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.processing_class.pad_token_id,
            device=self.accelerator.device,
        )
        labels = both["concatenated_labels"][:, 1:]
        weights = (labels != -100).float()
        if self._averages():
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        winners = torch.arange(len(labels), device=labels.device) < len(labels) // 2
        return Responses(labels.clamp(min=0), weights, winners)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        self.store_metrics(metrics, train_eval="train")


class CalibratedCPOTrainer(_ConcatenatedMixin, CPOTrainer):
    """TRL's CPO and SimPO with reward calibration, the NLL term included."""

    def _averages(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    def _nll_tokens(self, batch: Any) -> Tensor:
        return (batch["chosen_labels"][:, 1:] != -100).sum()


class CalibratedORPOTrainer(_ConcatenatedMixin, ORPOTrainer):
    """TRL's ORPO with reward calibration. Its NLL covers the prompts too; their part is left as it is."""

    def _averages(self) -> bool:
        return True

    def _nll_tokens(self, batch: Any) -> Tensor:
        return batch["chosen_attention_mask"][:, 1:].sum()
