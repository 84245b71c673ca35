"""Settings of TRL, LLaMA-Factory, and alignment-handbook as overrides, and what has no counterpart here.

A key whose meaning differs is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rcpo.config.foreign_names import (
    ALWAYS,
    ATTENTION,
    DIVERGENCES,
    HINTS,
    INTERVALS,
    LOSSES,
    NUMBERS,
    OPTIMIZERS,
    PLACES,
    SAME,
    SCHEDULES,
    SILENT,
    STRATEGIES,
    SWITCHES,
    UNLIMITED,
)
from rcpo.config.paths import conf_dir
from rcpo.config.schema import ObjectiveConfig
from rcpo.errors import ConfigError
from rcpo.system.text import first_line


@dataclass
class Conversion:
    """`settings` are ours by key, with `notes` on some; `left` says why a key of theirs is not converted."""

    settings: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

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
        elif value is not (name in ALWAYS):
            made.left[name] = HINTS.get(name, "")
    _finish(made, tree)
    return made


def _readable(tree: Mapping[str, Any], left: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The keys with a value, numbers as numbers; `left` gets those that should be a number or a switch."""
    for name, value in tree.items():
        if name in SILENT or (value is None and name not in UNLIMITED):
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
    if ours.get("model.trust_remote_code") is False:
        del ours["model.trust_remote_code"]  # the default, which packaged models lack
    if "model.path" in ours:
        ours["model"] = "local"
    if "data.path" in ours or "data.sources" in ours:
        ours["data"] = "pairs"
    _finish_adapter(made, tree)
    _finish_batch(made, tree)
    _finish_lengths(made, tree)
    _finish_schedule(made, tree)
    _finish_reference(made, tree)
    _finish_objective(made, tree)
    if "adam_beta1" in tree or "adam_beta2" in tree:
        ours["optim.betas"] = [tree.get("adam_beta1", 0.9), tree.get("adam_beta2", 0.999)]


def _finish_adapter(made: Conversion, tree: Mapping[str, Any]) -> None:
    bits, kind = tree.get("quantization_bit"), tree.get("finetuning_type")
    if bits not in (None, 4):
        made.left["quantization_bit"] = HINTS["load_in_8bit"]
    if tree.get("use_peft") or kind == "lora":
        made.settings["adapter"] = "qlora" if tree.get("load_in_4bit") or bits == 4 else "lora"
        return
    if kind not in (None, "full"):
        made.left["finetuning_type"] = f"rcpo has no {kind}; it trains all weights, or adapter=lora"
    for name in tree:
        ours = SAME.get(name) or PLACES.get(name, "")
        if ours.startswith("adapter.") or (ours == "adapter=qlora" and tree[name]):
            made.settings.pop(ours, None)
            made.left.setdefault(name, "without use_peft or finetuning_type=lora rcpo trains all weights")


def _finish_batch(made: Conversion, tree: Mapping[str, Any]) -> None:
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if batch & {*tree} and not batch & {*made.left}:
        size, steps = tree.get("per_device_train_batch_size", 8), tree.get("gradient_accumulation_steps", 1)
        made.settings["train.batch_size"] = size * steps
        made.notes["train.batch_size"] = "is for one process; multiply it by their number"


def _finish_lengths(made: Conversion, tree: Mapping[str, Any]) -> None:
    if "max_prompt_length" in tree:
        if "truncation_mode" in tree:
            made.settings["data.truncation"] = tree["truncation_mode"]
        return
    if "data.max_length" in made.settings:
        made.settings["data.max_prompt_length"] = None  # one limit for prompt and response, as there
    if "truncation_mode" in tree:
        made.left["truncation_mode"] = "it cuts prompt and response as one; data.truncation is about prompts"


