"""DeepSpeed's configuration, made of rcpo's."""

from __future__ import annotations

from typing import Any

import torch

from rcpo.config.schema import RunConfig
from rcpo.engine.backend import check_zero
from rcpo.engine.pieces import PERSISTS
from rcpo.errors import ConfigError
from rcpo.system import distributed

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "optimizer": "optim=NAME and optim.*",
    "scheduler": "optim.schedule and optim.warmup_ratio",
    "zero_allow_untested_optimizer": "optim=NAME",
    "zero_force_ds_cpu_optimizer": "optim=NAME",
    "data_types": "train.dtype",
    "activation_checkpointing": "train.gradient_checkpointing",
    "zero_optimization.stage": "engine=zero0, zero1, zero2 or zero3",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "nothing: final/ needs it",
    "zero_optimization.gather_16bit_weights_on_model_save": "nothing: final/ needs it",
}
"""DeepSpeed's settings that follow from rcpo's, and what to set instead."""


def refuse_deepspeed_settings(config: RunConfig) -> None:
    """Raise ConfigError for `engine.deepspeed` keys that rcpo owns, and for those that DeepSpeed refuses."""
    given = config.engine.deepspeed
    inner = given.get("zero_optimization", {})
    if not isinstance(inner, dict):
        raise ConfigError(f"engine.deepspeed.zero_optimization={inner}: it holds keys, not a value")
    for key in [*given, *(f"zero_optimization.{key}" for key in inner)]:
        if key in OWNED:
            raise ConfigError(f"engine.deepspeed.{key} is set by rcpo; use {OWNED[key]}")
    try:
        check_zero(_zero(config, training=True))
    except ValueError as error:  # pydantic's
        what = " ".join(str(error).split("\n")[1:3]).strip() or str(error)
        raise ConfigError(f"engine.deepspeed.zero_optimization: {what}") from error


def deepspeed_config(config: RunConfig, *, training: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration for the policy, or for a frozen reference (`training=False`).

    What it does not name is DeepSpeed's default, which is meant for clusters: buckets of 5e8 elements reduced
    by scattering, gradients copied into contiguous memory, communication beside the backward pass under
    ZeRO-3 (`overlap_comm`; below it DeepSpeed's default waits, for a second bucket's memory), 5e7 elements
    fetched ahead.
    """
    dtype = config.train.dtype
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.microbatch(distributed.world_size()),
        "gradient_accumulation_steps": config.train.accumulation(distributed.world_size()),
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": _zero(config, training),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    # said even where DeepSpeed clips nothing: its own default clips at 1
    clips = training and not bare(config) and config.train.max_grad_norm is not None
    settings["gradient_clipping"] = config.train.max_grad_norm if clips else 0.0
    if training and dtype != "fp32":
        # bf16 has 8 significant bits: a sum of 64 micro-batches in it was off by 0.9 %
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    others = {key: value for key, value in config.engine.deepspeed.items() if key != "zero_optimization"}
    return settings | others


def bare(config: RunConfig) -> bool:
    """Whether DeepSpeed leaves the optimizer bare: gradient norm and clipping are then the engine's own."""
    return config.zero_stage == 0


def _zero(config: RunConfig, training: bool) -> dict[str, Any]:
    engine = config.engine
    stage = config.zero_stage if training or engine.stage == 3 else 0
    settings: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # the engine sets the first by the model: DeepSpeed's 1e5 would leave tiny models and adapters whole
        settings |= {PERSISTS: 0, "stage3_gather_16bit_weights_on_model_save": True}
    if engine.offload_parameters and stage == 3:
        settings["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training and engine.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings | dict(engine.deepspeed.get("zero_optimization", {}))
