"""The policy: a causal language model of transformers with the fused way to its log-probs.

Axes: R rows, L row length, N response tokens, D hidden, V vocabulary, k sketch.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo import distributed
from rcpo.attention import attention_masks
from rcpo.geometry import HeadShape, Sketch
from rcpo.logps import token_logps
from rcpo.types import TokenBatch

log = logging.getLogger(__name__)


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

    `forward` returns log-probs (N,), the hidden states that gave them (N, D), detached, and their sketched
    scores (N, k) if a sketch is given (an empty tensor otherwise).

    `fused` is False for a model whose own logits are not those of a linear head with a known `shape`, which
    `examine_head` finds out: its logits are made in full, and there are no hidden states and no scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.shape = head_shape(model)
        self.fused = True

    def examine_head(self) -> None:
        """Compares the fused log-probs with the model's own, once; says so where they differ.

        It runs the model, so under ZeRO-3 its engine has to be there, and all ranks call together.
        """
        difference = head_difference(self)
        half = self.model.dtype in (torch.bfloat16, torch.float16)
        self.fused = difference <= (5e-2 if half else 1e-4)
        if not self.fused and distributed.is_main():
            log.warning(
                "%s: the output head is not W h + b with a known scale or cap (log-probs differ by %.2g "
                "nats); the model's own logits are used, which takes more memory",
                type(self.model).__name__,
                difference,
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
        attention_mask: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        sketch: Sketch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, dtype = self.model.config, self.model.dtype
        mask = attention_mask if segments is None else attention_masks(config, segments, position_ids, dtype)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        if not self.fused:
            assert sketch is None, "no scores without a known head"
            logits = self.model(**inputs, use_cache=False).logits
            logps = _own_logps(logits.flatten(0, 1).index_select(0, predictors), labels)
            return logps, logps.new_empty(0), logps.new_empty(0)
        output = self.model.base_model(**inputs, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, predictors)
        head = self.model.get_output_embeddings()
        logps, scores = token_logps(
            hidden, head.weight, labels, bias=head.bias, shape=self.shape, sketch=sketch
        )
        return logps, hidden.detach(), logps.new_empty(0) if scores is None else scores


def _own_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, V), labels (N,) → (N,) in fp32 or better."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(precise, dim=-1).gather(1, labels[:, None]).squeeze(1)


def policy_inputs(batch: TokenBatch) -> dict[str, Any]:
    """The arguments of `Policy.forward` from a batch."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "predictors": batch.predictors,
        "labels": batch.labels,
        "segments": batch.segments,
    }


def head_difference(policy: Policy) -> float:
    """Largest difference in nats between fused log-probs and those of the model's own logits; a few tokens.

    Infinite where the head is no linear layer at all.
    """
    if not isinstance(policy.model.get_output_embeddings(), nn.Linear):
        return math.inf
    length, device = 8, policy.model.device
    ids = torch.arange(1, length + 1, device=device)[None] % policy.vocabulary
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length, device=device)[None],
    }
    labels = ids[0, 1:]
    with torch.no_grad():
        fused = policy(**inputs, predictors=torch.arange(length - 1, device=device), labels=labels)[0]
        own = _own_logps(policy.model(**inputs, use_cache=False).logits[0, :-1], labels)
    return float((fused - own).abs().max())
