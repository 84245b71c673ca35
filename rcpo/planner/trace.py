"""What a micro-batch computes and keeps alive: the policy's own code, run on tensors without memory.

Fake tensors have shapes and no data, so a model of any size is traced in seconds. It is cut to a few decoder
layers, and one of the middle stands for those that were left out.

Axes: R rows, L row length, N response tokens.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rcpo.method.geometry import Passes, Sketch
from rcpo.models.policy import Policy, decoder_layers

CPU = torch.device("cpu")
LAYERS = 4  # of them the second and third are of the middle, and differ by what one layer keeps


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


UNCOUNTED: Any = {  # by torch itself, which knows the attention of GPUs
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# in names of operations that compute nothing
FREE = ("detach", "empty", "alias", "lift_fresh", "prim", "record_function")
OVERWRITTEN = ("copy_", "zero_", "fill_")  # operations that do not read what they write


@dataclass(frozen=True)
class Work:
    """FLOP of matrix products; operations that a device starts, and the bytes that they read and write.

    Views start nothing; other operations read their operands and write their results once, without fusion.
    """

    flops: int = 0
    operations: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.operations, times * self.bytes)

    def __sub__(self, other: Work) -> Work:
        return self + other * -1


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch's shape: (R, L) tokens with N response tokens; `shared` rows hold several sequences."""

    rows: int
    length: int
    responses: int
    shared: bool


@dataclass(frozen=True)
class Moment:
    """A stretch of the backward pass, up to one parameter's gradient.

    `activations` are the most bytes alive in it apart from finished gradients; of those there were
    `gradients` elements before it. `work` was done since the pass began.
    """

    activations: int
    gradients: int
    work: Work
    layer: int | None = None


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass of a micro-batch: peak bytes of the forward pass, the backward's moments.

    `kept` are the bytes that are alive after both, apart from gradients: what a step still reads.
    """

    forward_peak: int
    forward_work: Work
    backward: tuple[Moment, ...] = ()
    kept: int = 0

    @property
    def backward_work(self) -> Work:
        """Of the backward pass, with what is computed again in it."""
        return self.backward[-1].work if self.backward else Work()

    @property
    def activations(self) -> int:
        """The most bytes alive apart from weights and gradients."""
        return max([self.forward_peak, *(moment.activations for moment in self.backward)])


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still referred to.

    `operations` and `moved` are what those operators were, and the bytes that they read and wrote.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = self.operations = self.moved = 0
        self._sizes: dict[int, int] = dict.fromkeys((t.untyped_storage()._cdata for t in known), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        for value in made:
            self._count(value.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        if not func.is_view and not any(name in str(func) for name in FREE):
            self.operations += 1
            self.moved += _moved(func, args, kwargs or {}, made)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.bytes
        return peak


def _moved(func: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> int:
    """The bytes that an operation reads and writes; one on lists of tensors does not return what it wrote."""
    arguments = func._schema.arguments
    named = {argument.name: argument for argument in arguments}
    given = [*zip(args, arguments, strict=False), *((value, named[name]) for name, value in kwargs.items())]
    # AdamW's declares its gradients as changed, which they are where they are scaled
    changed = [(value, each) for value, each in given if each.is_write and each.name != "grads"]
    written = list(_tensors([value for value, _ in changed])) or made
    overwritten = func._schema.name.removeprefix("aten::") in OVERWRITTEN
    unread = [value for value, each in changed if overwritten or each.kwarg_only]
    read = [*_tensors([value for value, _ in given])]
    total = sum(value.numel() * value.element_size() for value in [*read, *written])
    return total - sum(value.numel() * value.element_size() for value in _tensors(unread))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


class _SketchOfShapes(Sketch):
    """A sketch's memory without a CPU's loop over the vocabulary, which works in place."""

    def scores(self, excess: Tensor, passes: Passes | None = None) -> Tensor:
        if passes is not None and passes.block is None:
            return super().scores(excess, passes)
        return excess.new_zeros(len(excess), self.size)


@dataclass
class _Recorder:
    """What hooks write down while a policy runs."""

    live: Live
    flops: FlopCounterMode
    collects: bool
    entries: dict[int, tuple[int, Work]] = field(default_factory=dict)  # layer: bytes, work
    moments: list[Moment] = field(default_factory=list)
    elements: int = 0
    bytes: int = 0

    def enter(self, layer: int) -> None:
        # a checkpointed layer is entered again in the backward pass
        self.entries.setdefault(layer, (self.live.bytes, self.work()))

    def work(self) -> Work:
        """What was computed so far."""
        return Work(self.flops.get_total_flops(), self.live.operations, self.live.moved)

    def gradient(self, parameter: Tensor, layer: int | None) -> None:
        if self.collects:  # recomputed fake tensors hang in cycles of Python frames, real ones do not
            gc.collect()
        made, done = self.live.take_peak(), self.work()
        self.moments.append(Moment(made - self.bytes, self.elements, done, layer))
        assert parameter.grad is not None
        self.elements += parameter.numel()
        self.bytes += parameter.grad.untyped_storage().nbytes()


def trace(policy: Policy, rows: BatchShape, sketch: int | None, *, training: bool, depth: int) -> Trace:
    """Run a micro-batch through a policy of a few layers, for a model of `depth` layers.

    `sketch` is the vocabulary sketch's size; None where no scores are measured. Without `training` there is
    no backward pass, as where a reference or an evaluation scores rows.
    """
    layers = decoder_layers(policy)
    with ExitStack() as stack:
        stack.enter_context(fake_weights(policy))
        live = Live(iter([*policy.parameters(), *policy.buffers()]))
        flops = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        recorder = _Recorder(live, flops, collects=training and policy.recomputes)
        for hook in _hooks(policy, layers, recorder):
            stack.callback(hook.remove)
        stack.enter_context(_few_objects())
        stack.enter_context(torch.set_grad_enabled(training))
        for mode in (flops, live):
            stack.enter_context(mode)
        policy.train(training)
        shapes = None if sketch is None else _SketchOfShapes(policy.vocabulary, sketch)
        results = policy(**inputs(rows), sketch=shapes)
        forward = Trace(live.take_peak(), recorder.work())
        if not training:
            return _deeper_forward(forward, recorder, depth - len(layers))
        results[0].sum().backward()  # hidden states and scores stay alive, as in a step
        kept = live.bytes - recorder.bytes
    before = forward.forward_work
    moments = [replace(moment, work=moment.work - before) for moment in recorder.moments]
    forward = _deeper_forward(forward, recorder, depth - len(layers))
    backward = tuple(_deeper_backward(moments, depth - len(layers)))
    return replace(forward, backward=backward, kept=kept)


def inputs(rows: BatchShape) -> dict[str, Any]:
    """The policy's arguments for a micro-batch of this shape, all zeros."""

    def tokens(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long)

    shape = rows.rows, rows.length
    return {
        "input_ids": tokens(*shape),
        "position_ids": tokens(*shape),
        "segments": tokens(*shape) if rows.shared else None,
        "predictors": tokens(rows.responses),
        "labels": tokens(rows.responses),
    }


