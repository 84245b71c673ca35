"""Keys of `rcpo sample` and `rcpo iterate`: `sample.*`, `score.*`, `pairing.*`, `iterate.*`, `rounds`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rcpo.config.data import DataConfig
from rcpo.config.fields import Key, check_pattern, key
from rcpo.config.judge import COMPARED, RATED, EndpointConfig, check_endpoint, read_template
from rcpo.config.nodes import read_node
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError

NODES = ("sample", "score", "pairing", "iterate")
VERIFIABLE = ("exact", "number", "pattern")  # scores that say right or wrong, by the data's own response
MODELS = ("reward_model", "loglik")  # scores for which a model is loaded
FIRST, ROUND = "first", "round"


@dataclass(kw_only=True)
class SampleConfig(EndpointConfig):
    """How `rcpo sample` draws answers."""

    n: int = key(8, "answers per prompt", at_least=2)
    temperature: float = key(1.0, "sampling temperature", above=0)
    top_p: float = key(1.0, "share of the probability mass to draw from", above=0, at_most=1)
    max_new_tokens: int | None = key(
        None, "tokens of an answer; null: those of the longest chosen response, at most 512", at_least=1
    )
    prompts: int | None = key(None, "training prompts, in an order drawn by the seed; null: all", at_least=1)
    round: int = key(1, "which part of the prompts, and which draws", at_least=1)
    batch_size: int = key(64, "answers per process and forward pass", at_least=1)


@dataclass(kw_only=True)
class ScoreConfig:
    """How answers are scored."""

    name: str = key("exact", "scoring rule", choices=(*VERIFIABLE, *MODELS, "judge", "length"))
    pattern: str | None = key(None, "regular expression of score=pattern, whose first group is compared")
    mode: str | None = key(None, "what score=judge asks for", choices=("rating", "pairwise"))
    path: str | None = key(
        None,
        "model of reward_model or loglik: a folder or OWNER/NAME; null: the one that answered",
        path=True,
    )
    revision: str | None = key(None, "branch, tag, or commit of the hub")
    max_length: int | None = key(
        None, "tokens of prompt and answer, longer ones have no score; null: the model's limit", at_least=1
    )
    batch_size: int = key(16, "answers per process and forward pass", at_least=1)


@dataclass(kw_only=True)
class PairingConfig:
    """Which answers to a prompt become pairs."""

    name: str = key("best_worst", "pairing rule", choices=("best_worst", "random", "margin"))
    min_margin: float = key(0.0, "smallest difference of a pair's scores", at_least=0)
    per_prompt: int | None = key(1, "pairs per prompt; null: all", at_least=1)


@dataclass(kw_only=True)
class IterateConfig:
    """Rounds of sampling, training, and evaluation."""

    reference: str = key(
        ROUND, "reference of a round: the model that it starts from, or the first one", choices=(ROUND, FIRST)
    )


@dataclass(kw_only=True)
class OnPolicyConfig:
    """All settings beside a run's: what is sampled, scored, paired."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)


ROUNDS = Key(doc="rounds of rcpo iterate", at_least=1)


def onpolicy_config(cfg: DictConfig, run: RunConfig) -> OnPolicyConfig:
    """The validated nodes of a composed configuration; raises ConfigError with key, value, remedy."""
    config = OnPolicyConfig(
        sample=read_node(cfg, "sample", SampleConfig()),
        score=read_node(cfg, "score", ScoreConfig()),
        pairing=read_node(cfg, "pairing", PairingConfig()),
    )
    _check_sample(config.sample, run.data)
    _check_score(config.score, run)
    return config


def iterate_config(cfg: DictConfig) -> tuple[int, IterateConfig]:
    """`rounds` and the validated `iterate` node; raises ConfigError."""
    config = read_node(cfg, "iterate", IterateConfig())
    rounds = OmegaConf.select(cfg, "rounds", default=1)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise ConfigError(f"rounds={rounds} is not a whole number")
    ROUNDS.check("rounds", rounds)
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
    check_pattern("score.pattern", score.pattern)
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
