"""The DeepSpeed ZeRO engine: the only module that imports deepspeed.

It knows forward, backward, step and gathered weights; batches, objectives and calibration are the trainer's.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from rcpo.config.schema import BITSANDBYTES, RunConfig
from rcpo.engine.pieces import PERSISTS, Piece, Saved, collect, find_pieces, longest_vector, publish, restore
from rcpo.errors import ConfigError
from rcpo.method.geometry import Sketch
from rcpo.method.types import TokenBatch
from rcpo.models.policy import Policy, policy_inputs
from rcpo.system import distributed

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
# what moves in DeepSpeed's loss scaler for fp16
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

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


def gathered(parameters: list[nn.Parameter]) -> Any:
    """The context in which parameters that ZeRO-3 has partitioned are whole on every rank, to be read."""
    return deepspeed.zero.GatheredParameters(parameters)


def refuse_older_deepspeed() -> None:
    """Raise ConfigError for versions before the tested one, which train otherwise without an error.

    Under ZeRO-2 they add gradients up in bf16, off by 0.4 %, and fail where a step in bf16 is not finite.
    """
    if Version(deepspeed.__version__) < Version(TESTED):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} adds up gradients in bf16 where train.dtype=bf16 and "
            f"engine.stage=2; rcpo needs {TESTED} or newer: pip install deepspeed=={TESTED}"
        )


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
        DeepSpeedZeroConfig(**_zero(config, training=True))
    except ValueError as error:  # pydantic's
        what = " ".join(str(error).split("\n")[1:3]).strip() or str(error)
        raise ConfigError(f"engine.deepspeed.zero_optimization: {what}") from error


def _internal(owner: Any, name: str, purpose: str) -> Any:
    """An attribute of DeepSpeed's that is not its interface; raises ConfigError where a version lacks it."""
    if not hasattr(owner, name):
        kind = owner if isinstance(owner, type | ModuleType) else type(owner)
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} has no {kind.__name__}.{name}, which rcpo needs {purpose}; "
            f"install one that was tested: pip install deepspeed=={TESTED}"
        )
    return getattr(owner, name)


def _check_internals(engine: Any, *, training: bool) -> None:
    """Raise ConfigError at the start where this version of DeepSpeed lacks what will be read later."""
    wanted = [(engine, "zero_optimization_partition_weights", "to know the ZeRO stage")]
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
        _internal(owner, name, purpose)


def _forget_releases_with_order() -> Callable[[], None]:
    """Under ZeRO-3 DeepSpeed keeps which weights a module lets go of even when the order of modules is new.

    After passes without backward (a reference's, an evaluation's) each layer then lets go of its weights in
    every forward pass, and they are gathered again, one by one, in every backward pass. What is kept also
    holds on to models that are closed. Returns the function that forgets.
    """
    coordinator = PartitionedParameterCoordinator
    purpose = "to gather weights in time under ZeRO-3"
    releases = _internal(coordinator, "_PartitionedParameterCoordinator__params_to_release", purpose)
    cells = [cell.cell_contents for cell in releases.__closure__ or ()]
    kept = next((content for content in cells if hasattr(content, "cache_clear")), None)
    forget: Callable[[], None] = _internal(kept, "cache_clear", purpose)
    clear = _internal(coordinator, "_clear_trace_structures", purpose)

    def clear_all(self: Any) -> None:
        forget()
        clear(self)

    coordinator._clear_trace_structures = clear_all
    return forget


@cache
def _releases() -> Callable[[], None]:
    return _forget_releases_with_order()


def forget_releases() -> None:
    """Forget which weights the modules of closed engines let go of."""
    _releases()()


@contextmanager
def exact_ranges() -> Iterator[None]:
    """Keep the dtype of `torch.arange` while a model is built under ZeRO-3.

    DeepSpeed casts such tensors to the weights' dtype, and rotary frequencies are made of them: in bf16 they
    are off by 0.4 %. Newer versions of transformers prevent that; 5.17 does not.
    """
    name, arange = "zero_wrapper_for_fp_tensor_constructor", torch.arange
    wrap = _internal(partition_parameters, name, "for exact positions under ZeRO-3")

    def wrap_others(make: Any, target_fp_dtype: torch.dtype | None, target_device: Any) -> Any:
        return wrap(make, None if make is arange else target_fp_dtype, target_device)

    setattr(partition_parameters, name, wrap_others)
    try:
        yield
    finally:
        setattr(partition_parameters, name, wrap)


def _forget(policy: Policy) -> None:
    """Undo what keeps a destroyed engine's weights: methods on parameters that refer to them where Python's
    collector cannot see it, and under ZeRO-3 the list of modules that run.
    """
    for parameter in policy.parameters():
        vars(parameter).clear()
    running = _internal(parameter_offload, "FWD_MODULE_STACK", "to free memory under ZeRO-3")
    own = set(policy.modules())
    running[:] = [module for module in running if module not in own]


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
    clips = training and not _plain(config) and config.train.max_grad_norm is not None
    settings["gradient_clipping"] = config.train.max_grad_norm if clips else 0.0
    if training and dtype != "fp32":
        # bf16 has 8 significant bits: a sum of 64 micro-batches in it was off by 0.9 %
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    others = {key: value for key, value in config.engine.deepspeed.items() if key != "zero_optimization"}
    return settings | others


