"""Ranges, enumerations and files: what types alone do not say about a `RunConfig`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rcpo.config.data import check_data
from rcpo.config.judge import check_judge
from rcpo.config.model import check_models
from rcpo.config.paths import is_file, readable_folder
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError

# the held-out means that an evaluation while training may have
BEST_METRICS = (
    *("eval/loss", "eval/rewards/chosen", "eval/rewards/rejected", "eval/rewards/margins"),
    *("eval/rewards/accuracies", "eval/logps/chosen", "eval/logps/rejected", "eval/logps/accuracies"),
    *("eval/logratios/chosen", "eval/logratios/rejected", "eval/winner_fell", "eval/exact_match"),
    *("eval/token_logps/chosen", "eval/token_logratios/chosen", "eval/token_logratios/rejected"),
)

CHOICES = {
    "resume_changed": ("refuse", "allow"),
    "train.on_nonfinite": ("stop", "skip"),
    "train.dtype": ("fp32", "bf16", "fp16"),
    "optim.name": ("adamw", "sgd"),
    "optim.schedule": ("linear", "cosine", "constant"),
    "objective.reduction": ("sum", "mean", "importance", "average"),
    "rc.rule": ("center", "edge", "loop", "fixed"),
    "rc.band": ("batch", "samples"),
    "rc.scope": ("batch", "pair"),
    "rc.signal": ("auto", "fresh", "control"),
    "objective.weighting": ("wpo",),
    "rc.update": ("step", "microbatch"),
    "rc.geometry": ("head", "parameters"),
    "model.attention": ("eager", "sdpa", "flash_attention_2"),
    "model.init": ("pretrained", "random"),
    "adapter.name": ("none", "lora"),
    "adapter.quantization": ("nf4",),
    "reference.mode": ("model", "precompute"),
    "data.name": ("sums", "pairs"),
    "data.on_bad": ("refuse", "drop"),
    "data.pairing": ("best_worst", "adjacent", "all"),
    "data.learn": ("last", "all"),
    "data.ties": ("keep", "drop"),
    "data.truncation": ("keep_end", "keep_start"),
    "data.reasoning": ("keep", "strip", "empty"),
    "data.layout": ("auto", "shared", "separate"),
    "eval.scorer": ("number", "text", "pattern"),
    "eval.checkpoints": ("final", "all"),
    "checkpoint.best": BEST_METRICS,
    "checkpoint.best_mode": ("max", "min"),
    "wandb.mode": ("online", "offline", "disabled"),
}

# key: (smallest, largest, whether each of the two is itself allowed); None passes, types say where it may be
RANGES = {
    "seed": (0, 2**32 - 1, True, True),
    "train.epochs": (1, math.inf, True, False),
    "train.max_steps": (1, math.inf, True, False),
    "train.batch_size": (1, math.inf, True, False),
    "train.micro_batch_size": (1, math.inf, True, False),
    "train.max_grad_norm": (0, math.inf, False, False),
    "optim.lr": (0, math.inf, False, False),
    "train.max_nonfinite": (1, math.inf, True, False),
    "optim.weight_decay": (0, math.inf, True, False),
    "optim.eps": (0, math.inf, False, False),
    "optim.momentum": (0, 1, True, False),
    "optim.warmup_ratio": (0, 1, True, True),
    "objective.nll_coef": (0, math.inf, True, False),
    "rc.alpha": (0, math.inf, False, False),
    "rc.target": (-math.inf, math.inf, False, False),
    "rc.control.pairs": (8, math.inf, True, False),
    "rc.control.every": (1, math.inf, True, False),
    "objective.length_alpha": (0, 1, True, True),
    "rc.ema": (0, 1, True, False),
    "rc.alpha_max": (1, math.inf, True, False),
    "rc.sketch": (1, math.inf, True, False),
    "rc.sketch_seed": (0, 2**32 - 1, True, True),
    "reference.sync_every": (0, math.inf, True, False),
    "reference.mixup": (0, 1, False, True),
    "adapter.r": (1, math.inf, True, False),
    "adapter.alpha": (1, math.inf, True, False),
    "dynamics.every": (0, math.inf, True, False),
    "log.every": (1, math.inf, True, False),
    "watch.winner": (0, math.inf, False, False),
    "watch.patience": (1, math.inf, True, False),
    "data.train_examples": (1, math.inf, True, False),
    "data.eval_fraction": (0, 1, True, False),
    "data.min_margin": (-math.inf, math.inf, False, False),
    "data.ches_max": (-math.inf, math.inf, False, False),
    "data.max_margin": (-math.inf, math.inf, False, False),
    "data.max_dropped": (0, 1, True, True),
    "data.max_examples": (1, math.inf, True, False),
    "data.workers": (0, math.inf, True, False),
    "data.max_length": (1, math.inf, True, False),
    "data.max_prompt_length": (1, math.inf, True, False),
    "engine.stage": (0, 3, True, True),
    "launch.processes": (1, math.inf, True, False),
    "launch.timeout_minutes": (0, math.inf, False, False),
    "launch.lost_after": (0, math.inf, False, False),
    "launch.meeting_seconds": (0, math.inf, False, False),
    "eval.every": (0, math.inf, True, False),
    "eval.batch_size": (1, math.inf, True, False),
    "eval.max_examples": (1, math.inf, True, False),
    "eval.generate_examples": (0, math.inf, True, False),
    "eval.max_new_tokens": (1, math.inf, True, False),
    "eval.kl_examples": (0, math.inf, True, False),
    "eval.limit": (1, math.inf, True, False),
    "eval.task_batch_size": (1, math.inf, True, False),
    "judge.max_examples": (1, math.inf, True, False),
    "judge.max_tokens": (1, math.inf, True, False),
    "judge.temperature": (0, 2, True, True),
    "judge.concurrency": (1, 256, True, True),
    "judge.timeout": (0, math.inf, False, False),
    "judge.retries": (0, 100, True, True),
    "judge.backoff": (0, 600, True, True),
    "judge.price_in": (0, math.inf, True, False),
    "judge.price_out": (0, math.inf, True, False),
    "probe.size": (0, math.inf, True, False),
    "probe.every": (1, math.inf, True, False),
    "probe.generate_every": (0, math.inf, True, False),
    "probe.samples": (0, math.inf, True, False),
    "checkpoint.every": (0, math.inf, True, False),
    "checkpoint.minutes": (0, math.inf, True, False),
    "checkpoint.keep": (1, math.inf, True, False),
}

# the hyper-parameters that rcpo's own objectives have; a user's objective may have others, unchecked
HYPERPARAMETER_RANGES = {
    "beta": (0, math.inf, False, False),
    "tau": (0, math.inf, False, False),
    "gamma": (0, math.inf, True, False),
    "epsilon": (0, 0.5, True, False),
    "alpha": (0, math.inf, False, False),
    "lambda_nll": (0, math.inf, True, False),
    "lambda_penalty": (0, math.inf, True, False),
    "lambda_chosen": (0, math.inf, False, False),
    "lambda_rejected": (0, math.inf, False, False),
    "lambda_mix": (0, 1, False, False),
    "shift_start": (0, math.inf, True, False),
    "shift_end": (0, math.inf, True, False),
    "score_scale": (0, math.inf, False, False),
    "divergence_alpha": (0, 1, False, True),
}

PARTS = "parts"  # of a mixture
HYPERPARAMETER_CHOICES = {"divergence": ("reverse_kl", "forward_kl", "js", "alpha")}

# the same in the order smallest, largest, smallest allowed, largest allowed
Range = tuple[float, float, bool, bool]


def nearest(name: str, known: Iterable[str], limit: int = 12) -> str:
    """A hint that ends an error message: the name probably meant, or the first `limit` that exist."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if not names:
        return "there are none"
    return f"there are: {', '.join(names[:limit])}{', …' if len(names) > limit else ''}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist: the same leaf elsewhere, else its nearest sibling."""
    names = sorted(known)
    parent, _, leaf = key.rpartition(".")
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"unknown key {key}; did you mean {' or '.join(elsewhere[:3])}?"
    prefix = f"{parent}." if parent else ""
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]
    if siblings:
        near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
        if near:
            return f"unknown key {key}; did you mean {prefix}{near[0]}?"
        if parent:
            return f"unknown key {key}; {parent} has: {', '.join(siblings)}"
    return f"unknown key {key}; {nearest(key, (name for name in names if '.' not in name), limit=40)}"


