"""What each answer is worth, by `score=…`."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from rcpo.config.onpolicy import VERIFIABLE, ScoreConfig
from rcpo.config.schema import EvalConfig, RunConfig
from rcpo.data import sums
from rcpo.data.records import BadRow
from rcpo.errors import ConfigError
from rcpo.evaluation.checkers import checker_of
from rcpo.evaluation.endpoint import Endpoint
from rcpo.models.contents import source_hash, tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.onpolicy.answers import Answer
from rcpo.onpolicy.kept import Kept, Row
from rcpo.onpolicy.progress import Progress
from rcpo.onpolicy.prompts import Prompt
from rcpo.onpolicy.ranks import make_rows, nothing_lacks, on_main_or_refused
from rcpo.onpolicy.ratings import compare, rate
from rcpo.onpolicy.scoring_models import Likelihood, RewardModel, ScoringModel
from rcpo.system.files import cache_folder

FOLDER = "scores"
Scores = dict[str, float]
"""By an answer's key; an answer that cannot be scored has none."""
Score = Callable[[Sequence[Answer]], Scores]


def prepare(
    config: RunConfig,
    score: ScoreConfig,
    prompts: Sequence[Prompt],
    policy: ModelSource,
    folder: Path,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> Score:
    """What scores answers; collective, and so is the call of what it returns.

    Raises ConfigError, before anything is sampled, where that could not be done.
    """
    if score.name in VERIFIABLE:
        return _verifiable(config, score, prompts)
    if score.name == "length":
        return lambda answers: {answer.key: float(len(answer.text)) for answer in answers}
    if score.name == "judge":
        endpoint = Endpoint(config.judge)
        on_main_or_refused(endpoint.check)
        ask = rate if score.mode == "rating" else compare

        def by_judge(answers: Sequence[Answer]) -> Scores:
            found: Scores = {}
            on_main_or_refused(
                lambda: found.update(ask(config.judge, endpoint, answers, folder / FOLDER, say, stop))
            )
            return found  # rank 0 alone pairs

        return by_judge
    reward = score.name == "reward_model"
    model: ScoringModel = RewardModel(config, score) if reward else Likelihood(config, score, policy)
    for prompt in {_roles(prompt): prompt for prompt in reversed(prompts)}.values():
        with suppress(BadRow):  # what no template takes is found now; whether it renders "-" does not matter
            model.ids(prompt, "-")
    memo = cache_folder(config.reference.cache)
    name = score_identity(config, score, policy, None if memo is None else memo / "hashes")
    return lambda answers: _by_model(model, score, name, answers, folder / FOLDER, stop)


def _roles(prompt: Prompt) -> tuple[str, ...]:
    """Who speaks in a prompt: templates refuse some orders, and system messages."""
    return () if isinstance(prompt.content, str) else tuple(one["role"] for one in prompt.content)


def _verifiable(config: RunConfig, score: ScoreConfig, prompts: Sequence[Prompt]) -> Score:
    lacking = [prompt.place for prompt in prompts if prompt.chosen is None]
    if lacking:
        raise ConfigError(
            f"score={score.name}: {lacking[0]} has no chosen response to compare with ({len(lacking)} of "
            f"{len(prompts)}); give data with right answers, or another score"
        )
    own = sums.answer_is_correct if config.data.name == "sums" else None
    kind = {"exact": None if own else "text"}.get(score.name, score.name)
    right = checker_of(EvalConfig(scorer=kind, answer_pattern=score.pattern), own)
    assert right is not None

    def check(answers: Sequence[Answer]) -> Scores:
        return {
            answer.key: float(right(answer.prompt.text, str(answer.prompt.chosen), answer.text))
            for answer in answers
        }

    return check


def score_identity(config: RunConfig, score: ScoreConfig, policy: ModelSource, memo: Path | None) -> str:
    """All that a model's scores depend on besides prompt and answer, as a hash."""
    source = policy if score.path is None else ModelSource(Path(score.path).expanduser())
    kept = {"name": score.name, "dtype": config.train.dtype}
    if source.base.is_dir():
        kept["weights"] = source_hash(source, config.seed, memo)
        kept["tokenizer"] = tokenizer_hash(source.tokenizer, memo)  # its chat template writes what is scored
    else:
        kept["weights"] = f"{score.path} {score.revision}"
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Item:
    key: str
    prompt: Prompt
    ids: list[int]


def _by_model(
    model: ScoringModel,
    score: ScoreConfig,
    identity: str,
    answers: Sequence[Answer],
    folder: Path,
    stop: Callable[[], bool],
) -> Scores:
    """Scores equal answers to a prompt once.

    Those that are longer than the model takes, and those that a template does not render, get no score.
    """
    keys = {answer.key: _key(identity, answer) for answer in answers}
    items = {}
    for one in answers:
        with suppress(BadRow):
            items[keys[one.key]] = _Item(keys[one.key], one.prompt, model.ids(one.prompt, one.text))
    fitting = [item for item in items.values() if model.limit is None or len(item.ids) <= model.limit]
    fitting.sort(key=lambda item: (len(item.ids), item.key))
    kept = Kept(folder)
    known = kept.read()
    if not nothing_lacks(kept, fitting):
        model.load()

        def compute(batch: Sequence[_Item]) -> list[Row]:
            values = model([item.prompt for item in batch], [item.ids for item in batch])
            return [
                {"key": item.key, "score": value, "tokens": len(item.ids)}
                for item, value in zip(batch, values, strict=True)
            ]

        progress = Progress("scores", folder, len(known) + sum(item.key not in known for item in fitting))
        make_rows(fitting, score.batch_size, kept, compute, progress, stop)
        model.release()
        gc.collect()
        torch.cuda.empty_cache()  # of no effect without a GPU
        known = kept.read()
    return {name: float(known[key]["score"]) for name, key in keys.items() if key in known}


def _key(identity: str, answer: Answer) -> str:
    content = json.dumps([identity, answer.prompt.text, answer.text])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
