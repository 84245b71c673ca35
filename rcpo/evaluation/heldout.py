"""Held-out evaluation of a session: preferences of all pairs, greedy answers where they can be checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rcpo import distributed
from rcpo.data.tokenise import PairTokeniser
from rcpo.evaluation.generation import exact_match, generate_greedy
from rcpo.evaluation.preference import (
    PreferenceScores,
    means_with_intervals,
    preference_metrics,
    write_examples,
)
from rcpo.objectives import Objective
from rcpo.session import Session
from rcpo.types import PairLogps, TokenBatch


def evaluate(session: Session) -> dict[str, Any]:
    """The flat record of evaluation.json, equal on all ranks; rank 0 writes the per-example file.

    Empty where nothing is held out.
    """
    if session.datasets.evaluation is None:
        return {}
    session.engine.eval()
    scores = score_preferences(session)
    seed = session.config.seed
    record: dict[str, Any] = preference_metrics(scores, seed)
    correct = answer_prompts(session)
    if correct is not None:
        record |= means_with_intervals({"exact_match": correct}, seed)
    if distributed.is_main():
        write_examples(session.run_dir / "evaluation_examples.jsonl", scores)
    return record


def score_preferences(session: Session) -> PreferenceScores:
    """All held-out pairs' scores, gathered from all ranks."""
    dataset = session.datasets.evaluation
    assert dataset is not None
    parts = []
    with torch.no_grad():
        for batch in session.eval_batches(dataset, session.config.eval.max_examples):
            scored = session.heldout(batch)
            if scored.count:
                parts.append(_columns(session.objective, batch, scored.pairs))
    gathered = [part for rank in distributed.gather_objects(parts) for part in rank]
    return PreferenceScores.gather(gathered)


def _columns(objective: Objective, batch: TokenBatch, pairs: PairLogps) -> PreferenceScores:
    real = (batch.weights > 0).tolist()
    chosen, rejected = objective.rewards(pairs)
    per_pair = not (objective.spec.couples_batch or objective.spec.token_weighted)

    def array(values: torch.Tensor | None) -> Any:
        return None if values is None else values.double().cpu().numpy()

    return PreferenceScores(
        example_ids=[name for name, keep in zip(batch.example_ids, real, strict=True) if keep],
        indices=batch.indices[batch.weights > 0].cpu().numpy(),
        chosen_logps=array(pairs.chosen),
        chosen_rewards=array(chosen),
        chosen_lengths=_lengths(pairs.chosen_lengths),
        rejected_logps=array(pairs.rejected),
        rejected_rewards=array(rejected),
        rejected_lengths=_lengths(pairs.rejected_lengths),
        chosen_logratios=None if pairs.ref_chosen is None else array(pairs.chosen_logratios),
        rejected_logratios=None if pairs.ref_rejected is None else array(pairs.rejected_logratios),
        losses=array(objective(pairs)) if per_pair else None,
    )


def _lengths(lengths: torch.Tensor | None) -> Any:
    return None if lengths is None else lengths.cpu().numpy()


def answer_prompts(session: Session) -> np.ndarray | None:
    """Which greedy answers to held-out prompts are correct, (P,); None where answers cannot be checked."""
    datasets, config = session.datasets, session.config
    if datasets.checker is None or config.eval.generate_examples == 0:
        return None
    prompts = datasets.prompts[: config.eval.generate_examples]
    own = prompts[distributed.rank() :: distributed.world_size()]
    tokenizer = session.tokenizer
    assert isinstance(tokenizer.eos_token_id, int) and isinstance(tokenizer.pad_token_id, int)
    answers = generate_greedy(
        session.engine.policy.model,
        PairTokeniser(tokenizer).prompts(own),
        max_new_tokens=config.eval.max_new_tokens,
        stop_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        batch_size=config.eval.batch_size,
        synced_gpus=config.engine.stage == 3,
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    correct = exact_match(own, texts, datasets.checker)
    return np.concatenate(distributed.gather_objects(correct)).astype(np.float64)