def validate(config: RunConfig, *, files: bool = True) -> None:
    """Raises ConfigError for the first value that no run could use; imports no torch."""
    for key, known in CHOICES.items():
        check_choice(key, _value(config, key), known)
    for key, bounds in RANGES.items():
        check_range(key, _value(config, key), bounds)
    _check_hyperparameters("objective", config.objective.hyperparameters)
    for index, beta in enumerate(config.optim.betas):
        check_range(f"optim.betas[{index}]", beta, (0, 1, True, False))
    if len(config.optim.betas) != 2:
        raise ConfigError(f"optim.betas={config.optim.betas} has not two values, as AdamW takes them")
    config.train.accumulation(world_size=1)
    _check_combinations(config)
    _check_calibration(config)
    _check_sync(config)
    _check_scorer(config)
    check_data(config.data)
    if files:
        check_models(config)
        check_judge(config.judge, wanted=config.eval.judge)
        _check_files(config)


def _check_hyperparameters(node: str, settings: Mapping[str, Any]) -> None:
    """Ranges and choices of an objective's hyper-parameters, and of a mixture's parts."""
    for name, value in settings.items():
        key = f"{node}.{name}"
        if name in HYPERPARAMETER_RANGES:
            check_range(key, _number(key, value), HYPERPARAMETER_RANGES[name])
        elif name in HYPERPARAMETER_CHOICES:
            check_choice(key, value, HYPERPARAMETER_CHOICES[name])
        elif name == PARTS:
            _check_parts(key, value)


