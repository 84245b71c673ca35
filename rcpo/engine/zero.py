"""A policy under DeepSpeed's ZeRO.

It knows forward, backward, step and gathered weights; batches, objectives and calibration are the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rcpo.config.schema import RunConfig
from rcpo.engine.backend import destroy, gathered, initialize, leave_modules, supports_fp16
from rcpo.engine.optimizers import build_optimizer, schedule
from rcpo.engine.pieces import PERSISTS, Piece, Saved, collect, find_pieces, longest_vector, publish, restore
from rcpo.engine.settings import bare, deepspeed_config
from rcpo.errors import ConfigError
from rcpo.method.geometry import Sketch
from rcpo.method.types import TokenBatch
from rcpo.models.policy import Policy, policy_inputs
from rcpo.system import distributed

# what moves in DeepSpeed's loss scaler for fp16
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """A policy under DeepSpeed: trains if it is given `total_steps`, else only scores."""

    def __init__(self, policy: Policy, config: RunConfig, total_steps: int | None = None) -> None:
        self.device = distributed.device()
        if config.train.dtype == "fp16" and not supports_fp16():
            raise ConfigError(
                "train.dtype=fp16 is refused on a CPU by DeepSpeed; use train.dtype=bf16 or fp32"
            )
        training = total_steps is not None
        optimizer = build_optimizer(policy, config) if training else None
        settings = deepspeed_config(config, training=training)
        if PERSISTS not in config.engine.deepspeed.get("zero_optimization", {}):
            settings["zero_optimization"][PERSISTS] = longest_vector(policy)
        rates = None if total_steps is None else schedule(config, total_steps)
        self._engine, self._optimizer = initialize(policy, optimizer, rates, settings)
        policy.examine()
        # DeepSpeed's own forward forbids the plain autograd that the parameters' geometry is made of
        by_parameters = config.rc.geometry == "parameters" or (
            config.eval.parameters_geometry and not training
        )
        self._forward = self._engine.module if by_parameters else self._engine
        self._plain = bare(config)
        if self._plain and distributed.world_size() == 1:
            # nothing to reduce; DeepSpeed would still copy all gradients to one buffer and back
            self._engine.enable_backward_allreduce = False
        self._max_norm = config.train.max_grad_norm
        if training and self._engine.fp16_enabled():
            self._scaler.raise_error_at_min_scale = False  # `step` reports it, and the trainer ends the run

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
        """Let go of the weights and of what DeepSpeed holds; engine and policy are of no use after."""
        destroy(self._engine, self.policy)

    def forward(
        self, batch: TokenBatch, sketch: Sketch | None = None, *, squares: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the response tokens: log-probs (N,), hidden states (N, D), sketched scores (N, k) or (0,), and
        `rcpo.method.logps.log_squares` (N,) or (0,).
        """
        result: tuple[Tensor, Tensor, Tensor, Tensor] = self._forward(
            **policy_inputs(batch), sketch=sketch, squares=squares
        )
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` closes the optimizer step's accumulation.

        DeepSpeed averages over ranks, so `loss` is this rank's part of the global mean times the rank count.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        leave_modules()

    def step(self) -> Update:
        """Clip, update weights and learning rate; an update that is not finite is left out on all ranks."""
        if not self._plain:  # DeepSpeed checks the reduced norm itself
            rescales = self._engine.fp16_enabled() and self._scaler.cur_scale > self._scaler.min_scale
            self._engine.step()
            norm, applied = self._engine.get_global_grad_norm(), bool(self._engine.was_step_applied())
            # it keeps the last step's norm where it finds an overflow first
            return Update(float(norm) if applied else math.inf, applied, rescales and not applied)
        norm = self._plain_norm()
        if math.isfinite(norm):
            if self._max_norm is not None and norm > self._max_norm:
                torch._foreach_mul_(self._gradients(), self._max_norm / (norm + 1e-6))
            self._engine.step()
        else:
            self._engine.zero_grad()
        return Update(norm, math.isfinite(norm))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.trainable if p.grad is not None]

    def _plain_norm(self) -> float:
        # rows in fp32, then fp64: millions of elements in fp32 are off by 1e-3, copies in fp64 are large
        norms = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in self._gradients()]
        return float(torch.cat(norms).double().square().sum().sqrt()) if norms else 0.0

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's weights, gathered; None on the ranks other than 0 under ZeRO-3.

        Of a model with adapters, ZeRO-3 gathers those that are trained.
        """
        if self._engine.zero_optimization_partition_weights():
            whole = self._engine._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=self.policy.adapted
            )
            return None if whole is None else _strip(whole)
        return _strip(self._engine.module.state_dict())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give the policy these weights, by their names in it; frozen ones may be left out. Collective."""
        known = dict(self.policy.named_parameters())
        lacking = [name for name, value in known.items() if value.requires_grad and name not in weights]
        unknown = weights.keys() - known.keys()
        if lacking or unknown:
            raise ConfigError(
                f"the weights are not those of this model: {(lacking + sorted(unknown))[0]} does not fit"
            )
        with torch.no_grad():
            for name, value in known.items():
                if name in weights:
                    with self._whole(value):
                        value.copy_(weights[name])

    def follow(self, other: Engine, share: float) -> None:
        """Move the weights a `share` of the way to another engine's, of the same model. Collective."""
        own, others = self.policy.parameters(), other.policy.parameters()
        with torch.no_grad():
            for value, target in zip(own, others, strict=True):
                with self._whole(value, target):
                    value.lerp_(target.to(value), share)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights by their names, whole."""
        named = self.policy.named_parameters()
        return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in named}

    def shares(self, key: str) -> dict[str, Tensor]:
        """This rank's share of all weights, by labels of `rcpo.engine.pieces` with that key. Collective."""
        found = {}
        for name, value in self.policy.named_parameters():
            with self._whole(value):
                piece = Piece(name, 0, value.numel(), value).share(
                    distributed.rank(), distributed.world_size()
                )
                found[piece.label(key)] = piece.of(value).clone()
        return found

    def take_shares(self, saved: Saved, key: str) -> None:
        """Take over what all ranks' `shares` were. Collective; raise ConfigError for a missing weight."""
        with torch.no_grad():
            for name, value in self.policy.named_parameters():
                with self._whole(value):
                    flat = saved.values(name, key, 0, value.numel())
                    if flat is None:
                        raise ConfigError(f"resume: the checkpoint has no {key} weight {name}")
                    value.copy_(flat.view(value.shape))

    def _whole(self, *values: nn.Parameter) -> Any:
        """The context in which partitioned weights are whole on every rank; rank 0's changes stay."""
        split = self._engine.zero_optimization_partition_weights()
        return gathered(list(values), changed_by=0, enabled=split)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's share of fp32 weights and optimizer state: views, labelled as in `pieces`."""
        pieces = find_pieces(self._engine)
        if not self._engine.zero_optimization():  # all ranks hold everything
            share = distributed.rank(), distributed.world_size()
            pieces = [piece.share(*share) for piece in pieces]
        return collect(pieces, self._engine.basic_optimizer)

    def record(self) -> dict[str, Any]:
        """What goes with `tensors`, ready for JSON: the count of applied updates, the loss scaler's state in
        fp16, the parameters' shapes.
        """
        scale = scaler_state(self._scaler) if self._engine.fp16_enabled() else None
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named}
        return {"updates": self._engine.lr_scheduler.last_epoch, "loss_scale": scale, "shapes": shapes}

    def restore(self, saved: Saved, record: dict[str, Any] | None = None) -> None:
        """Take over `tensors` of whatever ranks and stage; a new engine their `record` too. Collective.

        Raises ConfigError for a parameter that is not in them.
        """
        restore(find_pieces(self._engine), self._engine.basic_optimizer, saved)
        publish(self._engine)
        if record is None:
            return
        for _ in range(record["updates"]):  # a schedule is a function of their count
            self._engine.lr_scheduler.step()
        if self._engine.fp16_enabled() and record["loss_scale"] is not None:
            set_scaler_state(self._scaler, record["loss_scale"])

    @property
    def _scaler(self) -> Any:
        """What holds the loss scale in fp16."""
        return self._engine.optimizer.loss_scaler


@dataclass(frozen=True)
class Update:
    """What an optimizer step did: the global gradient norm before clipping; whether weights changed.

    `rescaled`: gradients overflowed fp16, and a smaller loss scale will be tried in the next step.
    """

    grad_norm: float
    applied: bool
    rescaled: bool = False


def scaler_state(scaler: Any) -> dict[str, Any]:
    """What moves in one of DeepSpeed's loss scalers, ready for JSON."""
    return {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}


def set_scaler_state(scaler: Any, state: dict[str, Any]) -> None:
    """Restore it, as far as the scaler of another stage has the same."""
    for key in state.keys() & vars(scaler).keys():
        setattr(scaler, key, state[key])


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the language model knows them, without the policy's prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
