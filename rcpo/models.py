"""The policy: a causal language model of transformers, its tokenizer, and the fused way to its log-probs.

Axes: R rows, L row length, N response tokens, D hidden, V vocabulary, k sketch.
"""

from __future__ import annotations

import logging
import math
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from rcpo import distributed
from rcpo.attention import attention_masks
from rcpo.config import ConfigError, ModelConfig
from rcpo.geometry import HeadShape, Sketch
from rcpo.logps import token_logps
from rcpo.types import TokenBatch

disable_progress_bar()  # the weights load in a second, on every rank

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_path(config: ModelConfig) -> str:
    """The folder of a model in the hub's format: the packaged one, or the user's."""
    if config.name == "tiny":
        return str(resources.files("rcpo") / "assets" / "tiny")
    if config.path is None:
        raise ConfigError(f"model={config.name} needs model.path: a folder in the hub's format")
    return config.path


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; padding falls back to its end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {path} has no end-of-sequence token; set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_config(path: str) -> PreTrainedConfig:
    """The configuration in a model's folder."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json; give a folder in the hub's format")
    return AutoConfig.from_pretrained(path)


def load_model(path: str, dtype: torch.dtype, init: str = "pretrained") -> PreTrainedModel:
    """A causal language model from a folder, with every dropout off, so that a policy equals itself.

    `init` is `pretrained`, or `random` for fresh weights from torch's seed in the folder's architecture.
    """
    config = load_config(path)
    if init == "random":
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key, value in model.config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(model.config, key, 0.0)
    return model


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

    `fused` is False for a model whose own logits are not those of a linear head with a known `shape`: its
    logits are made in full, and there are no hidden states and no scores. It is said once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.shape = head_shape(model)
        self.fused = True
        difference = head_difference(self)
        half = model.dtype in (torch.bfloat16, torch.float16)
        if not difference <= (5e-2 if half else 1e-4):
            self.fused = False
            if distributed.is_main():
                log.warning(
                    "%s: the output head is not W h + b with a known scale or cap (log-probs differ by %.2g "
                    "nats); the model's own logits are used, which takes more memory",
                    type(model).__name__,
                    difference,
                )

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
