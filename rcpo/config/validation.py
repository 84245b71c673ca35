"""What a `RunConfig` must satisfy beyond types: each key's own values, combinations of keys, and files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from rcpo.config.data import check_data
from rcpo.config.fields import check_keys, check_pattern
from rcpo.config.foreign_names import counterpart
from rcpo.config.hyperparameters import check_hyperparameters
from rcpo.config.judge import check_judge
from rcpo.config.model import check_models
from rcpo.config.paths import is_file, readable_folder
from rcpo.config.schema import BITSANDBYTES, CalibrationConfig, OptimConfig, ReferenceConfig, RunConfig
from rcpo.errors import ConfigError


def nearest(name: str, known: Iterable[str], limit: int = 12) -> str:
    """A hint that ends an error message: the name probably meant, or the first `limit` that exist."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if not names:
        return "there are none"
    return f"there are: {', '.join(names[:limit])}{', …' if len(names) > limit else ''}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist: the same leaf elsewhere, a name of TRL's, or a sibling."""
    names = sorted(known)
    parent, _, leaf = key.rpartition(".")
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"unknown key {key}; did you mean {' or '.join(elsewhere[:3])}?"
    if theirs := counterpart(leaf):
        return f"unknown key {key}; {theirs}"
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
    """Raise ConfigError for the first value that no run could use; imports no torch."""
    check_keys(config)
    check_hyperparameters("objective", config.objective.hyperparameters)
    _check_optim(config)
    if re.match(r"[^/]+://[^/@]*:[^/@]*@", config.mlflow.uri or ""):
        raise ConfigError(
            "mlflow.uri holds a password, which config.yaml would keep: set MLFLOW_TRACKING_URI in the "
            "environment instead, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    config.train.accumulation(world_size=1)
    _check_combinations(config)
    check_calibration(config.rc)
    _check_sync(config)
    _check_scorer(config)
    check_data(config.data)
    if files:
        check_models(config)
        check_judge(config.judge, wanted=config.eval.judge)
        _check_files(config)


def check_calibration(rc: CalibrationConfig) -> None:
    """Raise ConfigError for keys of `rc` that its rule does not read, and settings that its scope lacks."""
    if rc.rule == "fixed" and rc.alpha is None:
        raise ConfigError("rc.rule=fixed needs its weight: rc.alpha=1.5, say")
    limit = rc.alpha_max
    if rc.rule == "fixed" and rc.alpha and limit is not None and not 1 / limit <= rc.alpha <= limit:
        raise ConfigError(
            f"rc.alpha={rc.alpha:g} is beyond the clamp [1/rc.alpha_max, rc.alpha_max] with "
            f"rc.alpha_max={limit:g}, so another weight would be used: set rc.alpha_max=null"
        )
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
    if config.train.compile and engine.stage == 3:
        raise ConfigError(
            "train.compile=true compiles layers that hold their weights, which engine.stage=3 takes away "
            "between uses; choose engine=zero2, or train.compile=false"
        )
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


def _check_optim(config: RunConfig) -> None:
    """Betas, a warm-up that is given twice, and keys that the schedule does not read."""
    optim = config.optim
    if len(optim.betas) != 2:
        raise ConfigError(f"optim.betas={optim.betas} does not have two values, as AdamW takes them")
    if optim.name in BITSANDBYTES and config.engine.offload_optimizer:
        raise ConfigError(
            f"optim={optim.name} with engine.offload_optimizer=true: both save the same memory; choose "
            "optim=adamw, or an engine without offload"
        )
    if optim.warmup_steps and optim.warmup_ratio:
        raise ConfigError(
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_ratio={optim.warmup_ratio:g}: give one"
        )
    readers = {
        "min_lr_ratio": ("cosine_with_min_lr", "wsd"),
        "decay_ratio": ("wsd",),
        "decay_shape": ("wsd",),
    }
    for name, schedules in readers.items():
        value = getattr(optim, name)
        if value != getattr(OptimConfig(), name) and optim.schedule not in schedules:
            raise ConfigError(
                f"optim.{name}={value} is read by optim.schedule={' and '.join(schedules)} alone, and it is "
                f"{optim.schedule}"
            )
    if optim.schedule == "cosine_with_min_lr" and not optim.min_lr_ratio:
        raise ConfigError(
            "optim.schedule=cosine_with_min_lr needs its lowest rate: optim.min_lr_ratio=0.1, say"
        )
    for place, pattern in enumerate(optim.no_decay):
        check_pattern(f"optim.no_decay[{place}]", pattern)
    if config.train.max_steps is not None:
        optim.warmup(config.train.max_steps)


def _check_sync(config: RunConfig) -> None:
    """What a reference that follows the policy rules out."""
    every, mixup = config.reference.sync_every, config.reference.mixup
    if not every:
        if mixup != ReferenceConfig().mixup:
            raise ConfigError(
                f"reference.mixup={mixup:g} is read with reference.sync_every alone, and that is 0, so the "
                "reference does not move; set reference.sync_every=STEPS and reference.mode=model, or leave "
                "mixup out"
            )
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
    check_pattern("eval.answer_pattern", pattern)


def _check_files(config: RunConfig) -> None:
    cache = config.reference.cache
    if config.reference.keeps and cache is not None and is_file("reference.cache", cache):
        raise ConfigError(f"reference.cache={cache} is a file; give a folder, null (the user's own) or off")
    if config.resume not in (None, "auto") and readable_folder("resume", config.resume) is None:
        raise ConfigError(f"resume={config.resume} is not a folder; give null, auto or a run's folder")
