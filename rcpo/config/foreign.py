"""Settings of TRL, LLaMA-Factory, and alignment-handbook as overrides, and what has no counterpart here.

Key names are those of TRL's DPOConfig, CPOConfig, KTOConfig, ModelConfig, and ScriptArguments, of
LLaMA-Factory's training YAML, and of the handbook's recipes. A key whose meaning differs is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rcpo.errors import ConfigError
from rcpo.system.text import first_line

# their key: ours, where the value is the same
SAME = {
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "seed": "seed",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "logging_steps": "log.every",
    "eval_steps": "eval.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "hydra.run.dir",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adapter_name_or_path": "adapter.path",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "ref_model": "reference.path",
    "ref_model_mixup_alpha": "reference.mixup",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_streaming": "data.streaming",
    "streaming": "data.streaming",
    "max_samples": "data.max_examples",
    "max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "truncation_mode": "data.truncation",
    "dataset_num_proc": "data.workers",
    "preprocessing_num_workers": "data.workers",
    "val_size": "data.eval_fraction",
    "label_smoothing": "objective.epsilon",
    "dpo_label_smoothing": "objective.epsilon",
    "rpo_alpha": "objective.nll_coef",
    "pref_ftx": "objective.nll_coef",
    "simpo_gamma": "objective.gamma",
    "desirable_weight": "objective.lambda_chosen",
    "undesirable_weight": "objective.lambda_rejected",
    "kto_chosen_weight": "objective.lambda_chosen",
    "kto_rejected_weight": "objective.lambda_rejected",
    "ld_alpha": "objective.length_alpha",
}
LOSSES = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "robust": "robust",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "aot_pair": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
    "simpo": "simpo",
    "orpo": "orpo",
    "kto": "kto",
    "kto_pair": "kto",
}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine_with_min_lr",
}
OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw") | {
    "sgd": "sgd",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
ATTENTION = {
    "fa2": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
}
HINTS = {
    "lora_dropout": "adapters have no dropout",
    "deepspeed": "choose engine=zero0 to zero3_offload",
    "template": "rcpo takes the tokenizer's template; see data.template",
    "chat_template": "rcpo takes the tokenizer's template; see data.template",
    "dataset": "name the file: data=pairs data.path=FILE",
    "push_to_hub": "afterwards: rcpo push run=DIR repo=OWNER/NAME",
    "hub_model_id": "afterwards: rcpo push run=DIR repo=OWNER/NAME",
    "run_name": "see tracking and wandb.name",
    "resume_from_checkpoint": "resume=auto continues in hydra.run.dir",
}
NUMBERS = {
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("adam_beta1", "adam_beta2", "ref_model_sync_steps", "gamma_beta_ratio", "beta", "pref_beta"),
}
SWITCHES = {"bf16", "fp16", "precompute_ref_log_probs", "use_peft", "load_in_4bit", "sync_ref_model"}
# what rcpo decides itself, or always does
SILENT = {
    "do_train",
    "do_eval",
    "overwrite_output_dir",
    "overwrite_cache",
    "remove_unused_columns",
    "log_level",
}


@dataclass
class Conversion:
    """`settings` are ours by key; `left` says of each of their keys that is not converted why."""

    settings: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def choose(self, their_key: str, value: Any, known: Mapping[str, str], ours: str) -> None:
        """Set ours to what a name of theirs is called here; a name without a counterpart is left."""
        if str(value) in known:
            self.settings[ours] = known[str(value)]
        else:
            self.left[their_key] = f"{value} has no counterpart"


def read_foreign(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError for another."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--from-trl {path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--from-trl {path} is not a mapping of keys to values")
    return {str(name): value for name, value in tree.items()}


def convert(tree: Mapping[str, Any]) -> Conversion:
    """What a configuration of theirs is here; a value of another kind than theirs is left."""
    made = Conversion()
    tree = dict(_readable(tree, made.left))
    for name, value in tree.items():
        if name in SPECIAL:
            try:
                SPECIAL[name](made, name, value)
            except (TypeError, AttributeError, LookupError):
                made.left[name] = f"{value!r} is not what is expected there"
        elif name in SAME:
            made.settings[SAME[name]] = value
        else:
            made.left[name] = HINTS.get(name, "")
    _finish(made, tree)
    return made


def _readable(tree: Mapping[str, Any], left: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The keys with a value, numbers as numbers; `left` gets those that should be a number or a switch."""
    for name, value in tree.items():
        if value is None or name in SILENT:
            continue
        if name in SWITCHES and not isinstance(value, bool):
            left[name] = f"{value!r} is not true or false"
        elif name in NUMBERS and (number := _number(value)) is None:
            left[name] = f"{value!r} is not a number"
        else:
            yield name, number if name in NUMBERS else value


