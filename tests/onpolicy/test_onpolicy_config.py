"""Keys of `rcpo sample` and `rcpo iterate`: defaults, and refusals with key, value and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from rcpo.config.composition import PRIMARY, compose_with, hydra_session, user_part
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.onpolicy import (
    IterateConfig,
    OnPolicyConfig,
    PairingConfig,
    SampleConfig,
    ScoreConfig,
    iterate_config,
    onpolicy_config,
)
from rcpo.config.parsing import parse
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.onpolicy.settings import Settings


@pytest.fixture(scope="module")
def hydra() -> Iterator[Any]:
    with hydra_session() as session:
        yield session


def composed(hydra: Any, *overrides: str) -> tuple[DictConfig, RunConfig]:
    cfg = compose_with(hydra, PRIMARY, list(overrides))
    return cfg, parse(user_part(cfg))


def test_the_defaults_of_conf_are_those_of_the_dataclasses(hydra: Any) -> None:
    cfg, run = composed(hydra)
    assert onpolicy_config(cfg, run) == OnPolicyConfig(sample=SampleConfig(prompts=1024, batch_size=512))
    assert iterate_config(cfg) == (3, IterateConfig())
    data = ["data=pairs", f"data.path={__file__}"]  # sums alone knows how many of its prompts are enough
    cfg, run = composed(hydra, *data)
    assert onpolicy_config(cfg, run).sample == SampleConfig()
    for name in ("length", "number"):
        cfg, run = composed(hydra, f"score={name}")
        assert onpolicy_config(cfg, run).score == ScoreConfig(name=name)
    cfg, run = composed(hydra, "score=loglik", "pairing=margin", "pairing.min_margin=0.5", "rounds=1")
    config = onpolicy_config(cfg, run)
    assert config.score == ScoreConfig(name="loglik")
    assert config.pairing == PairingConfig(name="margin", min_margin=0.5)
    assert iterate_config(cfg)[0] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample.n=1"], "sample.n=1 is out of range"),
        (["sample.top_p=0"], "sample.top_p=0 is out of range"),
        (["sample.temperature=0"], "sample.temperature=0 is out of range"),
        (["sample.base_url=http://127.0.0.1:1/v1"], "an endpoint needs both"),
        (["sample.base_url=127.0.0.1", "sample.model=m"], "sample.base_url is not an http or https address"),
        (["sample.api_key_env=sk-secret"], "sample.api_key_env is not the name of an environment variable"),
        (["score=reward_model"], "score=reward_model needs a model: score.path=DIR"),
        (["score=pattern"], "score=pattern goes with a regular"),
        (["score=pattern", "score.pattern='('"], "is not a regular expression"),
        (["score=judge"], "judge.base_url="),
        (["score=judge", "score.mode=stars"], "score.mode=stars is not one of rating, pairwise"),
        (["pairing.min_margin=-1"], "pairing.min_margin=-1 is out of range"),
        (["pairing.per_prompt=0"], "pairing.per_prompt=0 is out of range"),
    ],
)
def test_what_no_sampling_could_use(hydra: Any, overrides: list[str], message: str) -> None:
    cfg, run = composed(hydra, *overrides)
    with pytest.raises(ConfigError) as refused:
        onpolicy_config(cfg, run)
    assert message in str(refused.value) and "sk-secret" not in str(refused.value)


def test_a_template_of_the_judge_has_what_its_mode_fills_in(hydra: Any, tmp_path: Path) -> None:
    template = tmp_path / "mine.txt"
    template.write_text("{instruction} {answer}")
    words = [
        "score=judge",
        "judge.base_url=http://127.0.0.1:1/v1",
        "judge.model=m",
        f"judge.template={template}",
    ]
    cfg, run = composed(hydra, *words)
    assert onpolicy_config(cfg, run).score == ScoreConfig(name="judge", mode="rating")
    cfg, run = composed(hydra, *words, "score.mode=pairwise")
    with pytest.raises(ConfigError, match=r"lacks \{first\}, \{second\}"):
        onpolicy_config(cfg, run)


@pytest.mark.parametrize("override", ["rounds=0", "rounds=two", "rounds=true", "iterate.reference=last"])
def test_what_no_iteration_could_use(hydra: Any, override: str) -> None:
    cfg, _ = composed(hydra, override)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        iterate_config(cfg)


@pytest.mark.parametrize(
    "override", ["sample.n=4", "score=length", "pairing=random", "rounds=2", "iterate.reference=first"]
)
def test_other_commands_refuse_these_keys(override: str) -> None:
    with pytest.raises(ConfigError, match=r"is read by rcpo (sample and rcpo )?iterate alone"):
        refuse_command_keys([override], ("sweep",))


def test_rounds_have_settings_of_their_own_which_the_command_line_overrides(hydra: Any) -> None:
    own = parse(user_part(compose_with(hydra, "rounds", [])))
    assert own.train.max_steps is None and own.eval.generate_examples is None
    assert (own.objective.name, own.optim.lr) == ("cpo", 1e-5)
    given = parse(user_part(compose_with(hydra, "rounds", ["objective=simpo", "optim.lr=1e-6", "rc=on"])))
    assert (given.objective.name, given.optim.lr, given.rc.enabled) == ("simpo", 1e-6, True)


def test_a_refused_call_leaves_the_settings_of_the_answers_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcpo.commands import sample as command

    words = ["sample.prompts=4", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(command, "start", lambda settings, folder: 0)
    assert command.sample([*words, "sample.n=6"]) == 0
    monkeypatch.setattr(command, "start", lambda settings, folder: 2)
    assert command.sample([*words, "sample.n=6", "sample.temperature=0.5"]) == 2
    assert Settings.read(tmp_path).nodes.sample.temperature == 1.0
