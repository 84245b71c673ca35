"""Optimizer steps of rcpo's engine and DeepSpeed on tensors without data: what each phase does, at any size.

    python tests/simulation.py                     # a part of Qwen 2.5 7B and Llama 3 8B, and what is planned
    python tests/simulation.py --check             # small models, as JSON, for tests/planner

Fake tensors have shapes and no data. Theirs is a device of its own, which PyTorch lets a process register, so
that an operation on tensors of two devices fails, and a copy between them is counted. Numbers that the
process reads are made up: nothing overflows, and gradients are clipped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import asdict, astuple, dataclass
from io import StringIO
from typing import Any
from unittest import mock

import torch
import torch.distributed._tools.fake_collectives  # collectives of fake tensors of any device
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from transformers import LlamaConfig, PreTrainedConfig

import rcpo.engine.zero
from rcpo.config.schema import RunConfig
from rcpo.engine.zero import Engine
from rcpo.method.geometry import ON_GPU
from rcpo.models.policy import Policy
from rcpo.planner.model import architecture, few_layers
from rcpo.planner.states import Parameter
from rcpo.planner.trace import BatchShape, Live, Work, fake_weights, inputs
from rcpo.planner.update import reduction, update
from rcpo.system import distributed

NAME = "far"
NORM = 2.0  # of all gradients: larger than the limit, so that they are clipped
ROWS = BatchShape(2, 768, 1024, shared=True)  # two pairs of 256 prompt and 2 · 256 response tokens


class Far(_DummyBackendModule):
    """What PyTorch asks of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@dataclass
class Phase:
    """What a phase did: `reads` are numbers that the process waited for, `copies` those between devices."""

    operations: int
    bytes: int
    reads: int
    copies: int

    def __add__(self, other: Phase) -> Phase:
        mine, others = astuple(self), astuple(other)
        return Phase(*(one + two for one, two in zip(mine, others, strict=True)))

    @property
    def work(self) -> Work:
        return Work(0, self.operations, self.bytes)


class _Watch(Live):
    """Counts, and answers where a number is read."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__(known)
        self.seen: Counter[str] = Counter()
        self.smaller: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = str(func).split(".")[1]
        if name == "lt":
            self.smaller.append(result)
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            self.seen["copies"] += source.device != target.device
        return result

    def _number(self, value: Tensor) -> bool | float | int:
        self.seen["reads"] += value.device.type == NAME
        if value.dtype == torch.bool:  # the limit is smaller than the norm; nothing overflowed
            return any(value is each for each in self.smaller)
        return NORM if value.is_floating_point() else 0

    def phase(self) -> Phase:
        """What was done since the last call."""
        found = Phase(self.operations, self.moved, self.seen["reads"], self.seen["copies"])
        self.operations = self.moved = 0
        self.seen.clear()
        self.smaller.clear()
        return found


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`: made in the process, then copied; of the device's own PyTorch makes none here."""
    made = torch.zeros(torch.Size() if isinstance(data, int | float | bool) else (len(data),), **kwargs)
    return made if device is None else made.to(device)


@contextmanager
def _of_device() -> Iterator[torch.device]:
    """Inside, rcpo and DeepSpeed run on the device."""
    accelerator, where = get_accelerator(), f"{NAME}:0"
    names: dict[str, Any] = {
        "device_name": lambda index=None: NAME if index is None else f"{NAME}:{index}",
        "current_device_name": lambda: where,
        "current_device": lambda: where,
    }
    with ExitStack() as stack:
        for name, function in names.items():
            stack.enter_context(mock.patch.object(accelerator, name, function))
        stack.enter_context(
            mock.patch.object(rcpo.engine.zero.distributed, "device", lambda: torch.device(where))
        )
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        # ZeRO-3 exchanges it, and leaves it exchanged
        stack.enter_context(mock.patch.object(functional, "linear", functional.linear))
        # ranks compare lists of numbers, which fake tensors lack
        check = "assert_ints_same_as_other_ranks"
        stack.enter_context(mock.patch.object(partitioned_param_coordinator, check, lambda _: None))
        yield torch.device(where)


@contextmanager
def _policy(config: RunConfig, shape: PreTrainedConfig, layers: int) -> Iterator[tuple[Policy, _Watch]]:
    """A policy on the device, and what counts."""
    policy = few_layers(shape, config, layers=layers)
    policy.passes = ON_GPU
    with _of_device() as device, fake_weights(policy, device), redirect_stderr(StringIO()):
        live = _Watch(iter([*policy.parameters(), *policy.buffers()]))
        with live, mock.patch.object(policy, "to", lambda *_: policy), mock.patch.object(policy, "examine"):
            yield policy, live


def _given(rows: BatchShape) -> dict[str, Any]:
    device = torch.device(NAME, 0)
    values = inputs(rows).items()
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values}


def bare(shape: PreTrainedConfig, config: RunConfig, rows: BatchShape, layers: int) -> dict[str, Phase]:
    """The passes without an engine."""
    with _policy(config, shape, layers) as (policy, live):
        policy.train()
        given = _given(rows)
        live.phase()
        logps = policy(**given)[0]
        forward = live.phase()
        logps.sum().backward()
        return {"forward": forward, "backward": live.phase()}


