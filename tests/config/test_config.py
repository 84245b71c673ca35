"""Every file under conf/ composes and parses, and what no run could use is refused with one clear message."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from rcpo.config.composition import (
    PRIMARY,
    compose,
    compose_with,
    hydra_session,
    over_run,
    split_arguments,
    user_part,
)
from rcpo.config.data import SourceConfig
from rcpo.config.fields import Key, key_of, keys_of, shown
from rcpo.config.hyperparameters import HYPERPARAMETERS
from rcpo.config.onpolicy import IterateConfig, PairingConfig, SampleConfig, ScoreConfig
from rcpo.config.parsing import known_keys, load_run_config, parse, save_run_config, to_container
from rcpo.config.paths import conf_dir
from rcpo.config.refusals import _in_quotes, _quoted
from rcpo.config.schema import RunConfig, TrainConfig
from rcpo.errors import ConfigError
from rcpo.method.objectives import specification
from rcpo.models.upload import PushConfig
from rcpo.planner.settings import GpuConfig, PlanConfig, plan_config
from rcpo.slurm.settings import SlurmConfig, slurm_config
from rcpo.sweeps.settings import SweepConfig, sweep_config

GROUPS = sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir())
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((conf_dir() / group).glob("*.yaml"))]

# typed in from the published losses: reduction and hyper-parameters with their defaults
OBJECTIVES: dict[str, tuple[str, dict[str, float]]] = {
    "dpo": ("sum", {"beta": 0.1, "epsilon": 0.0, "divergence": "reverse_kl", "divergence_alpha": 0.5}),
    "dpo_shift": ("sum", {"beta": 0.1, "shift_start": 0.75, "shift_end": 0.75}),
    "cal_dpo": ("sum", {"beta": 0.002}),
    "bdpo": ("sum", {"beta": 0.1, "lambda_mix": 0.5}),
    "mappo": ("sum", {"beta": 0.1, "score_scale": 1.0}),
    "rpo_sq": ("sum", {"beta": 0.1, "score_scale": 1.0}),
    "rpo_bwd_kl": ("sum", {"beta": 0.1, "score_scale": 1.0}),
    "rpo_fwd_kl": ("sum", {"beta": 0.1, "score_scale": 1.0}),
    "apo_zero_unpaired": ("sum", {"beta": 0.1, "lambda_chosen": 1.0, "lambda_rejected": 1.0}),
    "simper": ("mean", {}),
    "mix": (
        None,
        {
            "parts": [
                {"name": "dpo", "weight": 0.8},
                {"name": "bco", "weight": 0.2},
                {"name": "sft", "weight": 1.0},
            ]
        },
    ),
    "robust": ("sum", {"beta": 0.1, "epsilon": 0.1}),
    "ipo": ("mean", {"tau": 0.1}),
    "hinge": ("sum", {"beta": 0.1}),
    "exo": ("sum", {"beta": 0.1, "epsilon": 1e-3}),
    "nca": ("sum", {"beta": 0.1}),
    "bco": ("sum", {"beta": 0.1}),
    "sppo": ("sum", {"beta": 0.1}),
    "aot": ("sum", {"beta": 0.1}),
    "aot_unpaired": ("sum", {"beta": 0.1}),
    "apo_zero": ("sum", {"beta": 0.1}),
    "apo_down": ("sum", {"beta": 0.1}),
    "discopop": ("sum", {"beta": 0.1}),
    "dpop": ("sum", {"beta": 0.1, "lambda_penalty": 50.0}),
    "bce": ("mean", {}),
    "simpo": ("mean", {"beta": 2.0, "gamma": 1.0}),
    "alphapo": ("mean", {"beta": 2.0, "gamma": 1.0, "alpha": 0.25}),
    "cpo": ("mean", {"beta": 0.1, "lambda_nll": 1.0}),
    "orpo": ("mean", {"beta": 0.1}),
    "slic": ("mean", {"gamma": 1.0, "lambda_nll": 0.1}),
    "tpo": ("sum", {"beta": 0.01, "gamma": 0.0, "lambda_nll": 1.0}),
    "kto": ("sum", {"beta": 0.1, "lambda_chosen": 1.0, "lambda_rejected": 1.0}),
    "lsif": ("mean", {}),
    "ukl": ("mean", {}),
    "ddro": ("mean", {}),
    "tidpo": ("importance", {"beta": 0.1, "epsilon": 0.0}),
    "sft": ("mean", {}),
}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@functools.cache
def shipped() -> Any:
    """One Hydra for all tests: it keeps the files it has read."""
    with hydra_session() as hydra:
        return hydra


def composed(*overrides: str) -> RunConfig:
    return copy.deepcopy(_composed(*overrides))


@functools.cache
def _composed(*overrides: str) -> RunConfig:
    """Takes a fifth of a second."""
    return parse(user_part(compose_with(shipped(), PRIMARY, split_arguments(overrides).overrides)))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    return str(caught.value)


def command_keys() -> set[str]:
    nodes: dict[str, Any] = {
        "sweep": SweepConfig,
        "plan": PlanConfig,
        "gpu": GpuConfig,
        "slurm": SlurmConfig,
        "push": PushConfig,
        "sample": SampleConfig,
        "score": ScoreConfig,
        "pairing": PairingConfig,
        "iterate": IterateConfig,
    }
    leaves = {f"{node}.{field.name}" for node, kind in nodes.items() for field in dataclasses.fields(kind)}
    return {*nodes, *leaves, "rounds"}


def test_the_defaults_of_conf_are_those_of_the_dataclasses() -> None:
    # data=sums sets the number of steps, which by itself is null: by epochs
    assert composed() == RunConfig(train=TrainConfig(max_steps=200))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_parses(
    group: str, option: str, tmp_path: Path, model_folder: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    needs = {
        "local": [f"model.path={model_folder}"],
        "fixed": ["rc.alpha=1.5"],
        "pairs": [f"data.path={pairs}"],
        "hh_start": [f"model.path={model_folder}", f"data.path={pairs}"],  # their inputs are made by a script
        **{
            name: [f"model.path={model_folder}", f"data.path={pairs}", f"data.eval_path={pairs}"]
            for name in ("hh", "hh_grid", "hh_rules", "real", "real_grid", "real_hh", "real_short")
        },
        "judge": ["judge.base_url=http://127.0.0.1:8000/v1", "judge.model=any"],
    }
    choice = f"{group}='{option}'"
    config = composed(choice, *needs.get(option, []))
    file = tmp_path / "config.yaml"
    save_run_config(config, file)
    assert load_run_config(file) == config


def test_a_run_s_folder_stands_for_its_configuration(tmp_path: Path) -> None:
    config = composed("objective='simpo'")
    save_run_config(config, tmp_path / "config.yaml")
    assert config != RunConfig() and load_run_config(tmp_path) == config


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_no_option_has_a_key_that_nobody_reads(group: str, option: str) -> None:
    tree = OmegaConf.load(conf_dir() / group / f"{option}.yaml")
    assert isinstance(tree, DictConfig)
    whole = (conf_dir() / group / f"{option}.yaml").read_text().startswith("# @package _global_")
    nodes = {str(key): tree[key] for key in tree} if whole else {group: tree}
    known = {*known_keys(), *command_keys()}
    for node, leaves in nodes.items():
        assert node in ("hydra", "defaults") or node in known, node
        for leaf in leaves if node not in ("hydra", "defaults") and isinstance(leaves, DictConfig) else ():
            own = node == "objective" and leaf in HYPERPARAMETERS
            assert own or leaf == "defaults" or f"{node}.{leaf}" in known, f"{node}.{leaf}"


def test_every_key_of_the_dataclasses_is_in_conf() -> None:
    found = set()
    for file in conf_dir().rglob("*.yaml"):
        group = file.parent.name
        tree = OmegaConf.load(file)
        assert isinstance(tree, DictConfig)
        whole = group == "conf" or file.read_text().startswith("# @package _global_")
        nodes = {str(key): tree._get_node(key) for key in tree} if whole else {group: tree}
        for node, leaves in nodes.items():
            found.add(node)
            if isinstance(leaves, DictConfig):
                found.update(f"{node}.{leaf}" for leaf in leaves)
                nested = {leaf: leaves._get_node(leaf) for leaf in leaves}
                found.update(
                    f"{node}.{name}.{leaf}"
                    for name, tree in nested.items()
                    if isinstance(tree, DictConfig) and f"{node}.{name}" in known_keys()
                    for leaf in tree
                )
    # `module` is for objectives of the user's own package
    assert {*known_keys(), *command_keys()} - found == {"objective.module"}


def test_a_reference_cache_that_is_off_stays_off(tmp_path: Path) -> None:
    for off in ("off", "'off'", "false"):
        config = composed(f"reference.cache={off}")
        assert not config.reference.keeps
        save_run_config(config, tmp_path / "config.yaml")
        assert not load_run_config(tmp_path).reference.keeps
    (tmp_path / "unquoted.yaml").write_text("cache: off")
    unquoted = OmegaConf.load(tmp_path / "unquoted.yaml")
    assert not parse(OmegaConf.create({"reference": unquoted})).reference.keeps
    assert composed().reference.keeps and composed(f"reference.cache={tmp_path}").reference.keeps
    assert "is a file" in refusal(f"reference.cache={tmp_path / 'config.yaml'}")


def test_the_keys_of_a_sweep_are_checked_and_no_part_of_a_run() -> None:
    cfg = compose_with(shipped(), PRIMARY, ["sweep.parallel=2"])
    assert sweep_config(cfg) == SweepConfig(parallel=2)
    assert sweep_config(OmegaConf.create({})) == SweepConfig()
    assert "sweep" not in user_part(cfg)
    for override, part in (
        ("sweep.search=optna", "did you mean optuna?"),
        ("sweep.trials=0", "sweep.trials=0 is out of range"),
        ("+sweep.trails=3", "did you mean sweep.trials?"),
        ("sweep.trials=many", "sweep.trials"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            sweep_config(compose_with(shipped(), PRIMARY, [override]))


def test_an_adapter_s_folder_is_no_model_but_may_be_a_reference(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal("model=local", f"model.path={tmp_path}")
    assert f"model.path={tmp_path} holds an adapter" in message
    assert f"adapter=lora adapter.path={tmp_path}" in message
    assert composed("adapter=lora", f"adapter.path={tmp_path}").adapter.path == str(tmp_path)
    assert composed(f"reference.path={tmp_path}").reference.path == str(tmp_path)


def test_what_is_asked_of_slurm_is_checked() -> None:
    for value, part in (("5", "5"), ("null", "null"), ("[a]", r"\['a'\]")):
        with pytest.raises(ConfigError, match=f"slurm={part}: slurm holds keys, not a value"):
            slurm_config(OmegaConf.create(f"slurm: {value}"))
    eight = slurm_config(compose_with(shipped(), PRIMARY, ["slurm.nodes=2", "slurm.gpus_per_node=8"]))
    assert (eight.ranks, eight.world_size) == (8, 16)
    assert SlurmConfig(nodes=3).world_size == 3 and SlurmConfig(nodes=2, ranks_per_node=4).world_size == 8
    assert slurm_config(compose_with(shipped(), PRIMARY, [])) == SlurmConfig()
    assert slurm_config(compose_with(shipped(), PRIMARY, ["slurm.env={A:b}"])).env == {"A": "b"}
    for overrides, part in (
        (["slurm.nodes=0"], "slurm.nodes=0 is out of range"),
        (["slurm.tasks=ranks"], "did you mean rank?"),
        (["slurm.gpus_per_node=2", "slurm.ranks_per_node=4"], "needs a GPU for itself"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            slurm_config(compose_with(shipped(), PRIMARY, overrides))


def test_every_key_is_documented_in_one_line() -> None:
    kinds = (RunConfig, SourceConfig, SweepConfig, PlanConfig, GpuConfig, SlurmConfig, PushConfig)
    for kind in (*kinds, SampleConfig, ScoreConfig, PairingConfig, IterateConfig):
        for name, field in keys_of(kind):
            found = key_of(field)
            assert found is not None or name == "objective.hyperparameters", name
            assert found is None or ("\n" not in found.doc and 3 <= len(found.doc) <= 100), name


def test_every_hyperparameter_of_the_shipped_objectives_is_documented() -> None:
    shipped = {name for _, hyperparameters in OBJECTIVES.values() for name in hyperparameters}
    assert shipped == set(HYPERPARAMETERS)


@pytest.mark.parametrize(
    ("allowed", "value", "reason"),
    [
        (Key(doc="", above=0), 0, "x=0 is out of range: it has to be greater than 0"),
        (Key(doc="", above=0), math.inf, "x=inf is out of range: it has to be greater than 0 and finite"),
        (Key(doc=""), math.nan, "x=nan is out of range: it has to be finite"),
        (Key(doc="", at_least=0, below=1), 1, "x=1 is out of range: it has to be at least 0 and less than 1"),
        (Key(doc="", at_least=0, at_most=1), [0.5, 2], r"x\[1\]=2 is out of range: .* at most 1"),
        (Key(doc="", below=1), 1, "x=1 is out of range: it has to be less than 1"),
        (Key(doc="", choices=("a", "bcd")), "bcc", r"x=bcc is not one of a, bcd \(did you mean bcd\?\)"),
    ],
)
def test_a_value_outside_a_key_s_own_is_refused(allowed: Key, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}$"):
        allowed.check("x", value)


def test_values_of_a_key_pass() -> None:
    allowed = Key(doc="", at_least=0, below=1)
    for value in (None, 0, 0.999, [], [0, 0.5], True):
        allowed.check("x", value)
    Key(doc="", choices=("a",)).check("x", "a")


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Key(doc=""), ""),
        (Key(doc="", above=0), "> 0"),
        (Key(doc="", at_least=8), "≥ 8"),
        (Key(doc="", below=1), "< 1"),
        (Key(doc="", above=0, at_most=1), "0 < x ≤ 1"),
        (Key(doc="", at_least=0, below=0.5), "0 ≤ x < 0.5"),
        (Key(doc="", choices=("a", "b")), "a, b"),
    ],
)
def test_the_values_of_a_key_are_shown_in_a_few_characters(allowed: Key, text: str) -> None:
    assert allowed.allowed == text


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["optim.warmup_steps=10", "optim.warmup_ratio=0.1"],
            "optim.warmup_steps=10 and optim.warmup_ratio=0.1: give",
        ),
        (["optim.warmup_steps=201"], "optim.warmup_steps=201 do not fit a run of 200 steps"),
        (
            ["optim.min_lr_ratio=0.1"],
            "read by optim.schedule=cosine_with_min_lr and wsd alone, and it is constant",
        ),
        (
            ["optim.schedule=cosine", "optim.decay_ratio=0.2"],
            "optim.decay_ratio=0.2 is read by optim.schedule=wsd",
        ),
        (["optim.schedule=cosine_with_min_lr"], "needs its lowest rate: optim.min_lr_ratio=0.1"),
        (["optim.schedule=wsdd"], "did you mean wsd?"),
        (["optim.no_decay=['(']"], "optim.no_decay[0]=( is not a regular expression"),
        (["optim.betas=[0.9]"], "does not have two values"),
        (["optim=adamw_8bit", "engine=zero2_offload"], "both save the same memory; choose optim=adamw"),
    ],
)
def test_optimizer_settings_that_contradict_are_refused(overrides: list[str], part: str) -> None:
    assert part in refusal(*overrides)


def test_a_schedule_with_its_settings_passes() -> None:
    optim = composed("optim.schedule=wsd", "optim.min_lr_ratio=0.1", "optim.warmup_steps=20").optim
    assert (optim.warmup(200), optim.decay(200)) == (20, 20)


@pytest.mark.slow
def test_objectives_have_the_table_s_defaults() -> None:
    assert {option for group, option in OPTIONS if group == "objective"} == {*OBJECTIVES, "dpo_mean"}
    means = composed("objective=dpo_mean").objective
    assert (means.name, means.reduction, means.hyperparameters["beta"]) == ("dpo", "mean", 1.0)
    for name, (reduction, hyperparameters) in OBJECTIVES.items():
        objective = composed(f"objective='{name}'").objective
        assert (objective.name, objective.reduction) == (name, reduction)
        assert objective.hyperparameters == hyperparameters
        loss = specification(name)  # a loop of one's own takes the defaults of the function
        assert name == "mix" or (loss.reduction, loss.hyperparameters) == (reduction, hyperparameters)
    assert "nll_coef" in compose(["objective=sft"]).objective
    assert "nll_coef" not in compose(["objective=tidpo"]).objective


@pytest.mark.parametrize(
    ("switch", "enabled"), [("on", True), ("off", False), ("true", True), ("false", False), ("True", True)]
)
def test_calibration_is_switched_by_on_off_true_and_false(switch: str, enabled: bool) -> None:
    assert composed(f"rc={switch}").rc.enabled is enabled


def test_the_moving_averages_decay_depends_on_the_update_unless_given() -> None:
    assert composed("rc=on").rc.decay == 0.9
    assert composed("rc=on", "rc.update=microbatch").rc.decay == 0.98
    assert composed("rc=on", "rc.ema=0.5").rc.decay == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # unknown keys: same leaf elsewhere, nearest sibling, list
        (["train.bach_size=3"], ["train.bach_size", "did you mean train.batch_size?"]),
        (["lr=3"], ["unknown key lr", "did you mean optim.lr?"]),
        (["train.lr=3"], ["did you mean optim.lr?"]),
        (["objectve=simpo"], ["did you mean objective?"]),
        (["objective=simpo", "objective.epsilon=0.1"], ["objective.epsilon", "beta, gamma", "name"]),
        (["objective=tidpo", "objective.nll_coef=0.1"], ["unknown key objective.nll_coef"]),
        (["+train.steps=3"], ["unknown key train.steps", "max_steps"]),
        (["++foo.bar=3"], ["unknown key foo", "there are:"]),
        (["~rcc"], ["did you mean rc?"]),
        # keys of another option of the group
        (["data.path=pairs.jsonl"], ["unknown key data.path", "data=sums", "data=pairs", "choose one too"]),
        (["adapter.path=mine"], ["unknown key adapter.path", "adapter=lora"]),
        (["objective.module=mine"], ["unknown key objective.module", "+objective.module=VALUE"]),
        (["data=sums", "++data.path=pairs.jsonl"], ["data.path=pairs.jsonl", "add data=pairs"]),
        (["~train.batch_size"], ["~train.batch_size", "train.batch_size=VALUE"]),
        (["~objective"], ["~objective", "objective=VALUE"]),
        (["objective@other=dpo"], ["objective@other", "objective=OPTION"]),
        # options that are not names
        (["engine=3"], ["engine=3: there is no such engine", "did you mean zero3 or zero3_offload?"]),
        (["rc=1"], ["rc=1: there is no such rc", "off, on"]),
        (["data=true"], ["data=true: there is no such data", "pairs"]),
        (["model=null"], ["model=null: there is no such model", "tiny"]),
        (["objective=[dpo,simpo]"], ["choose one option", "-m objective=dpo,simpo"]),
        (["objective={name:simpo}"], ["objective.KEY=VALUE"]),
        # lists, mappings and texts
        (["adapter=lora", "adapter.target_modules=all-linear"], ["adapter.target_modules=[all-linear]"]),
        (["eval.tasks=gsm8k"], ["eval.tasks=gsm8k is not a list", "eval.tasks=[gsm8k]"]),
        (["optim.betas=null"], ["optim.betas=null is not a list", "optim.betas=[]"]),
        (["seed=[1]"], ["seed=[1] holds several values"]),
        (["data=pairs", "data.sources=[{path: a, wieght: 2}]"], ["data.sources[0].wieght", "did you mean"]),
        (["data=pairs", "data.sources=[a.jsonl]"], ["data.sources[0]=a.jsonl", "{path: a.jsonl}"]),
        (["data=pairs", "data.sources=[{path: a, weight: two}]"], ["data.sources[0].weight=two"]),
        (["data=pairs", "data.columns=good"], ["data.columns=good", "data.columns.NAME=VALUE"]),
        (["data=pairs", "data.path="], ["data.path= is empty"]),
        (["model=local", "model.path="], ["model.path= is empty"]),
        (["hydra.run.dir="], ["hydra.run.dir=", "empty"]),
        # numbers with all their digits
        (["seed=4294967296"], ["seed=4294967296 is out of range", "at most 4294967295"]),
        (["seed=1.5"], ["seed", "'1.5' is not a whole number"]),
        (["rc.enabled=null"], ["rc.enabled=null", "true or false"]),
        (["objective.beta=null"], ["objective.beta=null is not a number"]),
        (["objective.beta=true"], ["objective.beta=true is not a number"]),
        (["train.dtype=BF16"], ["train.dtype=BF16 is not one of", "did you mean bf16?"]),
        # unknown options
        (["rc=On"], ["rc=On: there is no such rc", "did you mean on?"]),
        (["objective=SimPO"], ["did you mean simpo?"]),
        # a name or file where an option is expected
        (["model=org/name"], ["there is no such model", "write model=local model.path=org/name"]),
        (["hydra/launcher=x"], ["hydra/launcher=x: there is no such hydra/launcher"]),
        (["model=./name"], ["there is no such model", "write model=local model.path=./name"]),
        (["data=/a/b.parquet"], ["there is no such data", "write data=pairs data.path=/a/b.parquet"]),
        (["data=pairs.jsonl"], ["there is no such data", "write data=pairs data.path=pairs.jsonl"]),
        (["data=PAIRS.JSONL"], ["there is no such data", "write data=pairs data.path=PAIRS.JSONL"]),
        (["objective=smpo"], ["objective=smpo", "did you mean simpo?"]),
        (["engine=zero5"], ["engine=zero5", "did you mean zero"]),
        (["rc=maybe"], ["rc=maybe", "off, on"]),
        (["objective="], ["objective=", "simpo"]),
        # what cannot be read
        (["dpo"], ["'dpo'", "it has no equals sign", "KEY=VALUE"]),
        (["optim.lr=1e-5,"], ["it breaks off", "'optim.lr=\"1e-5,\"'"]),
        (["--optim.lr=1e-5"], ["a key has no dashes: optim.lr=VALUE"]),
        (["--seed", "1"], ["a key has no dashes: seed=VALUE"]),
        (["--learning_rate", "1e-6"], ["did you mean optim.lr? (KEY=VALUE, without dashes)"]),
        (["--run_name=x"], ["see tracking and wandb.name (KEY=VALUE"]),
        (["--sync-every=8"], ["a key has no dashes: reference.sync_every=VALUE"]),
        (["--beta=0.1"], ["a key has no dashes: objective.beta=VALUE"]),
        (["seed=[1,2"], ["seed=[1,2", "KEY=VALUE"]),
        (["seed=1,2"], ["seed=1,2", "add -m"]),
        (["model.path=lr=1e-5"], ["'=' is not expected", "with quotes here: 'model.path=\"lr=1e-5\"'"]),
        (["model.path=modèle"], ["'è' is not expected", "'model.path=\"modèle\"'"]),
        (["model.path=~/m"], ["'~' is not expected", "'model.path=\"~/m\"'"]),
        (["model.path=a,b"], ["holds several values", "'model.path=\"a,b\"'"]),
        (["eval.answer_pattern=("], ["'(' is not expected", "'eval.answer_pattern=\"(\"'"]),
        (["train.batch_size==4"], ["two equals signs"]),
        (["train.batch_size=int(x)"], ["invalid literal", "KEY=VALUE"]),
        (["judge.base_url=https://h/?a=secret=1"], ["judge.base_url=…", "quotes"]),
        (["^"], ["'^' is not expected there"]),
        (["seed=1", "seed=2"], ["seed is given twice", "seed=2"]),
        (["objective=dpo", "objective=simpo"], ["objective is given twice"]),
        (["seed=${nowhere}"], ["seed", "nowhere"]),
        (["+seed=4"], ["seed", "already"]),
        (["+objective=ipo"], ["objective has an option already", "leave out the plus sign"]),
        # types that Hydra lets through
        (["train.batch_size=abc"], ["train.batch_size", "'abc'"]),
        (["train.batch_size=1.5"], ["train.batch_size", "1.5"]),
        (["train.batch_size=true"], ["train.batch_size", "True"]),
        (["rc.enabled=maybe"], ["rc.enabled", "'maybe'"]),
        (["optim.betas=0.9"], ["optim.betas"]),
        (["objective.beta=abc"], ["objective.beta", "'abc'", "number"]),
        (["objective.beta=null"], ["objective.beta", "number"]),
        (["train=big"], ["train=big", "train.KEY=VALUE"]),
        (["train.batch_size=null"], ["train.batch_size"]),
        # ranges
        (["objective.beta=0"], ["objective.beta=0", "greater than 0"]),
        (["objective.beta=-1"], ["objective.beta=-1", "greater than 0"]),
        (["objective.beta=nan"], ["objective.beta=nan"]),
        (["objective.beta=inf"], ["objective.beta=inf", "finite"]),
        (["objective=ipo", "objective.tau=0"], ["objective.tau=0"]),
        (["objective.epsilon=0.5"], ["objective.epsilon=0.5", "less than 0.5"]),
        (["objective=dpop", "objective.lambda_penalty=-1"], ["objective.lambda_penalty=-1", "at least 0"]),
        (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
        (["optim.lr=nan"], ["optim.lr=nan"]),
        (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two"]),
        (["optim.betas=[0.9,1.0]"], ["optim.betas[1]=1"]),
        (["rc.ema=1"], ["rc.ema=1", "less than 1"]),
        (["rc.alpha_max=0.5"], ["rc.alpha_max=0.5", "at least 1"]),
        (["rc.sketch=0"], ["rc.sketch=0"]),
        (["train.max_steps=0"], ["train.max_steps=0"]),
        (["seed=-1"], ["seed=-1"]),
        (["engine.stage=4"], ["engine.stage=4", "at most 3"]),
        # enumerations
        (["train.dtype=fp23"], ["train.dtype=fp23", "fp32, bf16, fp16", "did you mean fp32?"]),
        (["rc.update=steps"], ["rc.update=steps", "did you mean step?"]),
        (["optim.schedule=cosin"], ["did you mean cosine?"]),
        (["objective.reduction=avg"], ["objective.reduction=avg", "mean"]),
        (["wandb.mode=off"], ["wandb.mode=off", "offline"]),
        # combinations
        (
            ["train.micro_batch_size=5"],
            ["train.batch_size=32", "train.micro_batch_size=5", "train.batch_size=35"],
        ),
        (["rc.geometry=parameters", "engine=zero2"], ["rc.geometry=parameters", "engine=zero0"]),
        (["engine.offload_optimizer=true"], ["engine.offload_optimizer", "engine=zero2_offload"]),
        (["engine=zero2", "engine.offload_parameters=true"], ["engine.stage=3", "engine=zero3_offload"]),
        (["objective.reduction=importance", "objective.nll_coef=0.1"], ["objective.nll_coef", "importance"]),
        (
            ["data=pairs", f"data.path={__file__}", "data.max_length=8", "data.max_prompt_length=8"],
            ["data.max_prompt_length=8", "data.max_length=8"],
        ),
        # files
        (["data=pairs"], ["data=pairs needs preference data", "data.path="]),
        (["model=local"], ["model.path has no value"]),
        (["data=pairs", "data.path=nowhere.jsonl"], ["data.path=nowhere.jsonl is not a file"]),
        (["model=local", "model.path=./nowhere"], ["model.path=./nowhere is not a folder"]),
        (["model=local", "model.path=a/b/c"], ["model.path=a/b/c", "name on the hub (owner/name)"]),
        (["model=tiny", "model.name=mine"], ["model=mine needs model.path"]),
        (["model=local", "model.path=."], ["model.path=. holds no config.json"]),
        (["reference.path=/nowhere"], ["reference.path=/nowhere"]),
        (["resume=nowhere"], ["resume=nowhere", "auto"]),
        # the judge: no message repeats what may hold a key
        (["eval=judge"], ["eval.judge=true", "judge.base_url="]),
        (["eval=judge", "judge.base_url=http://h/v1"], ["judge.model="]),
        (["judge.base_url=ftp://h/v1"], ["judge.base_url is not an http or https address"]),
        (["judge.base_url='https://u:secret@h/v1'"], ["judge.base_url holds a user", "judge.api_key_env"]),
        (["judge.base_url='https://h/v1?key=secret'"], ["judge.base_url holds a user, a query"]),
        (
            ["judge.api_key_env=sk-secret"],
            ["judge.api_key_env is not the name", "judge.api_key_env=OPENAI_API_KEY"],
        ),
        (["judge.api_key=secret"], ["judge.api_key"]),
        (["+judge.api_key=secret"], ["unknown key judge.api_key", "did you mean judge.api_key_env?"]),
        (["judge.against=nowhere"], ["judge.against=nowhere does not exist"]),
        (["judge.prompts=nowhere.json"], ["judge.prompts=nowhere.json is not a file"]),
        (["judge.temperature=3"], ["judge.temperature=3", "at most 2"]),
        (
            [
                "eval=judge",
                "judge.base_url=http://h/v1",
                "judge.model=m",
                f"judge.template={Path(__file__).parents[1] / 'tiny.py'}",
            ],
            ["lacks {instruction}, {first}, {second}"],
        ),
        # adapters
        (["adapter=qlora", "engine=zero3"], ["nf4", "engine.stage=3", "engine=zero2"]),
        (["adapter.quantization=nf4"], ["unknown key adapter.quantization"]),
        (["+adapter.quantization=nf4"], ["adapter.quantization=nf4", "adapter=qlora"]),
        (["adapter=lora", "adapter.quantization=int3"], ["adapter.quantization=int3", "nf4"]),
        (["adapter=lora", "adapter.merge=true"], ["adapter.merge=true", "adapter.path=DIR"]),
        (["adapter=lora", "model.init=random"], ["model.init=random", "adapter=none"]),
        (["adapter=lora", "adapter.path=."], ["adapter.path=. holds no adapter_config.json"]),
        (["adapter=lora", "adapter.r=0"], ["adapter.r=0", "at least 1"]),
        (["adapter=lora", "adapter.dropout=0.1"], ["unknown key adapter.dropout"]),
        (["adapter=loras"], ["adapter=loras", "did you mean lora?"]),
    ],
)
def test_what_no_run_could_use_is_refused_by_name(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "hyperparameters" not in message and "secret" not in message


def test_a_path_of_an_own_file_is_refused_with_its_folder_and_name(tmp_path: Path) -> None:
    for group in ("experiment", "model"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text("seed: 1\n")
        for end in ("", ".yaml"):
            given = f"{group}={tmp_path}/{group}/mine{end}"
            with pytest.raises(ConfigError, match=rf"write --config-dir {tmp_path} {group}=mine$"):
                compose([given])


@pytest.mark.parametrize(
    "name", ["lr=1e-5", "modèle", "a b", "it's", 'say "x"', 'it\'s "x"', "~me", "a,b", "x\\", "${x"]
)
def test_the_quoted_form_that_a_refusal_shows_is_taken(name: str) -> None:
    """What the message shows, split as a shell splits it, means the name as it was typed."""
    for text in (_quoted("wandb.project", name), shlex.quote(f"wandb.project={_in_quotes(name)}")):
        (typed,) = shlex.split(text)
        if "${" not in name:  # an interpolation is one inside quotes too
            assert composed(typed).wandb.project == name


def test_columns_are_mapped_one_by_one_or_together() -> None:
    one = composed("data=pairs", f"data.path={__file__}", "data.columns.prompt=question")
    both = composed("data=pairs", f"data.path={__file__}", "data.columns={prompt: question}")
    assert one.data.columns == both.data.columns == {"prompt": "question"}


def test_a_missing_file_s_nearest_neighbour_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refusal(
        "data=pairs", f"data.path={tmp_path}/trian.jsonl"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(2**32, "4294967296"), (-1, "-1"), (0.5, "0.5"), (1e-9, "1e-09")]
)
def test_a_number_is_shown_with_its_digits(value: float, text: str) -> None:
    assert shown(value) == text
    with pytest.raises(ConfigError, match=r"seed=4294967296 is out of range: .* at most 4294967295$"):
        key_of(dict(keys_of(RunConfig))["seed"]).check("seed", 2**32)  # type: ignore[union-attr]


def test_a_folder_of_options_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_bytes(b"name: dpo  # caf\xe9\n")
    with pytest.raises(ConfigError, match=r"objective/mine\.yaml is not UTF-8 \(byte 16\)"):
        compose(["objective=mine"], str(tmp_path))
    (tmp_path / "objective" / "mine.yaml").write_text("name: dpo\n")
    for function in ("scandir", "listdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, denied)  # what a folder without permission does, to root too
            with pytest.raises(
                ConfigError, match=f"--config-dir {tmp_path} cannot be read: .*: Permission denied"
            ):
                compose(["objective=mine"], str(tmp_path))


def denied(path: str | Path) -> list[str]:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_run_s_configuration_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"seed: 1  # caf\xe9\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not UTF-8 \(byte 14\): save it as UTF-8"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("batch", "ranks", "size", "parts"),
    [
        (32, 1, 16, 2),
        (32, 16, 2, 1),
        (32, 4, 8, 1),
        (48, 2, 12, 2),
        (62, 2, 1, 31),
        (96, 1, 16, 6),
        (8, 1, 8, 1),
    ],
)
def test_the_default_micro_batch_is_the_largest_divisor_up_to_16(
    batch: int, ranks: int, size: int, parts: int
) -> None:
    train = TrainConfig(batch_size=batch)
    assert (train.microbatch(ranks), train.accumulation(ranks)) == (size, parts)


def test_a_batch_that_cannot_be_dealt_to_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=32 is not a multiple of 3 .* train\.batch_size=33$"):
        TrainConfig(batch_size=32).accumulation(3)
    with pytest.raises(ConfigError, match=r"batch_size=2 .* of 16 .* train\.batch_size=16$"):
        TrainConfig(batch_size=2).accumulation(16)


def test_accumulation_follows_from_batch_micro_batch_and_processes() -> None:
    # 32 pairs in micro-batches of 4 on 2 processes: 32 / (4 · 2) = 4 each
    assert TrainConfig(batch_size=32, micro_batch_size=4).accumulation(world_size=2) == 4
    with pytest.raises(ConfigError, match=r"3 process\(es\)"):
        TrainConfig(batch_size=32, micro_batch_size=4).accumulation(world_size=3)


def test_flags_may_stand_anywhere() -> None:
    flags = split_arguments(
        ["seed=3", "--cfg", "job", "rc=on", "-cd", "mine", "objective=simpo", "--resolve"]
    )
    assert (flags.cfg, flags.config_dir, flags.resolve) == ("job", "mine", True)
    assert flags.overrides == ["seed=3", "rc=on", "objective=simpo"]
    assert split_arguments(["-m", "rc=true,false", "seed=1"]).overrides == ["rc=on,off", "seed=1"]
    assert split_arguments(["--info", "seed=1"]).info == "all"
    assert split_arguments(["seed=1", "-i", "plugins"]).info == "plugins"
    with pytest.raises(ConfigError, match="did you mean --config-dir"):
        split_arguments(["--cofig-dir", "mine"])


def test_the_users_folder_adds_an_objective_with_hyperparameters_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text(
        "name: mine\nmodule: my_package\nbeta: 0.5\nshape: round\n"
    )
    config = parse(compose(["objective=mine"], config_dir=str(tmp_path)))
    assert config.objective.module == "my_package"
    assert config.objective.hyperparameters == {"beta": 0.5, "shape": "round"}
    with pytest.raises(ConfigError, match="did you mean mine"):
        compose(["objective=mien"], config_dir=str(tmp_path))


def test_a_finished_run_s_configuration_takes_overrides_and_other_groups() -> None:
    run = composed("objective=simpo", "objective.gamma=0.3", "seed=7")
    with hydra_session() as hydra:
        config = parse(over_run(hydra, to_container(run), ["eval.batch_size=3", "objective=ipo"]))
        assert (config.seed, config.eval.batch_size) == (7, 3)
        assert config.objective.hyperparameters == {"tau": 0.1}  # simpo's gamma left with simpo
        kept = parse(over_run(hydra, to_container(run), ["objective.beta=3"]))
        assert kept.objective.hyperparameters == {"beta": 3, "gamma": 0.3}
        with pytest.raises(ConfigError, match=r"did you mean eval\.batch_size"):
            over_run(hydra, to_container(run), ["eval.bach_size=3"])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        load_run_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("seed: [1")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_run_config(tmp_path)


def test_configuration_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from rcpo.config.parsing import parse; from rcpo.config.composition import compose\n"
        "parse(compose(['objective=simpo'])); print({'torch', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_keys_of_a_plan_are_checked_and_no_part_of_a_run() -> None:
    cfg = compose_with(shipped(), PRIMARY, ["plan.gpus=64"])
    assert plan_config(cfg) == (PlanConfig(gpus=64), None)
    assert not {"plan", "gpu"} & set(user_part(cfg))
    _, gpu = plan_config(compose_with(shipped(), PRIMARY, ["gpu=h100-80gb", "gpu.memory=1e9"]))
    assert gpu is not None and (gpu.name, gpu.memory) == ("H100 SXM 80 GB", 1e9)
    for override, part in (
        ("plan.efficiency=2", "plan.efficiency=2 is out of range"),
        ("plan.headroom=1", "plan.headroom=1 is out of range"),
        ("+plan.gpu=8", "did you mean plan.gpus?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            plan_config(compose_with(shipped(), PRIMARY, [override]))


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "gpu"])
def test_every_gpu_has_all_its_figures(option: str) -> None:
    _, gpu = plan_config(compose_with(shipped(), PRIMARY, [f"gpu='{option}'"]))
    assert gpu is not None
    # slower step by step: its memory, its links, the host, other nodes; and products in fp32
    assert gpu.bandwidth > gpu.link >= gpu.host >= gpu.network / 2 and gpu.bf16 > gpu.fp32


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rc=fixed"], "rc.rule=fixed needs its weight: rc.alpha"),
        (["rc=fixed", "rc.alpha=12"], r"rc.alpha=12 is beyond the clamp .* set rc.alpha_max=null"),
        (["rc=fixed", "rc.alpha=0.4", "rc.alpha_max=2"], "rc.alpha=0.4 is beyond .* rc.alpha_max=2,"),
        (["rc=on", "rc.alpha=2"], "rc.alpha=2 is read by rc=fixed alone"),
        (["rc=edge", "rc.target=0.05"], "rc.target=0.05 is read by rc=loop alone"),
        (["rc=loop", "rc.scope=pair"], "rc.scope=pair .* needs rc.rule=center or edge"),
        (["rc=on", "rc.scope=pair", "rc.band=samples"], "rc.scope=pair .* rc.band=batch"),
        (["rc=on", "rc.scope=pair", "rc.ema=0.5"], "rc.ema=0.5: rc.scope=pair averages nothing"),
        (["rc=loop", "rc.control.pairs=4"], "rc.control.pairs=4 is out of range"),
        (["rc=loop", "rc.control.every=0"], "rc.control.every=0 is out of range"),
        (["rc=loop", "rc.control.evry=2"], r"unknown key rc\.control\.evry; did you mean rc\.control\.every"),
        (["rc=loop", "rc.control=3"], "rc.control"),
        (["rc=lop"], "rc"),
    ],
)
def test_settings_of_calibration_that_no_rule_reads_are_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        composed(*overrides)


@pytest.mark.parametrize("name", ["edge", "loop"])
def test_one_word_chooses_the_rule(name: str) -> None:
    found = composed(f"rc={name}")
    assert found.rc == dataclasses.replace(composed("rc=on").rc, rule=name)
