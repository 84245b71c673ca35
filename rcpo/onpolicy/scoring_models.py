"""Scores that a model gives: a reward model's number, or the log-likelihood of an answer.

Axes: R rows of a batch, L their padded length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rcpo.config.onpolicy import ScoreConfig
from rcpo.config.schema import RunConfig
from rcpo.data.conversations import parse_prompt
from rcpo.data.dataset import make_encoder
from rcpo.errors import ConfigError
from rcpo.models import hub
from rcpo.models.hub import ModelSource
from rcpo.models.loading import DTYPES, load_tokenizer, load_whole, read_classifier, read_config
from rcpo.onpolicy.prompts import Prompt
from rcpo.system import distributed
from rcpo.system.text import first_line

Ids = list[int]


class ScoringModel(Protocol):
    """Tokens of an answer behind its prompt, and the scores of some."""

    limit: int | None

    def ids(self, prompt: Prompt, text: str) -> Ids:
        """Raise BadRow for an answer that a template does not render."""
        ...

    def load(self) -> None:
        """Read the weights."""

    def release(self) -> None:
        """Let them go."""

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[Ids]) -> list[float]: ...


class RewardModel:
    """A sequence-classification model with one label; its own tokenizer and chat template.

    Raises ConfigError for a model with more labels or without a head, before its weights are read.
    """

    def __init__(self, config: RunConfig, score: ScoreConfig) -> None:
        assert score.path is not None
        self._config = config
        self._folder = hub.folder("score.path", score.path, score.revision)
        self._tokenizer = load_tokenizer(self._folder, config.model)
        self._own = read_config(self._folder, config.model)
        if self._own.num_labels != 1:
            raise ConfigError(
                f"score.path={score.path} has {self._own.num_labels} labels, and a reward model has one: "
                "give a sequence-classification model with num_labels=1"
            )
        # a repository's own code may compute where it is made, and quantised weights need their device:
        # both are looked at when they load
        if not config.model.trust_remote_code and not hasattr(self._own, "quantization_config"):
            read_classifier(self._folder, self._own, config.model, {"device_map": "meta"})
        self.limit = score.max_length or getattr(self._own.get_text_config(), "max_position_embeddings", None)

    def ids(self, prompt: Prompt, text: str) -> Ids:
        """Raise ConfigError for a conversation that the model has no template for, or that it refuses."""
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            if not isinstance(prompt.content, str):
                raise ConfigError(
                    f"{prompt.place} holds messages, and the reward model in {self._folder} has no chat "
                    "template; give its tokenizer one"
                )
            return list(tokenizer(prompt.content + text)["input_ids"])
        content = parse_prompt(prompt.content) if isinstance(prompt.content, str) else prompt.content
        messages = [*content, {"role": "assistant", "content": text}]
        try:
            whole = tokenizer.apply_chat_template(messages, tokenize=False, tools=prompt.more.get("tools"))
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ConfigError(
                f"{prompt.place}: the chat template of the reward model in {self._folder} refuses the "
                f"conversation: {first_line(error)}; give its tokenizer a template that takes it"
            ) from error
        # the template writes what the tokenizer would put before a text
        return list(tokenizer(whole, add_special_tokens=False)["input_ids"])

    def load(self) -> None:
        self._own.pad_token_id = _padding(self._own, self._tokenizer)
        dtype = {"dtype": DTYPES[self._config.train.dtype]}
        self._model = read_classifier(self._folder, self._own, self._config.model, dtype)
        self._model.to(distributed.device()).eval()

    def release(self) -> None:
        del self._model

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[Ids]) -> list[float]:
        pad = self._own.pad_token_id
        if pad is None:  # it could not tell a row's last token from padding
            return [self._scores([row], 0)[0] for row in rows]
        return self._scores(rows, pad)

    def _scores(self, rows: Sequence[Ids], pad: int) -> list[float]:
        ids, mask = _right_pad(rows, pad)
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        assert logits.shape == (len(rows), 1), logits.shape
        return [float(value) for value in logits[:, 0].float()]


def _padding(own: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that pads: the model's, else the tokenizer's if it does nothing else; None without one."""
    if own.pad_token_id is not None:
        return int(own.pad_token_id)
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) and pad != tokenizer.eos_token_id else None


class Likelihood:
    """A causal language model: the mean log-probability of an answer's tokens, its end among them."""

    def __init__(self, config: RunConfig, score: ScoreConfig, policy: ModelSource) -> None:
        self._config = config
        self._source = policy
        if score.path is not None:
            self._source = ModelSource(hub.folder("score.path", score.path, score.revision))
        self._tokenizer = load_tokenizer(self._source.tokenizer, config.model)
        self._encoder = make_encoder(replace(config.data, columns={}), self._tokenizer)
        self._starts: dict[str, int] = {}  # where answers begin, by their prompts' ids
        own = read_config(self._source.base, config.model)
        self.limit = score.max_length or getattr(own.get_text_config(), "max_position_embeddings", None)

    def ids(self, prompt: Prompt, text: str) -> Ids:
        before, answer = self._encoder.answer_ids(_completion(prompt, text), prompt.place)
        self._starts[prompt.id] = len(before)
        return before + answer

    def load(self) -> None:
        config = self._config
        model = load_whole(self._source, config.model, config.train.dtype, config.seed)
        self._model = model.to(distributed.device()).eval()

    def release(self) -> None:
        del self._model

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[Ids]) -> list[float]:
        pad = self._tokenizer.pad_token_id
        assert isinstance(pad, int)
        ids, mask = _right_pad(rows, pad)
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]  # (R, L − 1)
        starts = [self._starts[prompt.id] for prompt in prompts]
        return [
            float(row[start - 1 : len(tokens) - 1].double().mean())
            for row, start, tokens in zip(logps, starts, rows, strict=True)
        ]


def _completion(prompt: Prompt, text: str) -> dict[str, Any]:
    if isinstance(prompt.content, str):
        return {"prompt": prompt.content, "completion": text}
    said = [{"role": "assistant", "content": text}]
    return {"prompt": prompt.content, "completion": said, **prompt.more}


def _right_pad(rows: Sequence[Ids], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each (R, L)."""
    length, where = max(map(len, rows)), distributed.device()
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=where)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=where)
    return ids, mask
