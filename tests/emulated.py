"""A device that is not there: tensors that report another device than the CPU, and count what waits for it.

Each holds a CPU's tensor that does the work, so that losses and gradients are real. A GPU runs behind the
process that drives it: what needs a number or a size from the device stops until the device has caught up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # autograd runs it without a library of its own
BY_VALUE = {  # the size of their result depends on values
    "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim", "aten.bincount",
    "aten.unique_consecutive", "aten.repeat_interleave", "aten.equal", "aten._local_scalar_dense",
}  # fmt: skip
MASKS = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class Far(Tensor):
    """A tensor of the device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    def tolist(self) -> Any:  # torch refuses it for tensors like this one
        return self.cpu().tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, Counter())


class Waits(TorchDispatchMode):
    """Counts, by name, what waits for the device; inside, `DEVICE` is one that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self.counts)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any], counts: Counter[str]) -> Any:
    """The operation on the CPU's tensors, and what of it waits."""
    name = str(func).rpartition(".")[0]
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    far = any(isinstance(value, Far) for value in given)
    to = kwargs.get("device")
    leaves = far if to is None else torch.device(to) == DEVICE
    if name in ("aten._to_copy", "aten.copy_") and (far or leaves):
        source = args[0] if name == "aten._to_copy" else args[1]
        target = leaves if name == "aten._to_copy" else isinstance(args[0], Far)
        blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if isinstance(source, Far) and not target:
            counts["copy to the host"] += 1
        elif target and not isinstance(source, Far) and blocks:
            counts["copy to the device"] += 1
    elif far:
        if name in BY_VALUE or (name in MASKS and any(_mask(value) for value in args[1])):
            counts[name] += 1
        strangers = [v for v in given if not isinstance(v, Far) and v.dim()]
        assert not strangers, f"{func}: tensors of two devices, {[tuple(v.shape) for v in strangers]}"
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    if to is not None:
        near_kwargs["device"] = torch.device("cpu")
    if name == "aten._to_copy":  # always a copy, whatever changes
        result = near_args[0].to(near_kwargs.get("dtype") or near_args[0].dtype, copy=True)
    else:
        result = func(*near_args, **near_kwargs)
    if not leaves:
        return result
    wrapped = tree_map(lambda value: Far(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


def _mask(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dtype == torch.bool or not isinstance(value, Far))


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def move(module: nn.Module) -> None:
    """Put a module's weights and buffers on the device; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, old in own.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = Far(old.detach().clone())
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if own is part._parameters else new
                own[name] = made[id(old)]  # type: ignore[assignment]


@contextmanager
def counted(waits: Waits) -> Iterator[Counter[str]]:
    """What is counted inside."""
    before = Counter(waits.counts)
    found: Counter[str] = Counter()
    yield found
    found.update(waits.counts - before)


def total(counts: Iterable[Counter[str]]) -> int:
    return sum(sum(each.values()) for each in counts)