def _plain(config: RunConfig) -> bool:
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


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `optim=…` over the trainable parameters of a model."""
    optim = config.optim
    groups = parameter_groups(model, optim.weight_decay, optim.no_decay)
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            fused=True,  # one pass over weights and moments: a quarter of the time of the default on a CPU
        )  # fmt: skip
    if optim.name in BITSANDBYTES:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

        kinds = (AdamW8bit, PagedAdamW8bit, PagedAdamW32bit)
        made = dict(zip(BITSANDBYTES, kinds, strict=True))[optim.name]
        optimizer: torch.optim.Optimizer = made(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps
        )
        return optimizer
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay, and norms and biases, which do not.

    The trainers of transformers and TRL make the same exception. `no_decay` holds patterns of further
    names; one that matches none raises ConfigError. Without decay there is a single group.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    exempt = _norms_and_biases(model) if weight_decay else set()
    for pattern in no_decay:
        found = {name for name in trainable if re.search(pattern, name)}
        if not found:
            raise ConfigError(
                f"optim.no_decay: {pattern!r} matches no trained parameter; one is {next(iter(trainable))}"
            )
        exempt |= found if weight_decay else set()
    decaying = [p for name, p in trainable.items() if name not in exempt]
    others = [p for name, p in trainable.items() if name in exempt]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _norms_and_biases(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for prefix, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower()
        own = [name for name, _ in module.named_parameters(recurse=False) if norm or "bias" in name]
        names.update(f"{prefix}.{name}" if prefix else name for name in own)
    return names


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


# what is left of the learning rate when a share of the decay is done
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}


def schedule(config: RunConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Return the learning-rate schedule over `total_steps`; raise ConfigError where the warm-up does not fit.

    The factors are those of transformers' schedules of the same names (wsd is its warmup_stable_decay), whose
    module imports peft and more.
    """
    optim = config.optim
    warmup, floor = optim.warmup(total_steps), optim.min_lr_ratio
    decay = optim.decay(total_steps) if optim.schedule == "wsd" else max(1, total_steps - warmup)
    begin = warmup if optim.schedule.startswith("cosine") else total_steps - decay

    def factor(step: int) -> float:
        if step < warmup:
            start = floor if optim.schedule == "wsd" else 0.0
            return start + (1.0 - start) * step / warmup
        if optim.schedule == "constant":
            return 1.0
        done = min(1.0, max(0.0, (step - begin) / decay))
        shape = optim.decay_shape if optim.schedule == "wsd" else optim.schedule
        return floor + (1.0 - floor) * SHAPES[shape](done)

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Engine:
    """A policy under DeepSpeed: trains if it is given `total_steps`, else only scores."""

    def __init__(self, policy: Policy, config: RunConfig, total_steps: int | None = None) -> None:
        self.device = distributed.device()
        if config.train.dtype == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(
                "train.dtype=fp16 is refused on a CPU by DeepSpeed; use train.dtype=bf16 or fp32"
            )
        training = total_steps is not None
        _releases()
        parameters = [p for p in policy.parameters() if p.requires_grad] if training else []
        optimizer = build_optimizer(policy, config) if training else None
        settings = deepspeed_config(config, training=training)
        if PERSISTS not in config.engine.deepspeed.get("zero_optimization", {}):
            settings["zero_optimization"][PERSISTS] = longest_vector(policy)
        with redirect_stdout(io.StringIO()):  # it prints which operator it built
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=policy,
                optimizer=optimizer,
                model_parameters=parameters or None,
                lr_scheduler=None if total_steps is None else schedule(config, total_steps),
                config=settings,
                dist_init_required=False,
            )
        _check_internals(self._engine, training=training)
        policy.examine()
        # DeepSpeed's own forward forbids the plain autograd that the parameters' geometry is made of
        by_parameters = config.rc.geometry == "parameters" or (
            config.eval.parameters_geometry and not training
        )
        self._forward = self._engine.module if by_parameters else self._engine
        self._plain = _plain(config)
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
        policy = self.policy
        self._engine.destroy()
        _forget(policy)
        forget_releases()

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
            gathered = self._engine._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=self.policy.adapted
            )
            return None if gathered is None else _strip(gathered)
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
                    with deepspeed.zero.GatheredParameters(
                        [value], modifier_rank=0, enabled=self._engine.zero_optimization_partition_weights()
                    ):
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

    def _whole(self, *values: Tensor) -> Any:
        """The context in which partitioned weights are whole on every rank; rank 0's changes stay."""
        split = self._engine.zero_optimization_partition_weights()
        return deepspeed.zero.GatheredParameters(list(values), modifier_rank=0, enabled=split)

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
