"""Held-out evaluation of a session: preferences of all pairs, greedy answers where they can be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rcpo import distributed
from rcpo.config import ConfigError, RunConfig
from rcpo.data.tokenise import PairTokeniser
from rcpo.evaluation.generation import exact_match, generate_greedy
from rcpo.evaluation.preference import (
    PreferenceScores,
    means_with_intervals,
    preference_metrics,
    write_examples,
)
from rcpo.evaluation.summary import describe, summary_table
from rcpo.models import model_path
from rcpo.objectives import Objective
from rcpo.session import Session
from rcpo.tracking.jsonl import write_json
from rcpo.types import PairLogps, TokenBatch


def evaluate(session: Session) -> dict[str, Any]:
    """The flat record of evaluation.json, equal on all ranks; rank 0 writes it and the per-example file.

    Empty where nothing is held out.
    """
    if session.datasets.evaluation is None:
        return {}
    session.engine.eval()
    scores = score_preferences(session)
    seed = session.config.seed
    record: dict[str, Any] = preference_metrics(scores, seed)
    answers = answer_prompts(session)
    if answers:
        correct = np.array([answer["correct"] for answer in answers.values()], dtype=np.float64)
        record |= means_with_intervals({"exact_match": correct}, seed)
    if distributed.is_main():
        write_json(session.run_dir / "evaluation.json", record)
        by_id = _answers_by_id(session, answers)
        write_examples(session.run_dir / "evaluation_examples.jsonl", scores, by_id)
    return record


def show(record: dict[str, Any]) -> None:
    """The record as a table and one plain sentence, on the main rank's terminal."""
    if record and distributed.is_main():
        console = Console()
        console.print(summary_table(record))
        console.print(describe(record))


def evaluate_run(config: RunConfig, run_dir: Path) -> int:
    """`rcpo evaluate`: a run's `final/` against its reference, or the configured model against another.

    Returns the exit code; raises ConfigError where the run has no final weights or nothing is held out.
    """
    final = run_dir / "final"
    if (run_dir / "metrics.jsonl").exists():
        if not (final / "config.json").is_file():
            raise ConfigError(f"run={run_dir} has no final/ yet; finish it with resume={run_dir}")
        config.reference.path = config.reference.path or model_path(config.model)
        config.model.name, config.model.path, config.model.init = "local", str(final), "pretrained"
    session = Session(config, run_dir, training=False)
    if session.datasets.evaluation is None:
        raise ConfigError("nothing is held out; set data.eval_path, or data.eval_fraction above 0")
    session.prepare_reference(print)
    show(evaluate(session))
    return 0


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


def answer_prompts(session: Session) -> dict[str, dict[str, Any]]:
    """Greedy `answer`s to held-out prompts and whether each is `correct`; empty where that cannot be checked.

    In the prompts' order, whatever the number of ranks.
    """
    datasets, config = session.datasets, session.config
    if datasets.checker is None or config.eval.generate_examples == 0:
        return {}
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
    found = {
        prompt: {"answer": text, "correct": bool(right)}
        for prompt, text, right in zip(own, texts, correct, strict=True)
    }
    everyone = {
        prompt: answer for part in distributed.gather_objects(found) for prompt, answer in part.items()
    }
    return {prompt: everyone[prompt] for prompt in prompts}


def _answers_by_id(session: Session, answers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Answers by example id: an example's answer is its prompt's."""
    dataset = session.datasets.evaluation
    if not answers or dataset is None:
        return {}
    prompts = session.tokenizer.batch_decode([item.prompt for item in dataset], skip_special_tokens=True)
    return {
        name: answers[prompt] for name, prompt in zip(dataset.ids, prompts, strict=True) if prompt in answers
    }
