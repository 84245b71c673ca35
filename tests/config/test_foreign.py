"""Configurations of TRL, LLaMA-Factory, and alignment-handbook become overrides, and the rest is listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from rcpo.config.composition import compose, split_arguments
from rcpo.config.foreign import SPECIAL, as_overrides, convert, in_grammar
from rcpo.config.foreign_names import LOSSES, OPTIMIZERS, PLACES, SAME, SCHEDULES, counterpart
from rcpo.config.hyperparameters import HYPERPARAMETERS
from rcpo.config.parsing import known_keys, parse
from rcpo.config.paths import conf_dir
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError

HANDBOOK = """
model_name_or_path: org/sft-model
torch_dtype: float16
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
dataset_mixer:
  org/pairs: 1.0
dataset_splits: [train_prefs, test_prefs]
bf16: true
beta: 0.01
do_eval: true
gradient_accumulation_steps: 4
learning_rate: 5.0e-6
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: paged_adamw_32bit
output_dir: data/out
per_device_train_batch_size: 4
push_to_hub: true
seed: 42
warmup_ratio: 0.1
"""
FACTORY = """
model_name_or_path: org/chat
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 2.5
pref_loss: simpo
simpo_gamma: 1.2
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""


def converted(text: str, tmp_path: Path, *more: str) -> RunConfig:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    flags = split_arguments(["--from-trl", str(file), *more])
    return parse(compose(flags.overrides))


def test_a_recipe_of_the_handbook_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(HANDBOOK, tmp_path, "seed=7")
    assert (config.model.path, config.data.path) == ("org/sft-model", "org/pairs")
    assert (config.data.split, config.data.eval_split) == ("train_prefs", "test_prefs")
    assert (config.objective.name, config.objective.hyperparameters["beta"]) == ("dpo", 0.01)
    assert (config.adapter.quantization, config.adapter.r, config.adapter.alpha) == ("nf4", 16, 32)
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_ratio) == (5e-6, "cosine", 0.1)
    assert (config.train.batch_size, config.train.micro_batch_size, config.train.dtype) == (16, 4, "bf16")
    assert config.optim.name == "paged_adamw_32bit"
    assert (config.data.max_length, config.data.max_prompt_length) == (1024, 512)
    assert config.seed == 7  # the command line takes precedence
    left = capsys.readouterr().err
    for line in (
        "lora_dropout is not converted (adapters have no dropout)",
        "push_to_hub is not converted (afterwards: rcpo push run=DIR repo=OWNER/NAME)",
        "torch_dtype is not converted",
        "train.batch_size=16 is for one process",
    ):
        assert line in left
    assert "gradient_accumulation_steps is not converted" not in left  # it is
    assert "do_eval" not in left and "seed=42" not in left


def test_a_configuration_of_llama_factory_is_converted(tmp_path: Path) -> None:
    config = converted(FACTORY, tmp_path, "data=pairs", "data.path=org/pairs")
    assert config.objective.name == "simpo"
    assert config.objective.hyperparameters == {"beta": 2.5, "gamma": 1.2}
    assert (config.adapter.name, config.adapter.target_modules) == ("lora", ["all-linear"])
    assert (config.optim.lr, config.train.epochs, config.data.max_examples) == (5e-6, 3, 1000)


