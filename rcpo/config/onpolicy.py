"""Keys of `rcpo sample` and `rcpo iterate`: `sample.*`, `score.*`, `pairing.*`, `iterate.*`, `rounds`."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rcpo.config.data import DataConfig
from rcpo.config.judge import COMPARED, RATED, EndpointConfig, check_endpoint, read_template
from rcpo.config.nodes import check_node, read_node
from rcpo.config.schema import RunConfig
from rcpo.config.validation import Range, check_range
from rcpo.errors import ConfigError

NODES = ("sample", "score", "pairing", "iterate")
VERIFIABLE = ("exact", "number", "pattern")  # scores that say right or wrong, by the data's own response
MODELS = ("reward_model", "loglik")  # scores for which a model is loaded
FIRST, ROUND = "first", "round"


@dataclass(kw_only=True)
class SampleConfig(EndpointConfig):
    """`n` answers to a prompt, drawn at `temperature` within `top_p` (`sample.*`).

    `base_url` None answers on this machine, `batch_size` answers at a time. `prompts` None are all of the
    data; else so many, in an order that the seed draws, and `round` counts which of them. `max_new_tokens`
    None is the longest chosen response's.
    """

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    prompts: int | None = None
    round: int = 1
    batch_size: int = 64


@dataclass(kw_only=True)
class ScoreConfig:
    """What an answer is worth (`score.*`), by `name`.

    `pattern` is of score=pattern, `mode` of score=judge: rating or pairwise. `path` is the model of
    score=reward_model, of score=loglik with None for the model that answered; `revision`, `max_length` (None:
    as many tokens as it takes) and `batch_size` belong to it.
    """

    name: str = "exact"
    pattern: str | None = None
    mode: str | None = None
    path: str | None = None
    revision: str | None = None
    max_length: int | None = None
    batch_size: int = 16


@dataclass(kw_only=True)
class PairingConfig:
    """Which answers to a prompt become pairs (`pairing.*`): `per_prompt` of them, in the order of `name`.

    The scores of a pair differ, and by no less than `min_margin`.
    """

    name: str = "best_worst"
    min_margin: float = 0.0
    per_prompt: int | None = 1


@dataclass(kw_only=True)
class IterateConfig:
    """`reference` of each round's training: the model that the `round` starts from, or the `first` one."""

    reference: str = ROUND


@dataclass(kw_only=True)
class OnPolicyConfig:
    """All settings beside a run's: what is sampled, scored, paired."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)


CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "sample": {},
    "score": {"name": (*VERIFIABLE, *MODELS, "judge", "length"), "mode": ("rating", "pairwise")},
    "pairing": {"name": ("best_worst", "random", "margin")},
    "iterate": {"reference": (ROUND, FIRST)},
}
ENDPOINT_RANGES: dict[str, Range] = {
    "concurrency": (1, 256, True, True),
    "timeout": (0, math.inf, False, False),
    "retries": (0, 100, True, True),
    "backoff": (0, 600, True, True),
    "price_in": (0, math.inf, True, False),
    "price_out": (0, math.inf, True, False),
}
ONPOLICY_RANGES: dict[str, dict[str, Range]] = {
    "sample": {
        "n": (2, math.inf, True, False),
        "temperature": (0, math.inf, False, False),
        "top_p": (0, 1, False, True),
        "max_new_tokens": (1, math.inf, True, False),
        "prompts": (1, math.inf, True, False),
        "round": (1, math.inf, True, False),
        "batch_size": (1, math.inf, True, False),
        **ENDPOINT_RANGES,
    },
    "score": {"max_length": (1, math.inf, True, False), "batch_size": (1, math.inf, True, False)},
    "pairing": {"min_margin": (0, math.inf, True, False), "per_prompt": (1, math.inf, True, False)},
    "iterate": {},
}
ROUNDS: Range = (1, math.inf, True, False)


def onpolicy_config(cfg: DictConfig, run: RunConfig) -> OnPolicyConfig:
    """The validated nodes of a composed configuration; raises ConfigError with key, value, remedy."""
    config = OnPolicyConfig(
        sample=read_node(cfg, "sample", SampleConfig()),
        score=read_node(cfg, "score", ScoreConfig()),
        pairing=read_node(cfg, "pairing", PairingConfig()),
    )
    for name in ("sample", "score", "pairing"):
        check_node(name, getattr(config, name), CHOICES[name], ONPOLICY_RANGES[name])
    _check_sample(config.sample, run.data)
    _check_score(config.score, run)
    return config


def iterate_config(cfg: DictConfig) -> tuple[int, IterateConfig]:
    """`rounds` and the validated `iterate` node; raises ConfigError."""
    config = read_node(cfg, "iterate", IterateConfig())
    check_node("iterate", config, CHOICES["iterate"], ONPOLICY_RANGES["iterate"])
    rounds = OmegaConf.select(cfg, "rounds", default=1)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise ConfigError(f"rounds={rounds} is not a whole number")
    check_range("rounds", rounds, ROUNDS)
    return rounds, config


def as_tree(config: OnPolicyConfig) -> dict[str, Any]:
    """The nodes as plain dictionaries."""
    return dataclasses.asdict(config)


def _check_sample(sample: SampleConfig, data: DataConfig) -> None:
    check_endpoint("sample", sample)
    if (sample.base_url is None) != (sample.model is None):
        raise ConfigError(
            f"sample.base_url={sample.base_url} and sample.model={sample.model}: an endpoint needs both; "
            "without them the model of this run answers"
        )


def _check_score(score: ScoreConfig, run: RunConfig) -> None:
    if (score.name == "pattern") != (score.pattern is not None):
        raise ConfigError(
            f"score={score.name} and score.pattern={score.pattern}: score=pattern goes with a regular "
            "expression, whose first group is the answer"
        )
    try:
        re.compile(score.pattern or "")
    except re.error as error:
        raise ConfigError(f"score.pattern={score.pattern} is not a regular expression: {error}") from error
    if score.name == "reward_model" and score.path is None:
        raise ConfigError(
            "score=reward_model needs a model: score.path=DIR, or score.path=OWNER/NAME on the hub"
        )
    if score.name == "judge":
        for key in ("base_url", "model"):
            if getattr(run.judge, key) is None:
                raise ConfigError(f"score=judge needs an OpenAI-compatible endpoint: judge.{key}=")
        if run.judge.template is not None:
            read_template(run.judge.template, RATED if score.mode == "rating" else COMPARED)
