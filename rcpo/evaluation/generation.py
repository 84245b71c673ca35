"""Greedy answers of a causal language model, the same whatever the batch size and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rcpo import distributed


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    synced_gpus: bool = False,
) -> list[list[int]]:
    """The most probable continuation, token by token, of each prompt, without the stop token that ended it.

    Prompts are token ids (with BOS where the template has one). The model's own generation settings
    (temperature, penalties, forced tokens) are set aside; its training flags are restored afterwards. With
    `synced_gpus` (ZeRO-3, where every forward pass is a collective) all ranks call this together, with as
    many prompts as each has, and take the same number of passes. Raises ValueError for an empty prompt.
    """
    empty = next((number for number, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise ValueError(
            f"prompt {empty} has no tokens: nothing to continue (does the tokenizer have a BOS?)"
        )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    # Neighbours in length share a batch: less padding, less work.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = model.get_input_embeddings().weight.device
    if synced_gpus:
        most = int(distributed.reduce_max(torch.tensor(len(batches))))
        batches += [[] for _ in range(most - len(batches))]
    with evaluation_mode(model), _own_generation_config(model, config):
        for batch in batches:
            rows = [prompts[number] for number in batch] or [[pad_id]]  # empty: keeps the other ranks company
            ids, mask = left_pad(rows, pad_id, device)
            output = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced_gpus
            )
            continuations = output[:, ids.shape[1] :].tolist()
            for number, tokens in zip(batch, continuations, strict=False):
                answers[number] = until_stop(tokens, stop_ids)
    return answers


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each (R, L), with every row's last token in the last column."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((position for position, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:end])


def exact_match(
    prompts: Sequence[str], texts: Sequence[str], is_correct: Callable[[str, str], bool]
) -> NDArray[np.bool_]:
    """Which answers are correct, (B,), for `means_with_intervals` under the name `exact_match`."""
    return np.array(
        [is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)], dtype=np.bool_
    )


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


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills settings that are not given from the model's own; here it finds nothing else."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
