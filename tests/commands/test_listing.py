"""`rcpo list` and `help=`: options and keys, one line each, from the files and fields that declare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rcpo.commands.keys import Entry, as_yaml, entries, nodes, page, summary
from rcpo.commands.listing import TOPICS, explain, first_comment, groups, list_topic, options, topics
from rcpo.commands.train import train
from rcpo.config.nodes import COMMAND_NODES
from rcpo.config.parsing import known_keys
from rcpo.config.paths import conf_dir
from rcpo.errors import ConfigError

EFFECTIVE: dict[str, Any] = {"objective": {"name": "simpo", "beta": 2.0, "gamma": 1.0, "mine": 3}}


def test_the_page_of_keys_is_current() -> None:
    written = (conf_dir() / "keys.md").read_text(encoding="utf-8")
    assert written == page(), "run: rcpo list keys --markdown > conf/keys.md"


def test_all_keys_of_a_run_and_of_the_commands_are_listed() -> None:
    leaves = {entry.name for node in nodes() for entry in entries(node)}
    assert {key for key in known_keys() if "." in key} - leaves == {"rc.control"}
    assert set(COMMAND_NODES) - set(nodes()) == {"study", "rounds"}
    assert all(10 < len(summary(node)) <= 100 and summary(node).endswith(".") for node in nodes())


def test_an_entry_has_type_default_and_range() -> None:
    (micro,) = [entry for entry in entries("train") if entry.name == "train.micro_batch_size"]
    assert (micro.type, micro.default, micro.key.allowed) == ("integer or null", None, "≥ 1")
    (betas,) = [entry for entry in entries("optim") if entry.name == "optim.betas"]
    assert (betas.type, betas.default, betas.key.allowed) == ("list of numbers", [0.9, 0.999], "0 ≤ x < 1")
    assert isinstance(betas, Entry)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (1e-8, "1e-08"), ([1, "a"], "[1, a]"), ({"a": None}, "{a: null}")],
)
def test_values_are_shown_as_the_command_line_takes_them(value: Any, text: str) -> None:
    assert as_yaml(value) == text


@pytest.mark.parametrize("topic", ["objectives", "models", "data", "studies", "experiments", "rc"])
def test_every_option_of_a_topic_has_one_line(topic: str) -> None:
    lines = list_topic(topic)
    names = [line.split()[0] for line in lines]
    assert names == list(options(TOPICS.get(topic, topic))) and len(names) > 3
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_a_line_is_the_first_sentence_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text, sentence in (
        ("# As Meng et al. 2024. More.\nname: a\n", "As Meng et al. 2024"),
        ("# @package _global_\n# What changes?\n# Everything.\n", "What changes?"),
        ("# Two lines,\n# one sentence\n\n# of another\n", "Two lines, one sentence"),
        ("# Only this\n#\n#   rcpo sweep\n", "Only this"),
        ("name: a  # not this\n", ""),
    ):
        file.write_text(text, encoding="utf-8")
        assert first_comment(file) == sentence


def test_own_options_are_listed_with_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("# My own loss.\nname: mine\n")
    (tmp_path / "flavour").mkdir()
    (tmp_path / "flavour" / "sweet.yaml").write_text("# Sweet.\n")
    assert "My own loss" in "\n".join(list_topic("objectives", tmp_path))
    assert "flavour" in groups(tmp_path) and "flavour" in topics(tmp_path)
    assert list_topic("flavour", tmp_path) == ["sweet  Sweet"]


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("objectivs", "did you mean objectives?"),
        ("modls", "did you mean models?"),
        ("", "Give a topic: objectives"),
    ],
)
def test_a_topic_that_does_not_exist_is_refused(topic: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list_topic(topic)
    assert hint in str(caught.value)


def test_help_on_a_group_shows_keys_with_type_value_range_and_meaning() -> None:
    text = "\n".join(explain("objective", EFFECTIVE))
    assert "Choose objective=NAME: alphapo, aot," in text and "`rcpo list objectives`" in text
    assert "objective.beta=2 " in text and "number: > 0\n    strength of the reference" in text
    assert "objective.name=simpo" in text and "objective.mine=3" in text
    assert "objective.epsilon" not in text  # SimPO has none
    calibration = "\n".join(explain("rc", {}))
    assert "text: center, edge, loop, fixed" in calibration and "rc.control.pairs=256" in calibration


@pytest.mark.parametrize(
    ("topic", "part"),
    [
        ("optim.lr", "optim.lr=0.0001  number: > 0"),
        ("lr", "optim.lr=0.0001  number: > 0"),
        ("gamma", "objective.gamma=1  number: ≥ 0"),
        ("rc.control", "rc.control.every=4"),
        ("seed", "seed=1  integer: 0 ≤ x ≤ 4294967295"),
        ("experiment", "experiment=NAME"),
        ("", "train       How long to train"),
    ],
)
def test_help_on_a_key_or_a_group_without_keys(topic: str, part: str) -> None:
    assert part in "\n".join(explain(topic, EFFECTIVE))


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("objectiv", "objective"),
        ("optim.lrr", "optim.lr"),
        ("bach_size", "batch_size"),
        ("learning_rate", "optim.lr"),
    ],
)
def test_help_on_what_does_not_exist_names_the_nearest(topic: str, hint: str) -> None:
    with pytest.raises(
        ConfigError, match=f"help={topic}: there is no such group or key; did you mean {hint}"
    ):
        explain(topic, {})


def test_help_goes_with_the_other_arguments_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(["objective=simpo", "help=objective", "objective.gamma=0.3"]) == 0
    shown = capsys.readouterr().out
    assert "objective.gamma=0.3" in shown and "objective.beta=2 " in shown
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"did you mean objective\?"):
        train(["help=objectve"])
    with pytest.raises(ConfigError, match="did you mean simpo"):
        train(["objective=simp", "help=objective"])
    with pytest.raises(ConfigError, match="`rcpo --install-completion`"):
        train(["-sc", "install=bash"])


def test_no_help_advises_flags_that_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--hydra-help"]) == 0
    shown = capsys.readouterr().out
    assert "--config-dir" in shown and "-sc" not in shown and "rerun" not in shown
    with pytest.raises(ConfigError) as caught:
        train(["--shel-completion"])
    assert "did you mean --shell-completion" not in str(caught.value)
