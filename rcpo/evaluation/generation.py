"""Answers of a causal language model, the same whatever the batch size and the number of ranks.

Axes: R rows of a batch, L their padded length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rcpo.system import distributed

ROOM_STEP = 64


@dataclass(frozen=True)
class Decoding:
    """How answers are made: at most `max_new_tokens`, ended by any of `stop_ids`; padding is `pad_id`.

    `positions` is how many tokens the model takes, a prompt and its answer together; None is any number.
    `temperature` and `top_p` are for prompts that are given a seed; the others are answered greedily.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    positions: int | None = None

    def room(self, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many tokens.

        Where the model's positions end first, it is a multiple of `ROOM_STEP`, if there is room for one, so
        that prompts of similar lengths share a batch.
        """
        room = self.max_new_tokens
        if self.positions is None or prompt + room <= self.positions:
            return room
        room = self.positions - prompt
        return room if room < ROOM_STEP else room - room % ROOM_STEP


@dataclass(frozen=True)
class Generated:
    """Generated tokens without the stop token; `end` is that token, None where the answer was cut off."""

    tokens: list[int]
    end: int | None

    @property
    def whole(self) -> list[int]:
        """All tokens that the model chose, the stop token among them."""
        return self.tokens if self.end is None else [*self.tokens, self.end]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    seeds: Sequence[int | None] | None = None,
    synced_gpus: bool = False,
) -> list[Generated]:
    """An answer to each prompt: the most probable tokens, or with a seed tokens drawn from it.

    Prompts are token ids (with BOS where the template has one). A prompt's draws depend on its own seed
    alone. The model's own generation settings (temperature, penalties, forced tokens) are set aside; its
    training flags are restored afterwards. With `synced_gpus` (ZeRO-3, where every forward pass is a
    collective) all ranks call this together, with as many prompts as each has, and take the same number of
    passes. Raises ValueError for an empty prompt, and for one that leaves no room for an answer.
    """
    empty = next((number for number, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise ValueError(
            f"prompt {empty} has no tokens: nothing to continue (does the tokenizer have a BOS?)"
        )
    full = next((number for number, prompt in enumerate(prompts) if decoding.room(len(prompt)) < 1), None)
    if full is not None:
        raise ValueError(f"prompt {full} has {len(prompts[full])} tokens, all that the model takes")
    wanted = [None] * len(prompts) if seeds is None else list(seeds)
    answers: dict[int, Generated] = {}
    device = model.get_input_embeddings().weight.device
    pad = decoding.pad_id
    with evaluation_mode(model), _own_generation_config(model, _greedy(decoding)) as config:
        for batch in _batches(prompts, batch_size, decoding, synced_gpus):
            rows = [prompts[number] for number in batch] or [[pad]]  # empty: keeps the other ranks company
            config.max_new_tokens = decoding.room(max(map(len, rows)))
            ids, mask = left_pad(rows, pad, device)
            draws = SeededDraws([wanted[number] for number in batch], decoding.temperature, decoding.top_p)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([draws]),
                synced_gpus=synced_gpus,
            )
            continuations = output[:, ids.shape[1] :].tolist()
            for number, tokens in zip(batch, continuations, strict=False):
                answers[number] = until_stop(tokens, decoding.stop_ids)
    return [answers[number] for number in range(len(prompts))]


def _batches(
    prompts: Sequence[Sequence[int]], size: int, decoding: Decoding, synced: bool
) -> list[list[int]]:
    """Numbers of the prompts by batch: neighbours in length whose answers have the same room.

    Similar lengths need less padding, and an answer does not depend on the prompts beside its own.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = []
    for _, alike in groupby(order, key=lambda number: decoding.room(len(prompts[number]))):
        numbers = list(alike)
        batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    if synced:
        most = int(distributed.reduce_max(torch.tensor(len(batches))))
        batches += [[] for _ in range(most - len(batches))]
    return batches


class SeededDraws(LogitsProcessor):
    """Turns the scores of seeded rows into a draw: all but the drawn token become −∞, so greedy takes it.

    One uniform number a token and row, from a generator of the row's own, is looked up in the cumulative
    distribution. Rows without a seed stay as they are.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float, top_p: float) -> None:
        self._rows = [row for row, seed in enumerate(seeds) if seed is not None]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds if seed is not None]
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Scores (R, V) of the next token."""
        if not self._rows:
            return scores
        probabilities = torch.softmax(scores[self._rows].double() / self._temperature, dim=-1)
        values, tokens = probabilities.sort(descending=True, stable=True)
        before = values.cumsum(-1) - values
        values = values.masked_fill(before >= self._top_p, 0.0)  # the most probable token always stays
        uniform = [torch.rand(1, generator=one, dtype=torch.float64) for one in self._generators]
        cumulative = values.cumsum(-1)
        threshold = torch.stack(uniform).to(scores.device) * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, threshold, right=True)
        # rounding at the very end must not choose a token of probability zero
        place = torch.minimum(place, (values > 0).sum(-1, keepdim=True) - 1)
        drawn = torch.full_like(scores[self._rows], -torch.inf).scatter(1, tokens.gather(1, place), 0.0)
        return scores.index_copy(0, torch.tensor(self._rows, device=scores.device), drawn)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each (R, L), with every row's last token in the last column."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> Generated:
    """The tokens before the first stop token, and that one."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return Generated(list(tokens[:position]), token)
    return Generated(list(tokens), None)


def repetition(tokens: Sequence[int], size: int = 4) -> float | None:
    """Share of an answer's `size`-grams that occurred in it before; None where it is shorter than one.

    0 says that nothing is repeated, near 1 that the answer runs in a circle.
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside (dropout off), each one's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _greedy(decoding: Decoding) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.pad_id,
    )


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """`generate` fills settings that are not given from the model's own; here it finds nothing else."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = before