def _number(value: Any) -> float | int | None:
    """A number, also from the text that YAML makes of quotes and of 1e-6; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _finish(made: Conversion, tree: Mapping[str, Any]) -> None:
    """Groups that keys imply, and keys that depend on each other."""
    ours = made.settings
    if "model.path" in ours:
        ours["model"] = "local"
    if "data.path" in ours or "data.sources" in ours:
        ours["data"] = "pairs"
    four_bits = bool(tree.get("load_in_4bit")) or tree.get("quantization_bit") == 4
    if tree.get("use_peft") or tree.get("finetuning_type") == "lora":
        ours["adapter"] = "qlora" if four_bits else "lora"
    else:
        for key in [key for key in ours if key.startswith("adapter.")]:
            del ours[key]
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if batch & {*tree} and not batch & {*made.left}:
        size, steps = tree.get("per_device_train_batch_size", 8), tree.get("gradient_accumulation_steps", 1)
        ours["train.batch_size"] = size * steps
        made.left["gradient_accumulation_steps"] = (
            f"train.batch_size={size * steps} is for one process; multiply it by their number"
        )
    if "adam_beta1" in tree or "adam_beta2" in tree:
        ours["optim.betas"] = [tree.get("adam_beta1", 0.9), tree.get("adam_beta2", 0.999)]
    if ours.get("objective") == "ipo" and "objective.beta" in ours:
        ours["objective.tau"] = ours.pop("objective.beta")
    if ours.get("objective.epsilon") == 0:
        del ours["objective.epsilon"]  # the default, which some objectives lack
    if tree.get("sync_ref_model"):
        ours["reference.sync_every"] = tree.get("ref_model_sync_steps", 512)
        ours["reference.mode"] = "model"
    else:
        ours.pop("reference.mixup", None)
    if "gamma_beta_ratio" in tree and "objective.beta" in ours:
        ours["objective.gamma"] = tree["gamma_beta_ratio"] * ours["objective.beta"]


def _loss(made: Conversion, name: str, value: Any) -> None:
    losses = value if isinstance(value, list) else [value]
    losses = losses or [value]
    if len(losses) > 1:
        made.left[name] = "several losses are objective=mix; see objective.parts"
    elif losses[0] == "aot":
        made.left[name] = "aot means pairs or not, by TRL's version: choose objective=aot or aot_unpaired"
    else:
        made.choose(name, losses[0], LOSSES, "objective")


def _stage(made: Conversion, name: str, value: Any) -> None:
    if value in ("kto", "sft"):
        made.settings["objective"] = value
    elif value != "dpo":
        made.left[name] = "rcpo trains on preferences, or with objective=sft"


def _warmup(made: Conversion, name: str, value: Any) -> None:
    if value:
        share = name == "warmup_ratio" or (isinstance(value, float) and value < 1)
        made.settings["optim.warmup_ratio" if share else "optim.warmup_steps"] = value


def _schedule_settings(made: Conversion, name: str, value: Any) -> None:
    rest = dict(value) if isinstance(value, dict) else {"": value}
    if "min_lr_rate" in rest:
        made.settings["optim.min_lr_ratio"] = rest.pop("min_lr_rate")
    if rest:
        made.left[name] = f"{', '.join(map(str, rest))}: see optim.*"


def _half(made: Conversion, name: str, value: Any) -> None:
    if value:
        made.settings["train.dtype"] = name


def _epochs(made: Conversion, name: str, value: Any) -> None:
    if isinstance(value, int):
        made.settings["train.epochs"] = value
    else:
        made.left[name] = f"{value} is not a whole number; give train.max_steps"


def _steps(made: Conversion, name: str, value: Any) -> None:
    if value > 0:
        made.settings["train.max_steps"] = value


def _clipping(made: Conversion, name: str, value: Any) -> None:
    made.settings["train.max_grad_norm"] = value or None


def _modules(made: Conversion, name: str, value: Any) -> None:
    names = value.split(",") if isinstance(value, str) else list(value)
    made.settings["adapter.target_modules"] = ["all-linear" if one == "all" else one for one in names]


def _mixer(made: Conversion, name: str, value: Any) -> None:
    weights = list(value.items())
    if len(weights) == 1:
        made.settings["data.path"] = weights[0][0]
    else:
        made.settings["data.sources"] = [{"path": path, "weight": weight} for path, weight in weights]


def _splits(made: Conversion, name: str, value: Any) -> None:
    train = [split for split in value if "train" in split]
    test = [split for split in value if split not in train]
    if len(train) == 1 and len(test) <= 1:
        made.settings["data.split"] = train[0]
        if test:
            made.settings["data.eval_split"] = test[0]
    else:
        made.left[name] = "several splits: see data.split, data.eval_split, data.sources"


def _reference_mode(made: Conversion, name: str, value: Any) -> None:
    made.settings["reference.mode"] = "precompute" if value else "model"


def _trackers(made: Conversion, name: str, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if set(names) <= {"wandb", "tensorboard", "mlflow", "trackio", "none"}:
        made.settings["tracking"] = names
    else:
        made.left[name] = "see tracking"


def _ignore(made: Conversion, name: str, value: Any) -> None:
    """Read in `_finish` together with others."""


SPECIAL: dict[str, Callable[[Conversion, str, Any], None]] = {
    "loss_type": _loss,
    "pref_loss": _loss,
    "stage": _stage,
    "beta": lambda made, name, value: made.settings.__setitem__("objective.beta", value),
    "pref_beta": lambda made, name, value: made.settings.__setitem__("objective.beta", value),
    "lr_scheduler_type": lambda made, name, value: made.choose(name, value, SCHEDULES, "optim.schedule"),
    "lr_scheduler_kwargs": _schedule_settings,
    "optim": lambda made, name, value: made.choose(name, value, OPTIMIZERS, "optim"),
    "attn_implementation": lambda made, name, value: made.choose(name, value, ATTENTION, "model.attention"),
    "flash_attn": lambda made, name, value: made.choose(name, value, ATTENTION, "model.attention"),
    "warmup_ratio": _warmup,
    "warmup_steps": _warmup,
    "bf16": _half,
    "fp16": _half,
    "num_train_epochs": _epochs,
    "max_steps": _steps,
    "max_grad_norm": _clipping,
    "lora_target_modules": _modules,
    "lora_target": _modules,
    "dataset_mixer": _mixer,
    "dataset_splits": _splits,
    "precompute_ref_log_probs": _reference_mode,
    "report_to": _trackers,
    **dict.fromkeys(
        (
            *("gradient_accumulation_steps", "adam_beta1", "adam_beta2", "use_peft", "finetuning_type"),
            *("load_in_4bit", "quantization_bit", "sync_ref_model"),
            *("ref_model_sync_steps", "gamma_beta_ratio"),
        ),
        _ignore,
    ),
}


def as_overrides(made: Conversion, given: Sequence[str]) -> list[str]:
    """The overrides of a conversion, groups first, without those whose key the user gives."""
    taken = {word.lstrip("+").partition("=")[0] for word in given}
    order = sorted(made.settings.items(), key=lambda item: "." in item[0])
    return [f"{key}={in_grammar(value)}" for key, value in order if key not in taken]


def in_grammar(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(in_grammar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{in_grammar(item)}' for name, item in value.items())}}}"
    if isinstance(value, int | float):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return str(value) if str(value).replace("_", "").replace("-", "").isalnum() else f"'{escaped}'"