@contextmanager
def fake_weights(policy: Policy, device: torch.device = CPU) -> Iterator[None]:
    """Inside, tensors have shapes and no data, and the policy, made on the meta device, has such weights."""
    with FakeTensorMode():
        made: dict[int, Tensor] = {}  # tied weights stay one
        for module in policy.modules():
            for own in (module._parameters, module._buffers):
                for name, old in own.items():
                    if old is not None and id(old) not in made:
                        made[id(old)] = _fake(old, device)
                    own[name] = None if old is None else made[id(old)]  # type: ignore[assignment]
        yield


def _fake(old: Tensor, device: torch.device) -> Tensor:
    new = torch.empty(old.shape, dtype=old.dtype, device=device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def _few_objects() -> Iterator[None]:
    """What exists is left out of garbage collections, which are then quick."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _hooks(policy: Policy, layers: dict[str, nn.Module], recorder: _Recorder) -> Iterator[Any]:
    for place, layer in enumerate(layers.values()):
        yield layer.register_forward_pre_hook(lambda *_, place=place: recorder.enter(place))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            owner = re.match(r"(.*?\.\d+)\.", name)
            index: int | None = list(layers).index(owner[1]) if owner and owner[1] in layers else None
            yield parameter.register_post_accumulate_grad_hook(
                lambda p, index=index: recorder.gradient(p, index)
            )


def _deeper_forward(trace: Trace, recorder: _Recorder, extra: int) -> Trace:
    if extra <= 0:
        return trace
    (third, after), (second, before) = recorder.entries[2], recorder.entries[1]
    return replace(
        trace,
        forward_peak=trace.forward_peak + extra * (third - second),
        forward_work=trace.forward_work + (after - before) * extra,
    )


def _deeper_backward(moments: list[Moment], extra: int) -> Iterator[Moment]:
    """The moments of a model with `extra` layers more, all like the third."""
    if extra <= 0:
        yield from moments
        return
    third, second = ([m for m in moments if m.layer == layer] for layer in (2, 1))
    first = moments.index(second[0])
    kept = third[0].activations - second[0].activations
    elements = second[0].gradients - third[0].gradients
    work = second[0].work - third[0].work
    for moment in moments[:first]:
        yield replace(moment, activations=moment.activations + extra * kept)
    for copy in range(1, extra + 1):
        for moment in third:
            yield Moment(
                moment.activations + (extra - copy) * kept,
                moment.gradients + copy * elements,
                moment.work + work * copy,
                moment.layer,
            )
    for moment in moments[first:]:
        yield replace(moment, gradients=moment.gradients + extra * elements, work=moment.work + work * extra)