def step(shape: PreTrainedConfig, config: RunConfig, rows: BatchShape, layers: int) -> dict[str, Phase]:
    """The phases of the second optimizer step, each of all its micro-batches, of so many layers."""
    found: dict[str, Phase] = {}
    with _policy(config, shape, layers) as (policy, live):
        engine = Engine(policy, config, 10)
        engine.train()
        given = _given(rows)
        for _ in range(2):
            forward = backward = Phase(0, 0, 0, 0)
            live.phase()
            for left in reversed(range(config.train.accumulation(distributed.world_size()))):
                logps = engine._forward(**given)[0]
                forward += live.phase()
                engine.backward(logps.sum(), last=not left)
                backward += live.phase()
            found |= {"forward": forward, "backward": backward}
            done = engine.step()
            found["update"] = live.phase()
            assert done.applied and done.grad_norm == NORM
        engine.close()
    return found


def settings(stage: int, dtype: str, microbatches: int = 1, **changes: Any) -> RunConfig:
    config = RunConfig()
    config.engine.stage, config.train.dtype = stage, dtype
    config.train.micro_batch_size = 2
    config.train.batch_size = 2 * microbatches * distributed.world_size()
    for key, value in changes.items():
        node, _, name = key.partition("__")
        setattr(getattr(config, node), name, value)
    return config


SMALL = LlamaConfig(
    vocab_size=4000, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
KINDS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def start(ranks: int) -> None:
    """Register the device, for good, and be the first of so many ranks, the others of which do not exist."""
    _setup_privateuseone_for_python_backend(NAME, Far())
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


Case = tuple[int, str, int, str, int]  # stage, numbers, layers, adapter, micro-batches
CASES: list[Case] = [
    *((stage, dtype, 2, "none", 3) for stage, dtype in KINDS),
    (1, "bf16", 3, "none", 1),
    (3, "bf16", 3, "lora", 1),
]
OF_SEVERAL = [case for case in CASES if case[:2] == (0, "fp32") or case[1:] == ("bf16", 2, "none", 3)]


def check() -> list[dict[str, Any]]:
    """Small models under each kind of engine, and without one."""
    rows = BatchShape(2, 24, 30, shared=True)
    cases = CASES if distributed.world_size() == 1 else OF_SEVERAL
    return [asdict(each) for each in compared(SMALL, cases, rows)]


@dataclass
class Compared:
    """The phases of a step under an engine, the passes without one, and the sizes of what is trained."""

    stage: int
    dtype: str
    layers: int
    adapter: str
    microbatches: int
    sizes: list[int]
    engine: dict[str, Phase]
    bare: dict[str, Phase]

    @property
    def added(self) -> Work:
        """What the engine adds to the backward passes."""
        return self.engine["backward"].work - self.bare["backward"].work * self.microbatches


def compared(
    shape: PreTrainedConfig, cases: list[Case], rows: BatchShape, **changes: Any
) -> Iterator[Compared]:
    """Each case in turn."""
    for case in cases:
        stage, dtype, layers, adapter, microbatches = case
        config = settings(stage, dtype, microbatches, adapter__name=adapter, **changes)
        alone = bare(shape, config, rows, layers)
        sizes = [p.numel() for p in few_layers(shape, config, layers=layers).parameters() if p.requires_grad]
        yield Compared(*case, sizes, step(shape, config, rows, layers), alone)


def large() -> Iterator[str]:
    """Rows of a table: four layers of two real models, simulated / planned."""
    yield "| | ZeRO | added to two backward passes | update | numbers read, copies |"
    yield "|---|---|---|---|---|"
    cases = [(stage, "bf16", 4, adapter, 2) for stage in (1, 2, 3) for adapter in ("none", "lora")]
    for name in ("qwen2.5-7b", "llama-3-8b"):
        shape = architecture(RunConfig(), name)
        for each in compared(shape, cases, ROWS, train__gradient_checkpointing=True):
            config = settings(each.stage, each.dtype)
            trained = [Parameter("", size) for size in each.sizes]
            added, planned = each.added, reduction(config, trained, 1, sum(each.sizes), each.microbatches)
            last, expected = each.engine["update"], update(config, trained, 1, sum(each.sizes))
            yield (
                f"| {name}{', LoRA' if each.adapter == 'lora' else ''} | {each.stage} "
                f"| {_short(added)} / {_short(planned)} | {_short(last.work)} / {_short(expected)} "
                f"| {last.reads}, {sum(phase.copies for phase in each.engine.values())} |"
            )


def _short(work: Work) -> str:
    return f"{work.operations:,} operations, {work.bytes / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="small models, as JSON")
    parser.add_argument("--ranks", type=int, default=1, help="of a group in which nothing is sent")
    arguments = parser.parse_args()
    start(arguments.ranks)
    if arguments.check:
        print(json.dumps(check()))
        return
    for line in large():
        print(line, flush=True)


if __name__ == "__main__":
    main()