def _finish_schedule(made: Conversion, tree: Mapping[str, Any]) -> None:
    if tree.get("lr_scheduler_type") == "constant":
        for name in ("warmup_ratio", "warmup_steps"):
            if made.settings.pop(f"optim.{name}", None) is not None:
                made.left[name] = "their constant has no warm-up; constant_with_warmup has"
    if {"optim.warmup_ratio", "optim.warmup_steps"} <= {*made.settings}:
        del made.settings["optim.warmup_ratio"]
        made.left["warmup_ratio"] = "warmup_steps take precedence there"
    for name, key in STRATEGIES.items():
        value = tree.get(name, "steps")
        if value == "steps":
            continue
        made.settings.pop(key, None)
        if value not in ("no", False):
            made.left[name] = f"rcpo counts steps: give {key}=STEPS"
        elif name == "save_strategy":
            made.left[name] = "rcpo also saves by time, see checkpoint.minutes"


def _finish_reference(made: Conversion, tree: Mapping[str, Any]) -> None:
    if tree.get("sync_ref_model"):
        made.settings["reference.sync_every"] = tree.get("ref_model_sync_steps", 512)
        made.settings["reference.mode"] = "model"
        return
    made.settings.pop("reference.mixup", None)
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if name in tree:
            made.left[name] = "without sync_ref_model the reference stays as it is"


def _finish_objective(made: Conversion, tree: Mapping[str, Any]) -> None:
    ours = made.settings
    for key in ("objective.epsilon", "objective.alpha"):
        if ours.get(key) == 0:
            del ours[key]  # off there; most objectives lack it
    if ours.get("objective.divergence") != "alpha":
        ours.pop("objective.divergence_alpha", None)
    if ours.get("objective.divergence") == "reverse_kl":
        del ours["objective.divergence"]
    if "gamma_beta_ratio" in tree:
        if "objective.beta" in ours:
            ours["objective.gamma"] = tree["gamma_beta_ratio"] * ours["objective.beta"]
        else:
            made.left["gamma_beta_ratio"] = "a share of beta, which the file lacks; give objective.gamma"
    if "objective.alpha" in ours and ours.get("objective") == "simpo":
        ours["objective"] = "alphapo"
    if "cpo_alpha" in tree:
        _finish_cpo(made, tree["cpo_alpha"])
    if ours.get("objective") == "mix":
        _finish_mixture(made, tree.get("loss_weights"))
        return
    if tree.get("loss_weights", [1.0]) != [1.0]:
        made.left["loss_weights"] = "rcpo weights only the parts of objective=mix"
    if ours.get("objective") == "ipo" and "objective.beta" in ours:
        ours["objective.tau"] = ours.pop("objective.beta")


def _finish_cpo(made: Conversion, weight: float) -> None:
    """The losses of their CPOTrainer have no reference, sums, and an NLL term of means."""
    if "loss_type" in made.left:
        made.left["cpo_alpha"] = "it belongs to their loss_type"
        return
    objective = made.settings.get("objective", "dpo")
    if objective in ("simpo", "alphapo"):
        made.settings["objective.nll_coef"] = weight
        return
    made.settings.pop("objective.gamma", None)  # SimPO's
    if objective == "dpo":
        cpo = {"reduction": "sum", "lambda_nll": 0.0, "nll_coef": weight}
        made.settings |= {"objective": "cpo"} | {f"objective.{name}": value for name, value in cpo.items()}
    else:
        del made.settings["objective"]
        made.left["loss_type"] = f"rcpo has no {objective} without a reference; see objective=slic"


def _finish_mixture(made: Conversion, weights: Any) -> None:
    """Weights of the parts, and the settings that are each part's own here."""
    ours, parts = made.settings, made.settings["objective.parts"]
    beta, epsilon = ours.pop("objective.beta", None), ours.pop("objective.epsilon", None)
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(parts)):
        made.left["loss_weights"] = f"{weights!r} is not a list of {len(parts)} weights"
        weights = None
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        name = part["name"]
        part["weight"] = weight
        if name == "dpo_mean":
            part |= {"name": "dpo", "reduction": "mean"}
        if beta is not None and name != "sft":
            part["tau" if name == "ipo" else "beta"] = beta
        if epsilon is not None and name in ("dpo", "dpo_mean", "robust", "exo"):
            part["epsilon"] = epsilon


