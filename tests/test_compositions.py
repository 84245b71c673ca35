"""What tests keep of Hydra's compositions is what Hydra makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import compositions
import pytest
from hydra._internal import config_loader_impl
from omegaconf import OmegaConf

from rcpo.config.composition import PRIMARY, compose, compose_with, hydra_session
from rcpo.errors import ConfigError

COMPOSED = [
    [],
    ["seed=3"],
    ["objective=ipo", "optim.lr=1e-4", "+data.columns={prompt: question}"],
    ["rc=on", "model=tiny", "experiment=hh", "slurm.env={A: b}"],
    ["rc=on,off", "seed=1,2", "objective=kto"],
    ["hydra/launcher=basic", "~study"],
]


@pytest.fixture
def plain() -> Iterator[pytest.MonkeyPatch]:
    """Hydra as it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in compositions.PLAIN:
            patch.setattr(owner, name, function)
        yield patch


def texts(overrides: list[list[str]]) -> list[str]:
    with hydra_session() as hydra:
        made = [compose_with(hydra, PRIMARY, words, multirun="rc=on,off" in words) for words in overrides]
    return [OmegaConf.to_yaml(cfg) for cfg in made]


def test_a_kept_composition_is_hydra_s(plain: pytest.MonkeyPatch) -> None:
    expected = texts(COMPOSED)
    compositions.keep(plain)
    assert texts(COMPOSED) == expected
    assert texts(COMPOSED[::-1]) == expected[::-1]


def test_what_is_kept_is_not_the_tree_that_was_given_away(plain: pytest.MonkeyPatch) -> None:
    compositions.keep(plain)
    first = compose(["seed=3"])
    first.optim.lr = 7.0
    first.train.epochs = 9
    second = compose(["seed=4"])
    assert (second.optim.lr, second.train.epochs, second.seed) == (compose([]).optim.lr, 1, 4)


def test_the_defaults_of_the_same_choices_are_listed_once(plain: pytest.MonkeyPatch) -> None:
    listed = []
    create = config_loader_impl.create_defaults_list
    plain.setattr(
        config_loader_impl, "create_defaults_list", lambda *a, **k: listed.append(0) or create(*a, **k)
    )
    compositions.keep(plain)
    for words in (["seed=1"], ["seed=2", "optim.lr=1e-4"], ["rc=on"], ["rc=on", "seed=3"]):
        compose(words)
    assert len(listed) == 2


def test_a_folder_of_the_user_s_is_read_each_time(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    compositions.keep(plain)
    option = tmp_path / "optim" / "own.yaml"
    option.parent.mkdir()
    for rate in (0.5, 0.25):
        option.write_text(f"name: adamw\nlr: {rate}\n")
        assert compose(["optim=own"], str(tmp_path)).optim.lr == rate


def test_a_choice_that_is_refused_is_refused_again(plain: pytest.MonkeyPatch) -> None:
    compositions.keep(plain)
    for _ in range(2):
        with pytest.raises(ConfigError, match="objective=ipq: there is no such objective; did you mean ipo"):
            compose(["objective=ipq"])
