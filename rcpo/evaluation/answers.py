"""A session's answers to prompts and the log-probs of answers, shared out over the ranks.

Axes: N tokens of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from rcpo.data.batches import FILLER, split
from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.evaluation.generation import Decoding, Generated, generate
from rcpo.reference.rows import Reference
from rcpo.system import distributed
from rcpo.training.limits import position_limit
from rcpo.training.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS = 512  # of an answer, where eval.max_new_tokens leaves it open


def decoding_of(session: Session, dataset: PairDataset) -> Decoding:
    """How this session's answers to a dataset's prompts are made and where they end."""
    pad = session.tokenizer.pad_token_id
    assert isinstance(pad, int)
    return Decoding(
        max_new_tokens=session.config.eval.max_new_tokens or longest_answer(dataset),
        stop_ids=stop_ids(session.tokenizer, session.engine.policy.model, dataset),
        pad_id=pad,
        positions=_positions(session),
    )


def _positions(session: Session) -> int | None:
    """How many tokens both the policy and its reference take, which score the answers too."""
    engines = [session.engine, *([session.held_reference] if session.held_reference else [])]
    limits = [positions_of(engine.policy.model, []) for engine in engines]
    return min((limit for limit in limits if limit is not None), default=None)


def positions_of(model: PreTrainedModel, prompts: Sequence[tuple[str, list[int]]]) -> int | None:
    """How many tokens a model takes, a prompt and its answer together; None is any number.

    Raises ConfigError where one of some `prompts`, each with its place, leaves no room for an answer.
    """
    limit = position_limit(model.config)
    if limit is None:
        return None
    for place, tokens in prompts:
        if len(tokens) >= limit.tokens:
            raise ConfigError(
                f"{place}: the prompt has {len(tokens):,} tokens, and the model takes {limit.tokens:,} with "
                "its answer; lower data.max_prompt_length, or leave the prompt out"
            )
    return limit.tokens


def longest_answer(dataset: PairDataset) -> int:
    """Tokens of the longest chosen response, or of the longest at all where none is chosen, as far as 512."""
    longest = int(dataset.lengths[:, 1].max()) or int(dataset.lengths[:, 2].max())
    return min(longest, MOST_TOKENS)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, dataset: PairDataset
) -> tuple[int, ...]:
    """Tokens that end an answer: the model's own, and a template's as far as the dataset shows it."""
    return tuple(sorted({*own_stop_ids(tokenizer, model), *turn_ends(tokenizer, dataset)}))


def own_stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """The tokenizer's end of a sequence, and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return {number for number in found if isinstance(number, int)}


def turn_ends(tokenizer: PreTrainedTokenizerBase, dataset: PairDataset) -> set[int]:
    """The special token that most of the dataset's chosen responses end with, if there is one."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = Counter((example.chosen or example.rejected)[-1] for example in dataset[:256])
    token, count = ends.most_common(1)[0]
    return {token} if token in special and 2 * count > ends.total() else set()


def answer(
    session: Session, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int | None]
) -> list[Generated]:
    """The policy's answers, all of them on every rank. Collective."""
    ranks, rank = distributed.world_size(), distributed.rank()
    own = generate(
        session.engine.policy.model,
        prompts[rank::ranks],
        decoding,
        batch_size=session.config.eval.batch_size,
        seeds=seeds[rank::ranks],
        synced_gpus=session.config.engine.stage == 3,
    )
    parts = distributed.gather_objects(own)
    return [parts[number % ranks][number // ranks] for number in range(len(prompts))]


def answer_logps(
    session: Session, pairs: Sequence[tuple[list[int], list[int]]], score: Reference
) -> list[np.ndarray]:
    """log p of each token (N,) of each answer after its prompt, all of them on every rank. Collective.

    `score` gives a batch's token log-probs: the policy's or the reference's.
    """
    if not pairs:
        return []
    pad = session.tokenizer.pad_token_id
    assert isinstance(pad, int)
    examples = [Example("", prompt, tokens, []) for prompt, tokens in pairs]
    longest_first = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0] + pairs[number][1]))
    shares = split(
        longest_first, distributed.rank(), distributed.world_size(), session.config.eval.batch_size
    )
    found: dict[int, np.ndarray] = {}
    for numbers in shares:
        kept = [examples[max(number, 0)] for number in numbers]
        batch = collate(kept, pad, sides=("chosen",), indices=numbers).to(session.engine.device)
        with torch.no_grad():
            logps = score(batch).double().cpu().numpy()
        ends = np.cumsum(batch.lengths.cpu().numpy())
        for number, end, piece in zip(numbers, ends, kept, strict=True):
            if number != FILLER:
                found[number] = logps[end - len(piece.chosen) : end]
    everyone = {
        number: values for part in distributed.gather_objects(found) for number, values in part.items()
    }
    return [everyone[number] for number in range(len(pairs))]


def policy_logps(session: Session) -> Reference:
    """The policy's token log-probs of a batch."""
    return lambda batch: session.engine.forward(batch)[0].detach()


def text_of(session: Session, tokens: Sequence[list[int]]) -> list[str]:
    """Tokens as text, without special ones."""
    return list(session.tokenizer.batch_decode(tokens, skip_special_tokens=True))
