"""Configuration files, folders and paths with something wrong: one message each, never another exception.

Forty damaged files by default;
the long form is `RCPO_MUTATIONS=1000 scripts/test tests/config/test_bad_files.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra
from permissions import files_no_longer_than, no_permission

from rcpo.config.composition import PRIMARY, compose_with, hydra_session, split_arguments, user_part
from rcpo.config.parsing import load_run_config, parse, save_run_config
from rcpo.config.paths import conf_dir
from rcpo.config.schema import RunConfig
from rcpo.config.validation import validate
from rcpo.errors import ConfigError

COUNT = int(os.environ.get("RCPO_MUTATIONS", "40"))
DPO = b"name: dpo\nreduction: sum\nnll_coef: 0.0\nbeta: 0.1\nepsilon: 0.0\n"

# an option's content, and what its refusal has to hold besides the file's name
OPTIONS = {
    "latin1": ("name: dpo # café\n".encode("latin1"), "not UTF-8"),
    "utf16": ("name: dpo\n".encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "zero": (b"name: dpo\0\n", "not YAML"),
    "tab": (b"name: dpo\n\tbeta: 1\n", "line 2"),
    "number": (b"3\n", "cannot be read"),
    "sequence": (b"- name\n", "objective"),
    "empty": (b"", "no objective.name"),
    "word": (b"dpo\n", "no objective.name"),
    "nameless": (b"beta: 0.1\n", "no objective.name"),
    "twice": (b"name: dpo\nname: simpo\n", "duplicate key name"),
    "two": (b"name: dpo\n---\nname: simpo\n", "another document"),
    "python": (b"name: !!python/object/apply:os.system ['true']\n", "constructor"),
    "alias": (b"name: *x\n", "alias"),
    "circle": (b"name: dpo\na: &a\n  b: *a\n", "refers to itself"),
    "deep": (b"a: " + b"[" * 3000, "too deep"),
    "itself": (b"defaults:\n  - itself\nname: dpo\n", "refers to itself"),
    "header": (b"# @package\nname: dpo\n", "header"),
    "nothing": (b"null: 2\nname: dpo\n", "key"),
    "pointer": (b"name: ${nope}\n", "nope"),
    "function": (b"name: ${nope:1}\n", "nope"),
    "half": (b"name: ${\n", "name"),
}


def refused(*arguments: str) -> str:
    """The one message that a command line with these arguments ends with."""
    with pytest.raises(ConfigError) as caught:
        composed(*arguments)
    return str(caught.value)


def composed(*arguments: str) -> RunConfig:
    flags = split_arguments(list(arguments))
    with hydra_session(flags.config_dir, flags.config_path) as hydra:
        cfg = compose_with(hydra, flags.config_name or PRIMARY, flags.overrides)
        return parse(user_part(cfg))


def refusal(hydra: Hydra, name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(user_part(compose_with(hydra, name, overrides)))
    return str(caught.value)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "objective").mkdir()
    return tmp_path


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / "objective" / f"{name}.yaml").write_bytes(content)


def test_an_option_s_file_that_cannot_be_used_is_named(mine: Path) -> None:
    for name, (content, _) in OPTIONS.items():
        if OPTIONS[name][1] != "not UTF-8":
            put(mine, name, content)
    messages = {}
    for name in ("latin1", "utf16", "binary"):  # one such file is enough for the folder to be refused
        put(mine, name, OPTIONS[name][0])
        messages[name] = refused(f"--config-dir={mine}", f"objective={name}")
        (mine / "objective" / f"{name}.yaml").unlink()
    with hydra_session(str(mine)) as hydra:
        messages |= {n: refusal(hydra, PRIMARY, f"objective={n}") for n in OPTIONS if n not in messages}
    for name, (_, part) in OPTIONS.items():
        message = messages[name]
        assert part in message and "\n" not in message, (name, message)
        if part in ("not UTF-8", "not YAML", "line 2", "cannot be read", "header"):
            assert f"objective/{name}.yaml" in message, (name, message)
    put(mine, "good", b"\xef\xbb\xbf" + DPO)  # a byte-order mark is part of UTF-8
    assert composed(f"--config-dir={mine}", "objective=good").objective.name == "dpo"


def test_a_primary_configuration_that_cannot_be_used_is_named(mine: Path) -> None:
    known = {name: OPTIONS[name] for name in ("zero", "tab", "number", "twice", "deep")}
    vacant = {"empty": (b"", "holds no key"), "null": (b"null\n", "holds no key")}  # not the default run
    for name, (content, _) in {**known, **vacant}.items():
        (mine / f"{name}.yaml").write_bytes(content)
    with hydra_session(str(mine)) as hydra:
        for name, (_, part) in {**known, **vacant}.items():
            assert part in refusal(hydra, name)
    assert "--config-name is empty" in refused("--config-name=")


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("hydra.job.chdir=true", "hydra.run.dir=DIR"),
        ("hydra.output_subdir=.hydra", "config.yaml"),
        ("hydra.output_subdir=notes", "config.yaml"),
        ("++hydra.job.env_set.SEED=1", "slurm.env"),
        ("++hydra.callbacks.mine._target_=my.Callback", "a program that does"),
        ("hydra.verbose=true", "rcpo.log"),
    ],
)
def test_settings_of_hydra_that_rcpo_does_not_follow_are_refused(
    override: str, remedy: str, mine: Path
) -> None:
    key, _, value = override.lstrip("+").partition("=")
    message = refused(override)
    assert (
        key.removesuffix(".SEED").removesuffix(".mine._target_") in message
        and remedy in message
        and "\n" not in message
    )
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))]
    (mine / "study").mkdir()
    (mine / "study" / "moved.yaml").write_text("\n".join(["# @package _global_", *lines]) + f" {value}\n")
    if value != ".hydra":  # in a file, Hydra's own default cannot be told from a choice
        assert refused(f"--config-dir={mine}", "study=moved") == message


def test_the_log_of_a_run_is_not_hydra_s() -> None:
    for override in ("hydra/job_logging=disabled", "hydra.job_logging.root.level=DEBUG"):
        assert "hydra.job_logging is not supported: rcpo.log" in refused(override)


def test_settings_of_hydra_that_ask_for_nothing_are_accepted() -> None:
    assert composed("hydra.job.chdir=false", "hydra.output_subdir=null").seed == 1
    assert composed("hydra.sweep.subdir=${rcpo_run_name:seed}").seed == 1  # which a job alone can resolve


def test_a_folder_of_options_that_may_not_be_read_is_not_taken_for_an_empty_one(mine: Path) -> None:
    put(mine, "good", DPO)
    for place in (mine, mine / "objective"):
        with no_permission(place):
            message = refused(f"--config-dir={mine}", "seed=3")
        assert "--config-dir" in message and str(place) in message and "Permission denied" in message
    with no_permission(mine / "objective" / "good.yaml"):
        message = refused(f"--config-dir={mine}", "objective=good")
    assert "good.yaml" in message and "Permission denied" in message
    with no_permission(mine):
        assert "--config-path" in refused(f"--config-path={mine}")


def test_a_file_that_a_shipped_one_hides_is_refused(mine: Path) -> None:
    put(mine, "dpo", DPO.replace(b"0.1", b"0.5"))
    assert "objective/dpo.yaml: rcpo has a objective/dpo.yaml" in refused(f"--config-dir={mine}")
    put(mine, "dpo", (conf_dir() / "objective" / "dpo.yaml").read_bytes())  # a copy hides nothing
    assert composed(f"--config-dir={mine}").objective.name == "dpo"
    (mine / "config.yaml").write_bytes(b"seed: 3\n")
    assert "config.yaml: rcpo has" in refused(f"--config-dir={mine}")


def test_a_file_that_ends_otherwise_is_pointed_out(mine: Path) -> None:
    (mine / "objective" / "other.yml").write_bytes(DPO)
    assert "other.yml would have to end in .yaml" in refused(f"--config-dir={mine}", "objective=other")


INSERTED = (b"\t", b"\0", b":", b"{", b"[", b"*", b"&", b"${", b"\n- ", b"'")


def damaged(content: bytes, pick: random.Random) -> bytes:
    """The content with one thing broken."""
    place = pick.randrange(len(content))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place],
        lambda: content[:place] + bytes([pick.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + content[place + 1 :],
        lambda: content[:place] + pick.choice(INSERTED) + content[place:],
        lambda: content + content[place:],
        lambda: content.decode().encode(pick.choice(("utf-16", "utf-32", "utf-8-sig"))),
    )  # fmt: skip
    return pick.choice(kinds)()


@pytest.mark.slow
@pytest.mark.timeout(60 + 3 * COUNT)
def test_damaged_options_are_read_or_refused_and_nothing_else(mine: Path) -> None:
    pick = random.Random(0)
    shipped = sorted((conf_dir() / "objective").glob("*.yaml"))
    outcomes = {"read": 0, "refused": 0}
    with hydra_session(str(mine), None) as hydra:
        for number in range(COUNT):
            content = damaged(pick.choice(shipped).read_bytes(), pick)
            put(mine, f"damaged{number}", content)
            outcomes[outcome(hydra, f"objective=damaged{number}", content)] += 1
    assert min(outcomes.values()) > COUNT // 20, outcomes  # both kinds were met


def outcome(hydra: Hydra, override: str, content: bytes) -> str:
    try:
        parse(user_part(compose_with(hydra, PRIMARY, [override])))
    except ConfigError as error:
        assert str(error).strip() and "Traceback" not in str(error), content
        return "refused"
    return "read"


# --- paths ------------------------------------------------------------------------------------------------


def pairs(**data: Any) -> RunConfig:
    config = RunConfig()
    config.data.name = "pairs"
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def with_value(key: str) -> Callable[[str], RunConfig]:
    def make(value: str) -> RunConfig:
        config = pairs(path=__file__) if key.startswith("data.") else RunConfig()
        if key == "adapter.path":
            config.adapter.name = "lora"
        node, _, leaf = key.rpartition(".")
        setattr(getattr(config, node) if node else config, leaf, value)
        return config

    return make


KEYS = (
    *("model.path", "adapter.path", "reference.path", "reference.cache", "resume"),
    *("data.path", "data.eval_path", "data.cache", "judge.prompts", "judge.template", "judge.against"),
)


def bad_paths(folder: Path) -> Iterator[tuple[str, str]]:
    """What no key takes, with its name."""
    (folder / "circle").symlink_to("circle")
    yield "too long", str(folder / ("x" * 300))
    yield "a circle of links", str(folder / "circle")
    yield "nobody's home", "~nobody_of_this_name/x"
    yield "a zero byte", str(folder / "a\0b")


@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_can_be_none_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    for name, value in bad_paths(tmp_path):
        with pytest.raises(ConfigError) as caught:
            validate(with_value(key)(value))
        assert f"{key}=" in str(caught.value), (name, str(caught.value))
        assert len(str(caught.value)) < 400 + len(str(tmp_path)), name


@pytest.mark.parametrize("key", KEYS)
def test_a_path_behind_a_closed_folder_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "inside").mkdir(parents=True)
    with no_permission(closed), pytest.raises(ConfigError, match=rf"{key}=.*Permission denied"):
        validate(with_value(key)(str(closed / "inside")))


@pytest.mark.parametrize("key", ["model.path", "adapter.path", "reference.path", "resume"])
def test_a_folder_that_may_not_be_read_and_a_file_are_no_folders(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{key}=.*(is a file|not a folder)"):
        validate(with_value(key)(str(tmp_path / "file")))
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "config.json").write_bytes(b"{}")
    with no_permission(closed), pytest.raises(ConfigError, match=rf"{key}=.*Permission denied"):
        validate(with_value(key)(str(closed)))


def test_a_run_s_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for content, part in (
        ("seed: 3 # café".encode("latin1"), "UTF-8"),
        (b"seed: 3\0", "YAML"),
        (b"seed: [3", "YAML"),
        (b"- 3", "not a mapping"),
        (b"a: &a\n  b: *a\n", "YAML"),
        (b"3", "YAML"),
        (b"1: 2\nnull: 3\n", "YAML"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=part) as caught:
            load_run_config(tmp_path)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(b"seed: 3\n")
    with no_permission(file), pytest.raises(ConfigError, match="Permission denied"):
        load_run_config(tmp_path)


def test_a_full_disk_leaves_a_run_its_configuration(tmp_path: Path) -> None:
    """A continued run writes its configuration anew; half of one, or none, would read as defaults."""
    config = RunConfig(seed=7)
    config.trackio.project = "mine"  # at the end of the file
    path = tmp_path / "config.yaml"
    save_run_config(config, path)
    with files_no_longer_than(100), pytest.raises(OSError, match="File too large"):
        save_run_config(RunConfig(seed=8), path)
    assert load_run_config(tmp_path) == config
    with files_no_longer_than(100):
        save_run_config(config, path)  # which is there: nothing is written
    assert load_run_config(tmp_path) == config


def test_an_empty_configuration_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is empty"):
        load_run_config(tmp_path)
