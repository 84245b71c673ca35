"""What a run computes: steps, tokens, shapes of micro-batches; counted in the data, or from given means.

Axes: R rows, L row length, N response tokens, as in `trace.Rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rcpo.config.schema import RunConfig
from rcpo.data.batches import GlobalBatches, by_length, pack, row_lengths, split
from rcpo.data.dataset import load_datasets
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.method.objectives import Objective
from rcpo.models.hub import own_folder
from rcpo.models.loading import load_tokenizer, model_folder
from rcpo.planner.settings import PlanConfig
from rcpo.planner.trace import BatchShape
from rcpo.training.objective import scored_sides


@dataclass(frozen=True)
class Workload:
    """A run's steps and the micro-batches of its ranks.

    `largest` decides its memory and `usual` its time; `scored` is the largest batch of a reference's or an
    evaluation's pass. `tokens` are those that a step's rows have, padding included, over all ranks; `source`
    says where the numbers are from.
    """

    pairs: int | None
    steps: int
    microbatches: int
    tokens: int
    largest: BatchShape
    usual: BatchShape
    scored: BatchShape
    source: str

    @property
    def total_tokens(self) -> int:
        return self.steps * self.tokens


def workload(
    config: RunConfig,
    settings: PlanConfig,
    objective: Objective,
    layout: str,
    ranks: int,
    data: Callable[[], PairDataset],
) -> Workload:
    """Counts in the `data`, unless `settings` say enough; raises ConfigError where neither can be."""
    given = (settings.prompt_tokens, settings.response_tokens)
    if None not in given:
        return _from_means(config, settings, len(objective.sides), layout, ranks)
    if any(value is not None for value in given):
        raise ConfigError("plan.prompt_tokens and plan.response_tokens go together: give both, or none")
    return _from_data(config, objective, data(), layout, ranks)


def training_data(config: RunConfig, settings: PlanConfig) -> PairDataset:
    """The run's pairs as tokens; raises ConfigError where there is no tokenizer."""
    path = config.model.path
    if settings.architecture is not None or (path is not None and own_folder(path) is None):
        raise ConfigError(
            "the tokens of data cannot be counted without the model's tokenizer, which is not a folder here; "
            "give plan.pairs=N plan.prompt_tokens=N plan.response_tokens=N, or model.path=DIR"
        )
    tokenizer = load_tokenizer(model_folder(config.model), config.model)
    return load_datasets(config.data, tokenizer, config.seed, lambda _: None).train


def _steps(config: RunConfig, pairs: int | None) -> int:
    if config.train.max_steps is not None:
        return config.train.max_steps
    if pairs is None:
        raise ConfigError("the steps follow from the pairs: give plan.pairs=N or train.max_steps=N")
    return config.train.epochs * math.ceil(pairs / config.train.batch_size)


def _from_means(config: RunConfig, settings: PlanConfig, sides: int, layout: str, ranks: int) -> Workload:
    """Every pair of the mean lengths; the largest micro-batch has the longest that the limits let through."""
    assert settings.prompt_tokens is not None and settings.response_tokens is not None
    prompt, response = settings.prompt_tokens, settings.response_tokens
    both, data = "prompt_tokens + plan.response_tokens", config.data
    _refuse_longer("prompt_tokens", prompt, "max_prompt_length", data.max_prompt_length)
    _refuse_longer(both, prompt + response, "max_length", data.max_length)
    usual = _alike(config.train.microbatch(ranks), prompt, response, sides, layout)
    longest, limits = (prompt, response), config.data
    if limits.max_length is not None:
        start = min(limits.max_prompt_length or prompt, limits.max_length - 1)
        longest = (start, limits.max_length - start)
    microbatches = config.train.accumulation(ranks)
    return Workload(
        settings.pairs,
        _steps(config, settings.pairs),
        microbatches,
        ranks * microbatches * usual.rows * usual.length,
        _alike(config.train.microbatch(ranks), *longest, sides, layout),
        usual,
        _alike(config.eval.batch_size, *longest, max(sides, 2), layout),
        f"{prompt} tokens a prompt, {response} a response, as given",
    )


def _refuse_longer(name: str, mean: int, key: str, limit: int | None) -> None:
    """Raise ConfigError for a mean that no row has, as all are cut before."""
    if limit is not None and mean > limit:
        raise ConfigError(
            f"plan.{name}={mean} is longer than data.{key}={limit}, to which rows are cut: give less"
        )


def _alike(pairs: int, prompt: int, response: int, sides: int, layout: str) -> BatchShape:
    if layout == "shared":
        return BatchShape(pairs, prompt + sides * response, pairs * sides * response, True)
    return BatchShape(pairs * sides, prompt + response, pairs * sides * response, False)


def _from_data(
    config: RunConfig, objective: Objective, data: PairDataset, layout: str, ranks: int
) -> Workload:
    batches = GlobalBatches(len(data), config.train.batch_size, config.seed)
    steps = _steps(config, len(data))
    seen = min(steps, batches.steps_per_epoch)
    shapes = list(_microbatches(config, objective, data, batches, seen, layout, ranks))
    sizes = np.array([shape.rows * shape.length for shape in shapes])
    mean = int(np.abs(sizes - sizes.mean()).argmin())
    sides = scored_sides(objective, data)
    lengths = row_lengths(data.lengths[:, 0], data.response_lengths(sides), layout)
    longest = np.argsort(-lengths, kind="stable")[: config.eval.batch_size]
    return Workload(
        len(data),
        steps,
        config.train.accumulation(ranks),
        round(sizes.sum() / seen),
        shapes[int(sizes.argmax())],
        shapes[mean],
        _shape(data, longest.tolist(), sides, layout),
        f"{len(data):,} pairs of data={config.data.name}, counted{_unscored(config)}",
    )


def _unscored(config: RunConfig) -> str:
    """What the plan cannot know without the model."""
    return "" if config.data.ches_max is None else " before data.ches_max"


def _microbatches(
    config: RunConfig, objective: Objective, data: PairDataset, batches: GlobalBatches, steps: int,
    layout: str, ranks: int,
) -> Iterator[BatchShape]:  # fmt: skip
    """The micro-batches of all ranks in the first `steps`, as a session deals them."""
    size, sides = config.train.microbatch(ranks), objective.sides
    lengths = row_lengths(data.lengths[:, 0], data.response_lengths(sides), layout)
    for step in range(steps):
        indices = batches.indices(step)
        if config.groups_by_length(objective.spec.couples_batch):
            indices = by_length(indices, lengths[indices], ranks, size, packed=layout == "shared")
        for rank in range(ranks):
            for piece in split(indices, rank, ranks, size):
                yield _shape(data, piece, sides, layout)


def _shape(data: PairDataset, positions: list[int], sides: tuple[str, ...], layout: str) -> BatchShape:
    places = np.array([data.shortest if position < 0 else position for position in positions])
    prompts, responses = data.lengths[places, 0], data.response_lengths(sides)[places]
    tokens = int(responses.sum())
    if layout == "separate":
        return BatchShape(len(places) * len(sides), int((prompts[:, None] + responses).max()), tokens, False)
    totals = prompts + responses.sum(axis=1)
    longest = int(totals.max())
    return BatchShape(max(pack(totals, longest)[0]) + 1, longest, tokens, True)
