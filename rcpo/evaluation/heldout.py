"""Held-out evaluation of a session: preferences and dynamics of all pairs, answers that can be checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcpo.data.identity import example_id
from rcpo.data.records import VALUES
from rcpo.data.store import PairDataset
from rcpo.evaluation.answers import answer, decoding_of, text_of
from rcpo.evaluation.checkers import checker_of
from rcpo.evaluation.geometry import HeldOutDynamics
from rcpo.evaluation.kl import distinct_prompts, kl_columns
from rcpo.evaluation.lengths import PREFIX, by_length
from rcpo.evaluation.preference import (
    PreferenceScores,
    means_with_intervals,
    preference_metrics,
    write_examples,
)
from rcpo.runs.folder import EVALUATION, EVALUATION_FILE, EXAMPLES_FILE, read_record
from rcpo.runs.inputs import EVALUATION_SETTINGS, PAIRS, write_evaluation_settings
from rcpo.runs.jsonl import write_json
from rcpo.system import distributed
from rcpo.training.forward import PairOutput
from rcpo.training.session import Session

MERGED = ("eval/harness/", "eval/judge/")  # other tools' keys in evaluation.json


def evaluate(
    session: Session, *, examples: str = EXAMPLES_FILE, parameters_geometry: bool = False
) -> dict[str, Any]:
    """The flat record of evaluation.json, equal on all ranks; rank 0 writes the file of single examples.

    Empty where nothing is held out. Collective.
    """
    dataset = session.datasets.evaluation
    if dataset is None:
        return {}
    session.engine.eval()
    dynamics = HeldOutDynamics(session, by_parameters=parameters_geometry)
    scores = score_preferences(session, dataset, dynamics)
    seed = session.config.seed
    record: dict[str, Any] = preference_metrics(scores, seed)
    answers = answer_prompts(session, dataset)
    if answers:
        correct = np.array([answer["correct"] for answer in answers.values()], dtype=np.float64)
        record |= means_with_intervals({"exact_match": correct}, seed)
    if session.config.eval.kl_examples and session.scores_any_tokens:
        columns = kl_columns(session, dataset, session.config.eval.kl_examples)
        record |= means_with_intervals(columns, seed)
    record |= dynamics.metrics() | by_length(scores)
    if distributed.is_main():
        by_id = _answers_by_id(session, dataset, answers)
        write_examples(session.run_dir / EVALUATION / examples, scores, by_id)
    return record


def evaluate_in_training(session: Session) -> dict[str, Any]:
    """`evaluate` of a policy in training; rank 0 writes evaluation.json anew.

    Of a trained run, whose weights stay, the file keeps what other tools measured. Returns what belongs in a
    row of metrics.jsonl: all but the figures by length.
    """
    record = evaluate(session)
    if record and distributed.is_main():
        if session.training:
            (session.run_dir / EVALUATION_SETTINGS).unlink(missing_ok=True)  # of an evaluation before
            write_json(session.run_dir / EVALUATION_FILE, record)
        else:
            merge_record(session.run_dir, record, kept=MERGED)
            write_evaluation_settings(session.run_dir, session.config, PAIRS)
    return {name: value for name, value in record.items() if not name.startswith(PREFIX)}


def merge_record(
    run_dir: Path, record: Mapping[str, Any], *, kept: Iterable[str], renewed: str | None = None
) -> None:
    """Write evaluation.json: `record`, and of what it held before the keys that begin with any of `kept`.

    Those that begin with `renewed` are the record's alone.
    """
    path = run_dir / EVALUATION_FILE
    before = read_record(path, "remove it, or evaluate into another folder") or {}
    prefixes = tuple(kept)
    rest = {
        key: value
        for key, value in before.items()
        if key.startswith(prefixes) and not (renewed is not None and key.startswith(renewed))
    }
    write_json(path, {**rest, **record})


def score_preferences(session: Session, dataset: PairDataset, dynamics: HeldOutDynamics) -> PreferenceScores:
    """All held-out pairs' scores, gathered from all ranks; `dynamics` sees each batch."""
    parts = []
    for batch in session.eval_batches(dataset, session.config.eval.max_examples):
        with dynamics.forward_mode():
            output = session.heldout(batch, dynamics.sketch)
        incentives = dynamics.observe(output)
        if output.count:
            parts.append(_columns(session, dataset, output, incentives))
    gathered = [part for rank in distributed.gather_objects(parts) for part in rank]
    return PreferenceScores.gather(gathered)


