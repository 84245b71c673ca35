"""The policy: a causal language model of transformers with the fused way to its log-probs.

Axes: R rows, L row length, N response tokens, D hidden, V vocabulary, k sketch.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.errors import ConfigError
from rcpo.method.geometry import HeadShape, Passes, Sketch
from rcpo.method.logps import log_squares, log_squares_of, token_logps
from rcpo.method.types import TokenBatch
from rcpo.models.attention import attention_masks, one_sequence_a_row
from rcpo.system import distributed

log = logging.getLogger(__name__)

_AGREE = 1e-4  # nats, in fp32
# Another token may be routed to other experts, whose products then round otherwise; BERT leaks by far more.
_LEAK_IN_HALF = 5e-2


def head_shape(model: PreTrainedModel) -> HeadShape:
    """What the model does to W h, from the names that transformers' configurations use.

    Times logit_scale (Cohere) and lm_head_multiplier (Falcon-H1), divided by logits_scaling (Granite), capped
    at final_logit_softcapping (Gemma 2) or logits_soft_cap (RecurrentGemma).
    """
    settings = model.config.get_text_config().to_dict()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(settings.get(name) or 1.0)
    scale /= float(settings.get("logits_scaling") or 1.0)
    return HeadShape(scale, settings.get("final_logit_softcapping") or settings.get("logits_soft_cap"))


class Policy(nn.Module):
    """A language model that scores response tokens without making all logits.

    `forward` returns log-probs (N,), the hidden states that gave them (N, D), detached, their sketched scores
    (N, k) if a sketch is given, and `rcpo.method.logps.log_squares` (N,) if `squares` are asked for (else
    empty ones).

    `fused` is False for a model whose own logits are not those of a linear head with a known `shape`, which
    `examine` finds out: its logits are made in full, and there are no hidden states and no scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.shape = head_shape(model)
        self.fused = True
        self.passes: Passes | None = None  # through the head's logits; None: those of the device
        self.recomputes = False

    def recompute_activations(self) -> None:
        """Keep no layer's activations for the backward pass, which computes them again."""
        name = "activation_checkpointing_enable"
        if not hasattr(self.model, name):
            name = "gradient_checkpointing_enable"  # what transformers called it before 5.23
        getattr(self.model, name)({"use_reentrant": False})
        self.recomputes = True

    def examine(self) -> None:
        """Run the model on a few tokens, and find out whether the fused head agrees with its own.

        Raises ConfigError where log-probs are not finite or a token sees later ones. Under ZeRO-3 the engine
        has to be there, and all ranks call together.
        """
        found = examination(self)
        name = type(self.model).__name__
        if not found.finite:
            raise ConfigError(
                f"the log-probs of {name} are not finite: {_not_finite(self.model)}; were its weights "
                "damaged, or saved by a run that diverged?"
            )
        if found.leak > (_AGREE if self.model.dtype == torch.float32 else _LEAK_IN_HALF):
            raise ConfigError(
                f"{name} is not causal: changing a token changes the log-probs of those before it by "
                f"{found.leak:.2g} nats, so an answer's tokens would see what they predict; give a causal "
                "language model"
            )
        self.fused = found.head_difference <= _AGREE
        if not self.fused and distributed.is_main():
            log.warning(
                "%s: the output head is not W h + b with a known scale or cap (log-probs differ by %.2g "
                "nats); the model's own logits are used, which takes more memory",
                name,
                found.head_difference,
            )

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and the model itself is frozen."""
        return bool(self.model._hf_peft_config_loaded)

    @property
    def vocabulary(self) -> int:
        """V, the head's rows."""
        return int(self.model.get_output_embeddings().out_features)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        sketch: Sketch | None = None,
        squares: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        masks: AbstractContextManager[None] = nullcontext()
        if segments is None:  # padding is on the right, where no token sees it, for the model is causal
            masks = one_sequence_a_row()
        else:
            dtype = self.model.dtype
            inputs["attention_mask"] = attention_masks(self.model.config, segments, position_ids, dtype)
        if not self.fused:
            assert sketch is None, "no scores without a known head"
            with masks:
                logits = self.model(**inputs, use_cache=False).logits
            own = logits.flatten(0, 1).index_select(0, predictors)
            logps = _own_logps(own, labels)
            none = logps.new_empty(0)
            return logps, none, none, log_squares_of(own.detach().to(logps.dtype)) if squares else none
        backbone = backbone_of(self.model)
        assert backbone is not None
        with masks:
            output = backbone(**inputs, use_cache=False)
        head = self.model.get_output_embeddings()
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, predictors)
        hidden = hidden.to(head.weight.dtype)  # Mamba ends in fp32 whatever its weights are
        known: dict[str, Any] = {"bias": head.bias, "shape": self.shape, "passes": self.passes}
        logps, scores = token_logps(hidden, head.weight, labels, sketch=sketch, **known)
        none, hidden = logps.new_empty(0), hidden.detach()
        asked = log_squares(hidden, head.weight, **known) if squares else none
        return logps, hidden, none if scores is None else scores, asked