@pytest.mark.parametrize(
    ("tree", "settings"),
    [
        ({"loss_type": "ipo", "beta": 0.2}, {"objective": "ipo", "objective.tau": 0.2}),
        ({"loss_type": ["exo_pair"]}, {"objective": "exo"}),
        ({"beta": 2.0, "gamma_beta_ratio": 0.5}, {"objective.beta": 2.0, "objective.gamma": 1.0}),
        ({"max_steps": -1, "max_grad_norm": 0}, {"train.max_grad_norm": None}),
        ({"warmup_steps": 0.1}, {"optim.warmup_ratio": 0.1}),
        ({"warmup_steps": 100}, {"optim.warmup_steps": 100}),
        ({"label_smoothing": 0.0}, {}),
        ({"label_smoothing": 0.1, "loss_type": "robust"}, {"objective": "robust", "objective.epsilon": 0.1}),
        ({"loss_type": "sigmoid_norm", "beta": 2.0}, {"objective": "dpo_mean", "objective.beta": 2}),
        ({"loss_type": "apo_zero_unpaired"}, {"objective": "apo_zero_unpaired"}),
        (
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5},
            {
                "objective": "mix",
                "objective.parts": [
                    {"name": "dpo", "weight": 0.8, "beta": 0.5},
                    {"name": "bco", "weight": 0.2, "beta": 0.5},
                    {"name": "sft", "weight": 1.0},
                ],
            },
        ),
        (
            {"loss_type": ["sigmoid_norm", "ipo"], "beta": 0.5, "label_smoothing": 0.1},
            {
                "objective": "mix",
                "objective.parts": [
                    {"name": "dpo", "weight": 1.0, "reduction": "mean", "beta": 0.5, "epsilon": 0.1},
                    {"name": "ipo", "weight": 1.0, "tau": 0.5},
                ],
            },
        ),
        ({"loss_type": "simpo", "cpo_alpha": 0.5}, {"objective": "simpo", "objective.nll_coef": 0.5}),
        (
            {"cpo_alpha": 1.0, "beta": 0.2},
            {
                "objective": "cpo",
                "objective.beta": 0.2,
                "objective.reduction": "sum",
                "objective.lambda_nll": 0.0,
                "objective.nll_coef": 1,
            },
        ),
        ({"loss_type": "simpo", "alpha": 0.25}, {"objective": "alphapo", "objective.alpha": 0.25}),
        ({"f_divergence_type": "js_divergence"}, {"objective.divergence": "js"}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
            {"objective.divergence": "alpha", "objective.divergence_alpha": 0.5},
        ),
        ({"push_to_hub": False, "padding_free": False, "disable_dropout": True}, {}),
        ({"use_weighting": True}, {"objective.weighting": "wpo"}),
        ({"max_length": 2048}, {"data.max_length": 2048, "data.max_prompt_length": None}),
        ({"max_length": None}, {"data.max_length": None, "data.max_prompt_length": None}),
        (
            {"max_length": 64, "max_prompt_length": 32, "truncation_mode": "keep_start"},
            {"data.max_length": 64, "data.max_prompt_length": 32, "data.truncation": "keep_start"},
        ),
        ({"learning_rate": "5.0e-6"}, {"optim.lr": 5e-6}),  # in quotes
        ({"eval_strategy": "steps", "eval_steps": 50}, {"eval.every": 50}),
        ({"eval_strategy": False, "eval_steps": 50}, {}),  # what YAML makes of no
        ({"torch_compile": True}, {"train.compile": True}),
        ({"report_to": []}, {"tracking": ["none"]}),
        ({"lora_r": 16}, {}),  # without use_peft all weights are trained
        ({"adam_beta2": 0.95}, {"optim.betas": [0.9, 0.95]}),
        ({"report_to": ["wandb", "tensorboard"]}, {"tracking": ["wandb", "tensorboard"]}),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, {"optim.min_lr_ratio": 0.1}),
        (
            {"sync_ref_model": True, "ref_model_sync_steps": 64, "ref_model_mixup_alpha": 0.5},
            {"reference.sync_every": 64, "reference.mixup": 0.5, "reference.mode": "model"},
        ),
        (
            {"dataset_mixer": {"a/b": 1.0, "c/d": 0.5}},
            {
                "data": "pairs",
                "data.sources": [{"path": "a/b", "weight": 1.0}, {"path": "c/d", "weight": 0.5}],
            },
        ),
    ],
)
def test_keys_that_need_more_than_another_name(tree: dict[str, Any], settings: dict[str, Any]) -> None:
    assert convert(tree).settings == settings


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"loss_type": ["sigmoid", "unheard_of"]}, "rcpo does not have all of these"),
        ({"loss_type": "aot"}, "by TRL's version"),
        ({"loss_type": "unheard_of"}, "unheard_of has no counterpart"),
        ({"num_train_epochs": 0.5}, "0.5 is not a whole number"),
        ({"stage": "ppo"}, "rcpo trains on preferences"),
        ({"neftune_noise_alpha": 5}, ""),
        ({"padding_free": True}, "data.layout and data.group_by_length save padding"),
        ({"use_liger_kernel": True}, "rcpo never holds all logits at once"),
        ({"datasets": [{"path": "a/b"}]}, "give data.sources"),
        ({"val_size": 500}, "give data.eval_fraction"),
        ({"save_steps": 0.1}, "give checkpoint.every=STEPS"),
        ({"save_strategy": "epoch"}, "give checkpoint.every=STEPS"),
        ({"save_strategy": "no"}, "rcpo also saves by time"),
        ({"truncation_mode": "keep_start"}, "cuts prompt and response as one"),
        ({"f_alpha_divergence_coef": 0.3}, "by TRL's version"),
        ({"gamma_beta_ratio": 0.5}, "a share of beta, which the file lacks"),
        ({"finetuning_type": "freeze"}, "rcpo has no freeze"),
        ({"quantization_bit": 8}, "rcpo holds frozen weights in 4 bits"),
        ({"load_in_4bit": True}, "rcpo trains all weights"),
        ({"lora_r": 16}, "rcpo trains all weights"),
        ({"lora_target": "all"}, "rcpo trains all weights"),
        ({"ref_model_mixup_alpha": 0.5}, "without sync_ref_model"),
        ({"ref_model_sync_steps": 64}, "without sync_ref_model"),
        ({"disable_dropout": False}, "rcpo always turns dropout off"),
        ({"reference_free": True}, "choose an objective without a reference"),
    ],
)
def test_what_has_no_counterpart_is_left_with_a_reason(tree: dict[str, Any], reason: str) -> None:
    made = convert(tree)
    assert made.settings == {} and list(made.left) == list(tree)
    assert reason in made.left[next(iter(tree))]


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        ({"max_steps": "many"}, "max_steps"),
        ({"num_train_epochs": "three"}, "num_train_epochs"),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": "auto"},
            "gradient_accumulation_steps",
        ),
        ({"bf16": "no"}, "bf16"),
        ({"precompute_ref_log_probs": "false"}, "precompute_ref_log_probs"),
        ({"dataset_mixer": ["a", "b"]}, "dataset_mixer"),
        ({"dataset_mixer": "x"}, "dataset_mixer"),
        ({"use_peft": True, "lora_target_modules": 5}, "lora_target_modules"),
        ({"report_to": {"a": "b"}}, "report_to"),
        ({"beta": 2.0, "gamma_beta_ratio": "half"}, "gamma_beta_ratio"),
        ({"loss_type": []}, "loss_type"),
    ],
)
def test_a_value_of_another_kind_is_left_out_and_named(tree: dict[str, Any], left: str) -> None:
    made = convert(tree)
    assert repr(tree[left]) in made.left[left]
    assert not {"train.dtype", "reference.mode", "data.path", "objective", "objective.gamma"} & {
        *made.settings
    }