def _loss(made: Conversion, name: str, value: Any) -> None:
    losses = value if isinstance(value, list) else [value]
    losses = losses or [value]
    if "aot" in losses:
        made.left[name] = "aot means pairs or not, by TRL's version: choose objective=aot or aot_unpaired"
    elif len(losses) > 1 and all(loss in LOSSES for loss in losses):
        made.settings |= {"objective": "mix", "objective.parts": [{"name": LOSSES[loss]} for loss in losses]}
    elif len(losses) > 1:
        made.left[name] = "rcpo does not have all of these; see objective=mix and objective.parts"
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


def _interval(made: Conversion, name: str, value: Any) -> None:
    if 0 < value < 1:
        made.left[name] = f"{value} is a share of all steps; give {INTERVALS[name]}=STEPS"
    else:
        made.settings[INTERVALS[name]] = value


def _held_out(made: Conversion, name: str, value: Any) -> None:
    if value < 1:
        made.settings["data.eval_fraction"] = value
    else:
        made.left[name] = f"{value} examples; rcpo holds out a share: give data.eval_fraction"


def _divergence_alpha(made: Conversion, name: str, value: Any) -> None:
    if value == 0.5:
        made.settings["objective.divergence_alpha"] = value
    else:
        made.left[name] = "α or 1 − α, by TRL's version: give objective.divergence_alpha"


def _weighting(made: Conversion, name: str, value: Any) -> None:
    if value:
        made.settings["objective.weighting"] = "wpo"


def _half(made: Conversion, name: str, value: Any) -> None:
    if not value:
        return
    other = made.settings.setdefault("train.dtype", name)
    if other != name:
        made.left[name] = f"{other} is true, too; train.dtype is one of them"


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
    names = (value or ["none"]) if isinstance(value, list) else [value]
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
    "f_divergence_type": lambda made, name, value: made.choose(
        name, value, DIVERGENCES, "objective.divergence"
    ),
    "f_alpha_divergence_coef": _divergence_alpha,
    "use_weighting": _weighting,
    **dict.fromkeys(INTERVALS, _interval),
    "val_size": _held_out,
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
            *("ref_model_sync_steps", "gamma_beta_ratio", "loss_weights", "cpo_alpha", "truncation_mode"),
            *STRATEGIES,
        ),
        _ignore,
    ),
}


def as_overrides(made: Conversion, given: Sequence[str]) -> list[str]:
    """The overrides of a conversion, groups first, without those whose key the user gives.

    Settings that the objective does not have, which may be the user's choice, join what is left out.
    """
    words = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in given)}
    taken = set(words)
    elsewhere = {"experiment", "--config-name", "-cn"} & taken  # these may choose another than the default
    objective = words.get("objective", made.settings.get("objective", "" if elsewhere else "dpo"))
    known = _settings_of(objective)
    for key in [key for key in made.settings if key.startswith("objective.") and key not in taken]:
        name = key.removeprefix("objective.")
        if known and name not in known:
            del made.settings[key]
            made.left[key] = f"objective={objective} has no {name}"
    order = sorted(made.settings.items(), key=lambda item: "." in item[0])
    return [f"{key}={in_grammar(value)}" for key, value in order if key not in taken]


def _settings_of(objective: str) -> set[str]:
    """The settings that a packaged objective has; empty for any other."""
    file = conf_dir() / "objective" / f"{objective}.yaml"
    if not file.is_file():
        return set()
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    bases = [base for base in tree.get("defaults", ()) if base != "_self_"]
    return {*tree, *(field.name for field in fields(ObjectiveConfig))}.union(*map(_settings_of, bases))


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
