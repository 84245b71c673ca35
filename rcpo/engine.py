"""The DeepSpeed ZeRO engine: the only module that imports deepspeed.

It knows forward, backward, step and gathered weights; batches, objectives and calibration are the trainer's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import ninja
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from rcpo import distributed
from rcpo.config import ConfigError, EngineConfig, RunConfig
from rcpo.geometry import Sketch
from rcpo.models import Policy, policy_inputs
from rcpo.types import TokenBatch

# DeepSpeed compiles its communication op with ninja, which pip puts beside the interpreter, not on the PATH
os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; said aloud otherwise

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.WARNING)


def deepspeed_config(config: RunConfig, *, training: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration for the policy, or for a frozen reference (`training=False`)."""
    dtype = config.train.dtype
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation(distributed.world_size()),
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": _zero(config.engine, training),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if training and config.train.max_grad_norm is not None:
        settings["gradient_clipping"] = config.train.max_grad_norm
    return settings


def _zero(engine: EngineConfig, training: bool) -> dict[str, Any]:
    stage = engine.stage if training or engine.stage == 3 else 0
    settings: dict[str, Any] = {"stage": stage, "reduce_scatter": True}
    if stage == 3:
        # a layer is gathered whole: tiny models would otherwise stay unpartitioned
        settings |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if engine.offload_parameters and stage == 3:
        settings["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training and engine.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings


def build_optimizer(parameters: list[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim=…` over the trainable parameters."""
    optim = config.optim
    if optim.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            weight_decay=optim.weight_decay,
        )  # fmt: skip
    return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def schedule(config: RunConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """The learning-rate schedule over `total_steps`, with `warmup_ratio` of them as warm-up."""
    warmup = round(config.optim.warmup_ratio * total_steps)
    name = "constant_with_warmup" if config.optim.schedule == "constant" else config.optim.schedule
    return lambda optimizer: get_scheduler(name, optimizer, warmup, total_steps)


class Engine:
    """A policy under DeepSpeed: trains if it is given `total_steps`, else only scores."""

    def __init__(self, policy: Policy, config: RunConfig, total_steps: int | None = None) -> None:
        self.device = distributed.device()
        if config.train.dtype == "fp16" and self.device.type == "cpu":
            raise ConfigError(
                "train.dtype=fp16 is refused on a CPU by DeepSpeed; use train.dtype=bf16 or fp32"
            )
        training = total_steps is not None
        parameters = [p for p in policy.parameters() if p.requires_grad] if training else []
        optimizer = build_optimizer(parameters, config) if training else None
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            model_parameters=parameters or None,
            lr_scheduler=None if total_steps is None else schedule(config, total_steps),
            config=deepspeed_config(config, training=training),
            dist_init_required=False,
        )
        # only here DeepSpeed leaves the optimizer bare and knows no gradient norm
        self._plain = config.engine.stage == 0 and config.train.dtype == "fp32"

    @property
    def policy(self) -> Policy:
        module = self._engine.module
        assert isinstance(module, Policy)
        return module

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(self._engine.get_lr()[0])

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def close(self) -> None:
        """Lets go of what DeepSpeed holds; the engine is of no use after."""
        self._engine.destroy()

    def score(self, batch: TokenBatch, sketch: Sketch | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs (N,), hidden states (N, D) and sketched scores (N, k) or (0,) of the response tokens."""
        result: tuple[Tensor, Tensor, Tensor] = self._engine(**policy_inputs(batch), sketch=sketch)
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradients; `last` closes the optimizer step's accumulation.

        DeepSpeed averages over ranks, so `loss` is this rank's part of the global mean times the rank count.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips, updates weights and learning rate; returns the global gradient norm before clipping."""
        if self._plain:
            norm = self._plain_norm()
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _plain_norm(self) -> float:
        gradients = [p.grad.double() for p in self.trainable if p.grad is not None]
        return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()) if gradients else 0.0

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's weights, gathered; None on the ranks other than 0 under ZeRO-3."""
        if self._engine.zero_optimization_partition_weights():
            gathered = self._engine._zero3_consolidated_16bit_state_dict()
            return None if gathered is None else _strip(gathered)
        return _strip(self._engine.module.state_dict())

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any]) -> None:
        """Writes this rank's shards; collective."""
        self._engine.save_checkpoint(folder, tag=tag, client_state=client_state, save_latest=False)

    def load_checkpoint(self, folder: str, tag: str) -> dict[str, Any]:
        """Restores weights, optimizer and schedule; returns the client state. Collective."""
        path, client_state = self._engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise ConfigError(f"resume={folder}: DeepSpeed found no checkpoint {tag} there")
        return dict(client_state)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the language model knows them, without the policy's prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