def test_two_precisions_at_once_are_named() -> None:
    made = convert({"bf16": True, "fp16": True})
    assert made.settings["train.dtype"] == "bf16" and "bf16 is true, too" in made.left["fp16"]


def test_a_constant_rate_of_theirs_does_not_warm_up() -> None:
    """transformers' `constant` ignores the warm-up; its `constant_with_warmup` has one."""
    made = convert({"lr_scheduler_type": "constant", "warmup_ratio": 0.1})
    assert made.settings == {"optim.schedule": "constant"} and list(made.left) == ["warmup_ratio"]
    made = convert({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1})
    assert made.settings == {"optim.schedule": "constant", "optim.warmup_ratio": 0.1} and not made.left


def test_losses_of_cpo_without_a_counterpart_do_not_become_losses_with_a_reference() -> None:
    made = convert({"loss_type": "hinge", "cpo_alpha": 1.0})
    assert made.settings == {} and "rcpo has no hinge without a reference" in made.left["loss_type"]


def test_a_loss_of_cpo_that_is_not_known_does_not_become_cpo() -> None:
    made = convert({"loss_type": "unheard_of", "cpo_alpha": 1.0})
    assert made.settings == {} and list(made.left) == ["loss_type", "cpo_alpha"]


def test_the_weight_of_a_loss_alone_is_left_out_unless_it_is_one() -> None:
    assert list(convert({"loss_type": "ipo", "loss_weights": [0.5]}).left) == ["loss_weights"]
    assert not convert({"loss_type": "ipo", "loss_weights": [1.0]}).left


def test_weights_that_do_not_match_their_losses_are_left_out() -> None:
    made = convert({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8]})
    assert [part["weight"] for part in made.settings["objective.parts"]] == [1.0, 1.0]
    assert "not a list of 2 weights" in made.left["loss_weights"]


def test_a_mixture_of_losses_is_a_configuration_that_trains(tmp_path: Path) -> None:
    config = converted("loss_type: [sigmoid, sft]\nloss_weights: [0.8, 1.0]\nbeta: 0.3", tmp_path)
    assert config.objective.name == "mix"
    assert config.objective.hyperparameters["parts"] == [
        {"name": "dpo", "weight": 0.8, "beta": 0.3},
        {"name": "sft", "weight": 1.0},
    ]


