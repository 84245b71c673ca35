"""The only module that imports deepspeed: what rcpo calls of it, and what it has to know of its inside.

Each attribute that is not DeepSpeed's interface is read by one function, and looked for at the start.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from rcpo.errors import ConfigError
from rcpo.models.policy import Policy

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; unset, DeepSpeed prints a line

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload, partition_parameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.WARNING)
# An operator for inference alone, which DeepSpeed would compile at the first start on a CPU and look at in
# each later one; torch guards both with a file that a killed process leaves behind, then waits for ever.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed calls collectives by names that PyTorch is renaming: a warning for each call, on each rank
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

TESTED = "0.19.8"  # of DeepSpeed


def initialize(
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None,
    settings: dict[str, Any],
) -> tuple[Any, Any]:
    """DeepSpeed's engine for a policy, and its optimizer; without one it only scores.

    Raises ConfigError where this version of DeepSpeed lacks what will be read later.
    """
    _releases()
    trained = [] if optimizer is None else [p for p in policy.parameters() if p.requires_grad]
    with redirect_stdout(io.StringIO()):  # it prints which operator it built
        engine, wrapped, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            model_parameters=trained or None,
            lr_scheduler=schedule,
            config=settings,
            dist_init_required=False,
        )
    check_internals(engine, training=optimizer is not None)
    return engine, wrapped


def destroy(engine: Any, policy: Policy) -> None:
    """Let go of the weights and of what DeepSpeed holds.

    A destroyed engine's weights would be kept by methods on parameters that refer to them where Python's
    collector cannot see it, and under ZeRO-3 by the list of modules that run and by what modules let go of.
    """
    engine.destroy()
    for parameter in policy.parameters():
        vars(parameter).clear()
    leave_modules()
    _releases()()


def leave_modules() -> None:
    """Empty ZeRO-3's list of the modules that run: call it when none does, as after a backward pass.

    A layer whose activations are recomputed ends early, before it is taken off the list.
    """
    parameter_offload.FWD_MODULE_STACK.clear()


def gathered(parameters: list[nn.Parameter], *, changed_by: int | None = None, enabled: bool = True) -> Any:
    """The context in which parameters that ZeRO-3 has partitioned are whole on every rank.

    Changes are those of the rank `changed_by`; without it they are lost.
    """
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=changed_by, enabled=enabled)


def supports_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this kind of device."""
    return bool(get_accelerator().is_fp16_supported())


def check_zero(settings: dict[str, Any]) -> None:
    """Raise ValueError where DeepSpeed refuses these values of `zero_optimization`."""
    DeepSpeedZeroConfig(**settings)


def refuse_older_deepspeed() -> None:
    """Raise ConfigError for versions before the tested one, which train otherwise without an error.

    Under ZeRO-2 they add gradients up in bf16, off by 0.4 %, and fail where a step in bf16 is not finite.
    """
    if Version(deepspeed.__version__) < Version(TESTED):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} adds up gradients in bf16 where train.dtype=bf16 and "
            f"engine.stage=2; rcpo needs {TESTED} or newer: pip install deepspeed=={TESTED}"
        )


def internal(owner: Any, name: str, purpose: str) -> Any:
    """An attribute of DeepSpeed's that is not its interface; raises ConfigError where a version lacks it."""
    if not hasattr(owner, name):
        kind = owner if isinstance(owner, type | ModuleType) else type(owner)
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} has no {kind.__name__}.{name}, which rcpo needs {purpose}; "
            f"install one that was tested: pip install deepspeed=={TESTED}"
        )
    return getattr(owner, name)


def check_internals(engine: Any, *, training: bool) -> None:
    """Raise ConfigError at the start where this version of DeepSpeed lacks what will be read later."""
    wanted = [
        (engine, "zero_optimization_partition_weights", "to know the ZeRO stage"),
        (parameter_offload, "FWD_MODULE_STACK", "to free memory under ZeRO-3"),
    ]
    if engine.zero_optimization_partition_weights():
        wanted += [(engine, "_zero3_consolidated_16bit_state_dict", "to write final/ under ZeRO-3")]
        if training:
            wanted += [
                (engine.optimizer, name, "for checkpoints under ZeRO-3")
                for name in ("grad_position", "get_param_id", "_get_param_partition_rank")
            ]
            wanted += [(engine.optimizer, "fp32_partitioned_groups_flat", "for checkpoints under ZeRO-3")]
    elif training and engine.zero_optimization():
        trained = next(p for p in engine.module.parameters() if p.requires_grad)
        wanted += [(trained, "_hp_mapping", "for checkpoints under ZeRO-1 and 2")]
    if training:
        wanted += [(engine, "basic_optimizer", "for checkpoints")]
        wanted += [(engine, "enable_backward_allreduce", "to leave a single process's gradients alone")]
    if training and engine.fp16_enabled():
        wanted += [(engine.optimizer, "loss_scaler", "for train.dtype=fp16")]
    for owner, name, purpose in wanted:
        internal(owner, name, purpose)


def forget_releases_with_order() -> Callable[[], None]:
    """Under ZeRO-3 DeepSpeed keeps which weights a module lets go of even when the order of modules is new.

    After passes without backward (a reference's, an evaluation's) each layer then lets go of its weights in
    every forward pass, and they are gathered again, one by one, in every backward pass. What is kept also
    holds on to models that are closed. Returns the function that forgets.
    """
    coordinator = PartitionedParameterCoordinator
    purpose = "to gather weights in time under ZeRO-3"
    releases = internal(coordinator, "_PartitionedParameterCoordinator__params_to_release", purpose)
    cells = [cell.cell_contents for cell in releases.__closure__ or ()]
    kept = next((content for content in cells if hasattr(content, "cache_clear")), None)
    forget: Callable[[], None] = internal(kept, "cache_clear", purpose)
    clear = internal(coordinator, "_clear_trace_structures", purpose)

    def clear_all(self: Any) -> None:
        forget()
        clear(self)

    coordinator._clear_trace_structures = clear_all
    return forget


@cache
def _releases() -> Callable[[], None]:
    return forget_releases_with_order()


@contextmanager
def exact_ranges() -> Iterator[None]:
    """Keep the dtype of `torch.arange` while a model is built under ZeRO-3.

    DeepSpeed casts such tensors to the weights' dtype, and rotary frequencies are made of them: in bf16 they
    are off by 0.4 %. Newer versions of transformers prevent that; 5.17 does not.
    """
    name, arange = "zero_wrapper_for_fp_tensor_constructor", torch.arange
    wrap = internal(partition_parameters, name, "for exact positions under ZeRO-3")

    def wrap_others(make: Any, target_fp_dtype: torch.dtype | None, target_device: Any) -> Any:
        return wrap(make, None if make is arange else target_fp_dtype, target_device)

    setattr(partition_parameters, name, wrap_others)
    try:
        yield
    finally:
        setattr(partition_parameters, name, wrap)