def _columns(
    session: Session,
    dataset: PairDataset,
    output: PairOutput,
    incentives: tuple[torch.Tensor, torch.Tensor] | None,
) -> PreferenceScores:
    objective, tracked = session.objective, session.tracked_positions
    batch, pairs = output.batch, output.pairs
    real = (batch.on_host.weights > 0).tolist()
    indices = batch.on_host.indices[batch.on_host.weights > 0].numpy()
    chosen, rejected = objective.rewards(pairs)
    token_logps, token_logratios = output.token_means()

    def array(values: torch.Tensor | None) -> Any:
        return None if values is None else values.detach().double().cpu().numpy()

    return PreferenceScores(
        example_ids=[example_id(dataset[index]) for index in indices.tolist()],
        sources=[name for name, keep in zip(batch.example_ids, real, strict=True) if keep],
        indices=indices,
        chosen_logps=array(pairs.chosen),
        chosen_rewards=array(chosen),
        chosen_lengths=_lengths(pairs.chosen_lengths),
        rejected_logps=array(pairs.rejected),
        rejected_rewards=array(rejected),
        rejected_lengths=_lengths(pairs.rejected_lengths),
        chosen_logratios=None if pairs.ref_chosen is None else array(pairs.chosen_logratios),
        rejected_logratios=None if pairs.ref_rejected is None else array(pairs.rejected_logratios),
        chosen_token_logps=array(token_logps[0]),
        chosen_token_logratios=None if token_logratios is None else array(token_logratios[0]),
        rejected_token_logratios=(
            None if token_logratios is None or pairs.rejected is None else array(token_logratios[1])
        ),
        losses=array(objective(pairs)) if objective.has_pair_losses else None,
        chosen_incentives=None if incentives is None else array(incentives[0]),
        rejected_incentives=None if incentives is None else array(incentives[1]),
        prompts=dataset.prompts[indices],
        tracked=None if tracked is None else np.isin(indices, sorted(tracked)),
        **_given(dataset, indices),
    )


def _given(dataset: PairDataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The rows' own numbers, of those that any row of the dataset gives."""
    there = ~np.isnan(dataset.values).all(axis=0)
    return {name: dataset.values[indices, place] for place, name in enumerate(VALUES) if there[place]}


def _lengths(lengths: torch.Tensor | None) -> Any:
    return None if lengths is None else lengths.cpu().numpy()


def answer_prompts(session: Session, dataset: PairDataset) -> dict[str, dict[str, Any]]:
    """Greedy `answer`s to held-out prompts and whether each is `correct`, by prompt, in the prompts' order.

    Empty where nothing can tell right from wrong. An answer is compared with its prompt's first chosen one.
    """
    config = session.config.eval
    check = checker_of(config, session.datasets.checker)
    if check is None or config.generate_examples == 0:
        return {}
    chosen = {tuple(example.prompt): example.chosen for example in reversed(dataset) if example.chosen}
    prompts = distinct_prompts(dataset, config.generate_examples)
    prompts = [prompt for prompt in prompts if tuple(prompt) in chosen]
    answers = answer(session, prompts, decoding_of(session, dataset), [None] * len(prompts))
    texts = zip(
        text_of(session, prompts),
        text_of(session, [chosen[tuple(prompt)] for prompt in prompts]),
        text_of(session, [found.tokens for found in answers]),
        strict=True,
    )
    return {prompt: {"answer": text, "correct": check(prompt, right, text)} for prompt, right, text in texts}


def _answers_by_id(
    session: Session, dataset: PairDataset, answers: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Answers by example id: an example's answer is its prompt's."""
    if not answers:
        return {}
    prompts = text_of(session, [item.prompt for item in dataset])
    return {
        example_id(item): answers[prompt]
        for item, prompt in zip(dataset, prompts, strict=True)
        if prompt in answers
    }
