"""Adapters: how a trainer shows its log-probs, chosen by what the trainer has and not by its version.

`Tokens` and `TokenPairs` stand before trainers that sum the log-probs of tokens in `_compute_loss`;
`Sequences` and its subclasses before those whose `concatenated_forward` or `forward` returns log-probs of
whole responses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rcpo.integrations.calibrated import Calibrated
from rcpo.integrations.steering import IGNORED, Responses, Seen

# TRL's functions from logits to log-probs, which its trainers' modules import by name
SELECTIVE = ("selective_log_softmax", "selective_log_softmax_and_entropy")


class Tokens(Calibrated):
    """For trainers of single responses: rows with a `completion_mask` and a `label`."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        return self._calibrate(
            inputs, lambda: super(Tokens, self)._compute_loss(model, inputs, return_outputs)
        )

    @contextmanager
    def _steering(self) -> Iterator[None]:
        """Steer the log-probs of fused heads, and those that the module's functions make of logits."""
        models = [self._policy]
        if getattr(self, "ref_model", None) is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        handles = [model.register_forward_hook(self._steer_output) for model in models]
        modules = [sys.modules[cls.__module__] for cls in type(self).__mro__]
        originals = {(m, name): vars(m)[name] for m in modules for name in SELECTIVE if name in vars(m)}
        for (module, name), function in originals.items():
            setattr(module, name, self._steered_function(function))
            if "F" in vars(module):  # until TRL 1.14 the loss "sft" is a cross-entropy of logits
                originals = {**originals, (module, "F"): torch.nn.functional}
                vars(module)["F"] = Functional(self._steer_nll)
        try:
            yield
        finally:
            for (module, name), function in originals.items():
                setattr(module, name, function)
            for handle in handles:
                handle.remove()

    def _steer_output(self, _: Any, __: Any, output: Any) -> Any:
        if getattr(output, "log_probs", None) is not None:
            output.log_probs = self._steer(output.log_probs)
        return output

    def _steered_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def steered(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return (self._steer(result[0]), *result[1:]) if isinstance(result, tuple) else self._steer(result)

        return steered

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL 1.14 with `use_liger_kernel`: the head in chunks, without logits."""
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return (logps if self._seen is None else self._steer(logps), *others)

    def _by_z(self, loss: Tensor, seen: Seen, responses: Responses, batch: Any) -> tuple[Tensor, Tensor]:
        assert seen.steered is not None
        gradients, pull = pulls(loss, seen)
        width = responses.labels.shape[1]
        inside = responses.weights != 0  # log-probs outside responses may be anything
        logps = seen.steered[:, -width:].where(inside, 0.0)
        by = responses.by_z(gradients[:, -width:])
        if pull is not None:
            by = by + self._by_nll(pull, responses, batch)
        return by, (logps * responses.weights).sum(1)

    def _labels(self, inputs: Any) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        if hasattr(self, "_truncate_inputs"):  # TRL 0.29 truncates in its loss
            ids, _, mask = self._truncate_inputs(ids, inputs["attention_mask"], mask)
        return ids.masked_fill(mask == 0, IGNORED)

    def _responses(self, batch: Any) -> Responses:
        assert self.rc is not None
        winners = torch.as_tensor(batch["label"], dtype=torch.bool, device=self.accelerator.device)
        return Responses.of_labels(self._labels(batch), winners, mean=self.rc.reduction == "mean")


class TokenPairs(Tokens):
    """For trainers of pairs: rows with a `completion_mask`, all chosen, then all rejected."""

    _sees_reference = True

    def _responses(self, batch: Any) -> Responses:
        assert self.rc is not None
        by_length = {"ipo", "sigmoid_norm", "sft"}  # these divide the log-ratios by the response's length
        reduction = self.rc.reduction or ("mean" if by_length.issuperset(self.loss_types) else "sum")
        labels = self._labels(batch)
        return Responses.of_labels(labels, halves(labels), mean=reduction == "mean", tail=self.ld_alpha)

    def _logratios(self, seen: Seen, responses: Responses, batch: Any) -> Tensor:
        labels = self._labels(batch)
        weights = Responses.of_labels(labels, halves(labels), mean=False, tail=self.ld_alpha).weights

        def summed(values: Tensor | None) -> Tensor:
            assert values is not None, "the reference's log-probs were not seen"
            return (values[:, -weights.shape[1] :].where(weights != 0, 0.0) * weights).sum(1)

        return (
            summed(seen.steered) - given_reference(batch, lambda: summed(seen.reference))
        ) / responses.lengths


class Sequences(Calibrated):
    """For CPO and ORPO: `concatenated_forward` returns log-probs of whole responses, and an NLL.

    Subclasses name the tensors of their batches and outputs.
    """

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        own = super().get_batch_loss_metrics
        return self._calibrate(batch, lambda: own(model, batch, *args, **kwargs))

    def concatenated_forward(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().concatenated_forward(model, batch, *args, **kwargs)
        return output if self._seen is None else self._steer_output(batch, output)

    def _steer_output(self, batch: Any, output: Any) -> Any:
        chosen, rejected, *logits, nll = output[:5]
        if nll.requires_grad:
            part = self._nll_of_responses(nll, chosen, batch)
            nll = nll + (self._steer_nll(part) - part)
        return (*self._steer_sides(chosen, rejected), *logits, nll, *output[5:])

    def _steer_sides(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        steered = self._steer(torch.cat([chosen, rejected]))
        return steered[: len(chosen)], steered[len(chosen) :]

    def _nll_of_responses(self, nll: Tensor, chosen: Tensor, batch: Any) -> Tensor:
        return nll

    def _averages(self) -> bool:
        """Whether the log-probs are means a token, not sums."""
        return self.loss_type in ("ipo", "simpo")

    def _labels(self, batch: Any) -> Tensor:
        both = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.processing_class.pad_token_id,
            device=self.accelerator.device,
        )
        return both["concatenated_labels"]

    def _tail(self) -> float | None:
        return None

    def _responses(self, batch: Any) -> Responses:
        assert self.rc is not None
        mean = self._averages() if self.rc.reduction is None else self.rc.reduction == "mean"
        labels = self._labels(batch)
        return Responses.of_labels(labels, halves(labels), mean=mean, tail=self._tail())

    def _by_z(self, loss: Tensor, seen: Seen, responses: Responses, batch: Any) -> tuple[Tensor, Tensor]:
        """The trainer's log-probs are z times the length, where one is a mean and the other a sum."""
        assert self.rc is not None and seen.steered is not None
        by, pull = pulls(loss, seen)
        z = seen.steered
        mean = self._averages() if self.rc.reduction is None else self.rc.reduction == "mean"
        if mean != self._averages():
            times = responses.lengths if mean else 1 / responses.lengths
            by, z = by * times, z / times
        if pull is not None:
            by = by + self._by_nll(pull, responses, batch)
        return by, z

    def _logratios(self, seen: Seen, responses: Responses, batch: Any) -> Tensor:
        assert seen.steered is not None

        def seen_reference() -> Tensor:
            assert seen.reference is not None, "the reference's log-probs were not seen"
            return seen.reference

        ratios = seen.steered - given_reference(batch, seen_reference)
        return ratios if self._averages() else ratios / responses.lengths


class SequencesWithPrompts(Sequences):
    """For ORPO. Its NLL covers the prompts too; their part is left as it is."""

    def _averages(self) -> bool:
        return True

    def _nll_of_responses(self, nll: Tensor, chosen: Tensor, batch: Any) -> Tensor:
        lengths = (batch["chosen_labels"][:, 1:] != IGNORED).sum(1)
        return -(chosen * lengths).sum() / batch["chosen_attention_mask"][:, 1:].sum()

    def _nll_weights(self, responses: Responses, batch: Any) -> Tensor:
        inside = (responses.weights[responses.winners] != 0).float()
        return inside / batch["chosen_attention_mask"][:, 1:].sum()


class SequencePairs(Sequences):
    """For DPO until TRL 0.28: `concatenated_forward` returns a dict, from prompts and completions."""

    _sees_reference = True

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        super()._refuse(*args, **kwargs)
        given = [getattr(a, "__dict__", {}) for a in (*args, *kwargs.values())]
        if any(settings.get("padding_free") for settings in given):
            raise ValueError(
                "padding_free=True puts all responses in one row: set padding_free=False, or rc=None"
            )
        if any(settings.get("ld_alpha") is not None for settings in given):
            raise ValueError(
                "ld_alpha: TRL before 0.29 counts the shared length from the prompt's first token; leave it "
                "out, use a newer TRL, or rc=None"
            )

    def _averages(self) -> bool:
        return "ipo" in self.loss_type

    def _steer_output(self, batch: Any, output: Any) -> Any:
        chosen, rejected = output["chosen_logps"], output["rejected_logps"]
        if "nll_loss" in output:
            output["nll_loss"] = self._steer_nll(output["nll_loss"])
        output["chosen_logps"], output["rejected_logps"] = self._steer_sides(chosen, rejected)
        return output

    def _nll_weights(self, responses: Responses, batch: Any) -> Tensor:
        """TRL's NLL leaves out tokens whose id is 0."""
        winners = responses.winners
        counted = ((responses.weights[winners] != 0) & (responses.labels[winners] != 0)).float()
        return counted / counted.sum()

    def _labels(self, batch: Any) -> Tensor:
        """Prompts and completions in one row, without the padding between them, cut as TRL cuts them."""
        both = self.concatenated_inputs(batch, padding_value=self.pad_token_id)
        prompts, completions = both["prompt_attention_mask"], both["completion_attention_mask"]
        ids = torch.cat([both["prompt_input_ids"], both["completion_input_ids"]], dim=1)
        present = torch.cat([prompts, completions], dim=1).bool()
        labels = ids.masked_fill(~torch.cat([prompts * 0, completions], dim=1).bool(), IGNORED)
        order = (~present).long().argsort(dim=1, stable=True)
        labels, lengths = labels.gather(1, order), present.sum(1)
        width = int(lengths.max())
        if self.max_length is not None and self.max_length < present.shape[1]:
            width = min(width, self.max_length)
            if self.truncation_mode == "keep_end":
                first = (lengths - width).clamp(min=0)[:, None]
                columns = first + torch.arange(width, device=labels.device)
                return labels.gather(1, columns)
        return labels[:, :width]


class Unpaired(Sequences):
    """For KTO until TRL 1.7: `forward` returns log-probs of desirable and of undesirable responses."""

    def forward(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(model, batch, *args, **kwargs)
        if self._seen is None:
            return output
        return (*self._steer_sides(*output[:2]), *output[2:])

    def _averages(self) -> bool:
        return False

    def _labels(self, batch: Any) -> Tensor:
        return batch["completion_labels"]

    def _desirable(self, batch: Any) -> Tensor:
        return torch.as_tensor(batch["label"], dtype=torch.bool, device=self.accelerator.device)

    def _responses(self, batch: Any) -> Responses:
        assert self.rc is not None
        desirable = self._desirable(batch)
        rows = (~desirable).long().argsort(stable=True)
        return Responses.of_labels(
            self._labels(batch)[rows], desirable[rows], mean=self.rc.reduction == "mean", rows=rows
        )


class Functional:
    """torch.nn.functional with a cross-entropy whose result passes through `steer`."""

    def __init__(self, steer: Callable[[Tensor], Tensor]) -> None:
        self.steer = steer

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)

    def cross_entropy(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.steer(torch.nn.functional.cross_entropy(*args, **kwargs))


def pulls(loss: Tensor, seen: Seen) -> tuple[Tensor, Tensor | None]:
    """∂loss by the steered log-probs, and by the steered NLL, if there is one in the loss."""
    assert seen.steered is not None
    known = [seen.steered] if seen.nll is None else [seen.steered, seen.nll]
    found = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=seen.nll is not None)
    return torch.zeros_like(seen.steered) if found[0] is None else found[0], (*found, None)[1]


def halves(labels: Tensor) -> Tensor:
    """Which rows are winners, where a batch is all chosen, then all rejected."""
    return torch.arange(len(labels), device=labels.device) < len(labels) // 2


def given_reference(batch: Any, otherwise: Callable[[], Tensor]) -> Tensor:
    """The reference's log-probs that a batch brings along, precomputed, or those that were seen."""
    if "ref_chosen_logps" in batch:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    return otherwise()


def pair_adapter(trainer: type) -> type[Calibrated]:
    """The adapter for a DPO trainer of TRL."""
    return TokenPairs if hasattr(trainer, "_compute_loss") else SequencePairs


def single_adapter(trainer: type) -> type[Calibrated]:
    """The adapter for a KTO trainer of TRL."""
    return Tokens if hasattr(trainer, "_compute_loss") else Unpaired