@pytest.mark.parametrize(
    ("trainer", "settings", "objective"),
    [
        ("DPO", {"loss_type": "hinge", "beta": 0.2}, ("hinge", "sum", {"beta": 0.2})),
        ("DPO", {"loss_type": "ipo", "beta": 0.2}, ("ipo", "mean", {"tau": 0.2})),
        ("KTO", {}, ("kto", "sum", {"beta": 0.1, "lambda_chosen": 1.0, "lambda_rejected": 1.0})),
        ("CPO", {}, ("cpo", "sum", {"beta": 0.1, "lambda_nll": 0.0})),
        (
            "CPO",
            {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0},
            ("alphapo", "mean", {"beta": 2, "gamma": 0.5, "alpha": 0.25}),
        ),
    ],
)
def test_all_that_a_configuration_of_trl_holds_is_converted(
    trainer: str, settings: dict[str, Any], objective: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    """Its dictionary has every default of TRL's, which are rcpo's settings then."""
    import trl
    from trl.experimental.cpo import CPOConfig

    kind = CPOConfig if trainer == "CPO" else getattr(trl, f"{trainer}Config")
    args = kind(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **settings)
    config = converted(yaml.safe_dump(args.to_dict()), tmp_path, "data=pairs", "data.path=org/pairs")
    found = config.objective
    assert (found.name, found.reduction, found.hyperparameters) == objective
    assert (config.optim.lr, config.optim.schedule, config.train.epochs) == (1e-6, "linear", 3)
    assert (config.data.max_length, config.data.max_prompt_length, config.seed) == (1024, None, 42)


def test_a_batch_size_of_the_user_s_needs_no_note_on_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = converted("per_device_train_batch_size: 4", tmp_path, "train.batch_size=64")
    assert config.train.batch_size == 64
    assert "for one process" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("learning_rate=1e-6", "unknown key learning_rate; did you mean optim.lr?"),
        ("optim.learning_rate=1e-6", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("train.save_steps=5", "unknown key train.save_steps; did you mean checkpoint.every?"),
        ("gradient_accumulation_steps=4", "did you mean train.batch_size (the pairs of a step, over all"),
        ("bf16=true", "unknown key bf16; did you mean train.dtype=bf16?"),
        ("lora_dropout=0.1", "unknown key lora_dropout; adapters have no dropout"),
        ("reference_free=true", "choose an objective without a reference, such as simpo, cpo, or orpo"),
        ("objective=exo_pair", "there is no such objective; did you mean exo?"),
        ("optim=adamw_torch_fused", "there is no such optim; did you mean adamw?"),
    ],
)
def test_a_name_of_theirs_on_the_command_line_is_answered_with_ours(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(compose([given]))


def test_every_name_of_theirs_has_a_place_here() -> None:
    ours = {*known_keys()} | {f"objective.{name}" for name in HYPERPARAMETERS} | {"hydra.run.dir"}
    leaves = {key.rpartition(".")[2] for key in ours}
    assert {name for name in (*SAME, *SPECIAL) if counterpart(name) is None} <= leaves
    assert {re.split("[ =]", place)[0] for place in (*SAME.values(), *PLACES.values())} <= ours


def test_numbers_in_quotes_are_numbers() -> None:
    """YAML reads 1e-1 as text, and people quote."""
    tree = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "2", "max_steps": "100"}
    made = convert(tree | {"beta": "1e-1", "gamma_beta_ratio": "0.5"}).settings
    assert (made["train.batch_size"], made["train.max_steps"]) == (8, 100)
    assert (made["objective.beta"], made["objective.gamma"]) == (0.1, 0.05)


def test_names_that_are_converted_to_exist_here() -> None:
    objectives = {file.stem for file in (conf_dir() / "objective").glob("*.yaml")}
    assert set(LOSSES.values()) <= objectives
    assert set(OPTIMIZERS.values()) <= {file.stem for file in (conf_dir() / "optim").glob("*.yaml")}
    assert set(SCHEDULES.values()) <= {"constant", "linear", "cosine", "cosine_with_min_lr", "wsd"}
    assert not set(SAME) & set(SPECIAL)