def _check_parts(key: str, parts: Any) -> None:
    form = "a list of {name: OBJECTIVE, weight: NUMBER} with the objective's own settings beside them"
    if not isinstance(parts, list) or not parts:
        raise ConfigError(f"{key}={parts} is not {form}")
    for place, part in enumerate(parts):
        node = f"{key}[{place}]"
        if not isinstance(part, dict) or not isinstance(part.get("name"), str):
            raise ConfigError(f"{node}={part} is not a part of {form}")
        weight = _number(f"{node}.weight", part.get("weight", 1.0))
        check_range(f"{node}.weight", weight, (0, math.inf, False, False))
        check_choice(f"{node}.reduction", part.get("reduction"), CHOICES["objective.reduction"])
        check_range(
            f"{node}.nll_coef",
            _number(f"{node}.nll_coef", part.get("nll_coef", 0.0)),
            (0, math.inf, True, False),
        )
        _check_hyperparameters(node, part)


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value!r} is not a number")
    return value


def check_choice(key: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{key}={value} is not one of {', '.join(known)}{hint}")


def shown(value: float) -> str:
    """A number as people write it: whole ones with all their digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def check_range(key: str, value: float | None, bounds: Range) -> None:
    if value is None:
        return
    low, high, low_allowed, high_allowed = bounds
    above = value >= low if low_allowed else value > low
    below = value <= high if high_allowed else value < high
    if above and below:
        return
    wanted = f"{'at least' if low_allowed else 'greater than'} {shown(low)}"
    if math.isfinite(high):
        wanted += f" and {'at most' if high_allowed else 'less than'} {shown(high)}"
    elif not math.isfinite(value):
        wanted += " and finite"
    raise ConfigError(f"{key}={shown(value)} is out of range: it has to be {wanted}")


def _check_calibration(config: RunConfig) -> None:
    """Keys of `rc` that only some rules read, and scopes that only some settings have."""
    rc = config.rc
    if rc.rule == "fixed" and rc.alpha is None:
        raise ConfigError("rc.rule=fixed needs its weight: rc.alpha=1.5, say")
    if rc.rule != "fixed" and rc.alpha is not None:
        raise ConfigError(f"rc.alpha={rc.alpha:g} is read by rc=fixed alone, and rc.rule is {rc.rule}")
    if rc.rule != "loop" and rc.target:
        raise ConfigError(f"rc.target={rc.target:g} is read by rc=loop alone, and rc.rule is {rc.rule}")
    if rc.scope != "pair":
        return
    if rc.rule not in ("center", "edge") or rc.band != "batch" or rc.geometry != "head":
        raise ConfigError(
            "rc.scope=pair takes each pair's own band by the head's geometry: it needs rc.rule=center or "
            f"edge, rc.band=batch and rc.geometry=head (they are {rc.rule}, {rc.band} and {rc.geometry})"
        )
    if rc.ema is not None:
        raise ConfigError(f"rc.ema={rc.ema:g}: rc.scope=pair averages nothing; leave rc.ema out")


def _check_combinations(config: RunConfig) -> None:
    engine, objective = config.engine, config.objective
    if config.rc.geometry == "parameters" and engine.stage != 0:
        raise ConfigError(
            f"rc.geometry=parameters needs whole gradients, which engine.stage={engine.stage} does not keep; "
            "choose engine=zero0 or rc.geometry=head"
        )
    if config.eval.parameters_geometry and engine.stage == 3:
        raise ConfigError(
            "eval.parameters_geometry=true needs whole weights and gradients, which engine.stage=3 splits; "
            "add engine=zero0"
        )
    if engine.offload_optimizer and engine.stage == 0:
        raise ConfigError(
            "engine.offload_optimizer=true needs a stage of 1 to 3; choose engine=zero2_offload"
        )
    if engine.offload_parameters and engine.stage != 3:
        raise ConfigError(
            f"engine.offload_parameters=true needs engine.stage=3 (it is {engine.stage}); "
            "choose engine=zero3_offload"
        )
    if objective.reduction == "importance" and objective.nll_coef:
        raise ConfigError(
            f"objective.nll_coef={objective.nll_coef:g} is not defined for objective.reduction=importance; "
            "set it to 0 or choose another reduction"
        )
    if config.checkpoint.best is not None and not config.eval.every:
        raise ConfigError(
            f"checkpoint.best={config.checkpoint.best} goes by evaluations while training; set eval.every=N"
        )
    if config.probe.generate_every % config.probe.every:
        raise ConfigError(
            f"probe.generate_every={config.probe.generate_every} is not a multiple of probe.every="
            f"{config.probe.every}: answers are made at some of the probes"
        )


def _check_sync(config: RunConfig) -> None:
    """What a reference that follows the policy rules out."""
    every = config.reference.sync_every
    if not every:
        return
    if config.reference.mode != "model":
        raise ConfigError(
            f"reference.sync_every={every} changes the reference as the policy learns, and "
            f"reference.mode={config.reference.mode} computes its log-probs before step 1; set "
            "reference.mode=model"
        )
    if config.adapter.name != "none":
        raise ConfigError(
            f"reference.sync_every={every} mixes whole weights, and adapter.name={config.adapter.name} "
            "trains low-rank ones; set adapter=none, or reference.sync_every=0"
        )


def _check_scorer(config: RunConfig) -> None:
    scorer, pattern = config.eval.scorer, config.eval.answer_pattern
    if (scorer == "pattern") != (pattern is not None):
        raise ConfigError(
            f"eval.scorer={scorer} and eval.answer_pattern={pattern}: eval.scorer=pattern goes with a "
            "regular expression, whose first group is the answer"
        )
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"eval.answer_pattern={pattern} is not a regular expression: {error}") from error


def _check_files(config: RunConfig) -> None:
    cache = config.reference.cache
    if config.reference.keeps and cache is not None and is_file("reference.cache", cache):
        raise ConfigError(f"reference.cache={cache} is a file; give a folder, null (the user's own) or off")
    if config.resume not in (None, "auto") and readable_folder("resume", config.resume) is None:
        raise ConfigError(f"resume={config.resume} is not a folder; give null, auto or a run's folder")