def decoder_layers(module: nn.Module) -> dict[str, nn.Module]:
    """A model's repeated layers by name: the longest list of modules; empty where it has none."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    if not lists:
        return {}
    name = max(lists, key=lambda key: len(lists[key]))
    return {f"{name}.{index}": layer for index, layer in enumerate(lists[name])}


def compile_layers(policy: Policy, backend: str = "inductor") -> None:
    """Compile each decoder layer: the first step waits for one, and layers that are alike share it."""
    for layer in decoder_layers(policy).values():
        layer.compile(backend=backend, dynamic=True)


def _own_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, V), labels (N,) → (N,) in fp32 or better."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(precise, dim=-1).gather(1, labels[:, None]).squeeze(1)


def policy_inputs(batch: TokenBatch) -> dict[str, Any]:
    """The arguments of `Policy.forward` from a batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "predictors": batch.predictors,
        "labels": batch.labels,
        "segments": batch.segments,
    }


def backbone_of(model: PreTrainedModel) -> nn.Module | None:
    """The part of a model that ends with the hidden states; None where it has none.

    Llama 4's text model names an attribute that it does not have: the model inside it is meant.
    """
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)


@dataclass(frozen=True)
class Examination:
    """What a model does with a few tokens, in nats.

    `leak`: how much the last token changes the log-probs of those before it. `head_difference`: between the
    fused log-probs and those of the model's own logits, infinite where there is no linear head to fuse.
    """

    finite: bool
    leak: float
    head_difference: float


def examination(policy: Policy) -> Examination:
    """Compare two rows of tokens that differ in the last one, and the fused head with the model's own.

    The head and what follows it run in fp32 from the model's hidden states: in bf16 a logit of 20 is known to
    0.06, and each operation of a cap rounds again.
    """
    length, device, model = 8, policy.model.device, policy.model
    rows = torch.arange(1, length + 1, device=device).repeat(2, 1)
    rows[1, -1] += 1
    rows %= model.config.get_text_config().vocab_size
    positions = torch.arange(length, device=device).expand(2, length)
    inputs = {"input_ids": rows, "position_ids": positions}
    labels, predictors = rows[0, 1:], torch.arange(length - 1, device=device)
    head = model.get_output_embeddings()
    known = isinstance(head, nn.Linear) and backbone_of(model) is not None
    with torch.no_grad(), one_sequence_a_row():
        hidden = policy(**inputs, predictors=predictors, labels=labels)[1] if known else None
        own, fused = _precise_logits(model, inputs, hidden)
    both = [_own_logps(own[row, :-2], rows[0, 1:-1]) for row in (0, 1)]
    finite = bool(own.isfinite().all())
    leak = float((both[0] - both[1]).abs().max())
    if fused is None:
        return Examination(finite, leak, math.inf)
    difference = _own_logps(policy.shape.finish(fused), labels) - _own_logps(own[0, :-1], labels)
    return Examination(finite, leak, float(difference.abs().max()))


def _precise_logits(
    model: PreTrainedModel, inputs: dict[str, Tensor], hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The model's own logits (2, L, V) with its head in fp32, and W h + b of `hidden` (N, D), if given."""
    if hidden is None:
        return model(**inputs, use_cache=False).logits, None
    head, products = model.get_output_embeddings(), []
    earlier = vars(head).get("forward")

    def precise(states: Tensor) -> Tensor:
        products.append(_in_fp32(head, hidden))
        return _in_fp32(head, states)

    head.forward = precise  # inside the module's own call, where ZeRO-3 has gathered its weight
    try:
        return model(**inputs, use_cache=False).logits, products[0]
    finally:
        del head.forward
        if earlier is not None:
            head.forward = earlier


def _in_fp32(head: nn.Linear, states: Tensor) -> Tensor:
    """W h + b in fp32, some rows of W at a time."""
    parts = [nn.functional.linear(states.float(), rows.float()) for rows in head.weight.split(8192)]
    logits = torch.cat(parts, dim=-1)
    return logits if head.bias is None else logits + head.bias.float()


def _not_finite(model: PreTrainedModel) -> str:
    """Which weights are not finite, as far as this rank holds them."""
    bad = [
        name
        for name, value in model.named_parameters()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if not bad:
        return "they overflow"
    return f"NaN or infinity in {bad[0]}" + (f" and {len(bad) - 1} more weights" if bad[1:] else "")