def test_names_of_theirs_are_those_of_the_installed_trl() -> None:
    import dataclasses

    from trl import DPOConfig, ModelConfig, ScriptArguments

    theirs = {
        field.name for kind in (DPOConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(kind)
    }
    ours = {*SAME, *SPECIAL}
    # of older versions, of TRL's other trainers, of LLaMA-Factory, and of the handbook
    others = {
        *("max_prompt_length", "rpo_alpha", "ref_model", "warmup_ratio", "save_total_limit"),
        *("simpo_gamma", "desirable_weight", "undesirable_weight", "precompute_ref_log_probs"),
        *("adapter_name_or_path", "lora_rank", "lora_target", "finetuning_type", "quantization_bit"),
        *("cutoff_len", "max_samples", "streaming", "val_size", "flash_attn", "stage"),
        *(
            "pref_beta",
            "pref_loss",
            "pref_ftx",
            "dpo_label_smoothing",
            "kto_chosen_weight",
            "kto_rejected_weight",
        ),
        *("dataset_mixer", "dataset_splits", "gamma_beta_ratio", "preprocessing_num_workers"),
        *("cpo_alpha", "alpha", "evaluation_strategy", "group_by_length"),
        "sft_weight",
    }
    assert ours - theirs <= others


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ([1, "a"], "[1,a]"),
        ("it's", r"'it\'s'"),
        ({"path": "a/b", "weight": 0.5}, "{path:'a/b',weight:0.5}"),
        ("5e-6", "5e-6"),
    ],
)
def test_values_survive_hydra_s_grammar(value: Any, text: str) -> None:
    assert in_grammar(value) == text
    if value is not None and not isinstance(value, bool):
        given = compose([f"++data.template_options={{x:{text}}}"]).data.template_options.x
        assert given == (5e-6 if value == "5e-6" else value)


def test_a_key_that_the_user_gives_is_not_taken_from_the_file() -> None:
    made = convert({"learning_rate": 1e-5, "beta": 0.3, "loss_type": "hinge"})
    assert as_overrides(made, ["optim.lr=1e-6"]) == ["objective=hinge", "objective.beta=0.3"]


@pytest.mark.parametrize(
    ("text", "given", "expected", "left"),
    [
        ("loss_type: ipo\nbeta: 0.3", ["objective=simpo"], ("simpo", {"beta": 2.0, "gamma": 1.0}), "tau"),
        ("loss_type: [sigmoid, sft]", ["objective=orpo"], ("orpo", {"beta": 0.1}), "parts"),
        ("loss_type: ipo\nlabel_smoothing: 0.1", [], ("ipo", {"tau": 0.1}), "epsilon"),
        ("loss_type: sigmoid_norm\nlabel_smoothing: 0.1", [], ("dpo", None), None),
    ],
)
def test_settings_that_the_objective_lacks_are_left_out_and_named(
    text: str,
    given: list[str],
    expected: tuple[str, dict[str, float] | None],
    left: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = converted(text, tmp_path, *given).objective
    name, settings = expected
    assert found.name == name and settings in (None, found.hyperparameters)
    told = capsys.readouterr().err
    if left is None:
        assert found.hyperparameters["epsilon"] == 0.1 and "not converted" not in told
    else:
        assert f"objective.{left} is not converted (objective=" in told


def test_an_experiment_s_objective_keeps_its_settings() -> None:
    assert as_overrides(convert({"simpo_gamma": 1.2}), ["experiment=mine"]) == ["objective.gamma=1.2"]
    assert as_overrides(convert({"simpo_gamma": 1.2}), []) == []  # the default is dpo, which has none


def test_steps_of_warm_up_take_precedence_over_a_share_as_there() -> None:
    made = convert({"warmup_ratio": 0.1, "warmup_steps": 10})
    assert made.settings == {"optim.warmup_steps": 10} and list(made.left) == ["warmup_ratio"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1]", "is not a mapping"), ("a: [", "cannot be read as YAML"), (None, "cannot be read")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "a.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"--from-trl {re.escape(str(file))} {reason}"):
        split_arguments([f"--from-trl={file}"])
    with pytest.raises(ConfigError, match="--from-trl needs a YAML file"):
        split_arguments(["--from-trl"])


def test_the_table_of_the_page_is_about_the_keys_that_are_converted() -> None:
    page = (conf_dir().parent / "rcpo/integrations/README.md").read_text(encoding="utf-8")
    rows = page.partition("## Coming from TRL")[2].splitlines()
    theirs = {
        name
        for row in rows
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.rsplit("|", 2)[0])
    }
    assert len(theirs) > 60 and theirs - {*SAME, *SPECIAL} == {"dataset"}
