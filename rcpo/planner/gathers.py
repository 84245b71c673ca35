"""ZeRO-3: when which parameters are gathered in a micro-batch, and how many are whole at a time.

DeepSpeed records the order in which modules run, then fetches each module's parameters, prefetches those that
come next, and keeps what is used again soon. The same rules are played here over the order that a few layers
have on fake tensors, repeated to the model's depth.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rcpo.models.policy import Policy, decoder_layers
from rcpo.planner.trace import BatchShape, fake_weights, inputs

# DeepSpeed's own limits, in elements: fetched ahead, whole at a time, until a weight is used again
PREFETCH, MAX_LIVE, MAX_REUSE = 50_000_000, 1_000_000_000, 1_000_000_000


class Event(NamedTuple):
    """A module begins (`enters`) or ends its forward pass, its recomputation or its backward pass."""

    module: str
    enters: bool


@dataclass(frozen=True)
class Gathers:
    """All-gathers of one micro-batch, each a tuple of parameters, and the most elements whole at a time.

    The parameters `kept` are always whole, and gathered once after each update.
    """

    messages: tuple[tuple[str, ...], ...]
    peak_elements: int
    kept: tuple[str, ...] = ()

    def sizes(self, numels: Mapping[str, int], ranks: int) -> Counter[int]:
        """Elements that a rank puts into each message, with their counts."""
        return Counter(sum(-(-numels[name] // ranks) for name in message) for message in self.messages)


class _Begins(torch.autograd.Function):
    """On a module's output: its backward pass begins here."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, module: str, events: list[Event]) -> Tensor:
        ctx.event, ctx.events = Event(module, True), events
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.event not in ctx.events[-1:]:  # several outputs of a module are one beginning
            ctx.events.append(ctx.event)
        return gradient, None, None


class _Ends(torch.autograd.Function):
    """On a module's input: its backward pass ends here."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, module: str, events: list[Event]) -> Tensor:
        ctx.event, ctx.events = Event(module, False), events
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.event)
        return gradient, None, None


def module_order(policy: Policy, rows: BatchShape, depth: int) -> list[Event]:
    """The order of modules in a training micro-batch of a policy of a few layers, for `depth` layers."""
    events: list[Event] = []
    with ExitStack() as stack:
        stack.enter_context(fake_weights(policy))
        for name, module in policy.named_modules():
            for hook in _watch(module, name, events):
                stack.callback(hook.remove)
        policy.train()
        logps = policy(**inputs(rows))[0]
        forward = list(events)
        events.clear()
        logps.sum().backward()
    layers = list(decoder_layers(policy))
    extra = depth - len(layers)
    return [*_repeat(forward, layers, extra, down=False), *_repeat(events, layers, extra, down=True)]


def _watch(module: nn.Module, name: str, events: list[Event]) -> Iterator[Any]:
    def mark(function: Any, values: Any) -> Any:
        def one(value: Any) -> Any:
            wanted = isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
            return function.apply(value, name, events) if wanted else value

        return tree_map(one, values)

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        events.append(Event(name, True))
        return mark(_Ends, args), mark(_Ends, kwargs)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        events.append(Event(name, False))
        return mark(_Begins, output)

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


def _repeat(events: Sequence[Event], layers: Sequence[str], extra: int, *, down: bool) -> Iterator[Event]:
    """The events with those of the third layer `extra` times more; `down` where the deepest comes first.

    The layers above it move up, so that names are those of the deep model.
    """
    owners = [_owner(event.module, layers) for event in events]
    if extra <= 0:
        yield from events
        return
    first, last = (f(place for place, owner in enumerate(owners) if owner == 2) for f in (min, max))
    for event, owner in zip(events[:first], owners):
        yield _moved(event, layers, owner, extra if owner == 3 else 0)
    for shift in sorted(range(extra + 1), reverse=down):
        for event, owner in zip(events[first : last + 1], owners[first:]):
            yield _moved(event, layers, owner, shift)
    for event, owner in zip(events[last + 1 :], owners[last + 1 :]):
        yield _moved(event, layers, owner, extra if owner == 3 else 0)


def _owner(module: str, layers: Sequence[str]) -> int | None:
    """The place of the layer that a module is in."""
    return next((place for place, layer in enumerate(layers) if f"{module}.".startswith(f"{layer}.")), None)


def _moved(event: Event, layers: Sequence[str], owner: int | None, shift: int) -> Event:
    if owner is None or not shift:
        return event
    layer = layers[owner]
    return event._replace(module=f"{layer.rpartition('.')[0]}.{owner + shift}{event.module[len(layer) :]}")


def gathers(
    events: Sequence[Event],
    owned: Mapping[str, Sequence[str]],
    numels: Mapping[str, int],
    *,
    prefetch: int = PREFETCH,
    max_live: int = MAX_LIVE,
    max_reuse: int = MAX_REUSE,
    persists: int = 0,
) -> Gathers:
    """The all-gathers of a micro-batch once the order of modules is known.

    `owned` are each module's parameters by name, `numels` their elements. Limits are in elements; a parameter
    of at most `persists` is always whole.
    """
    kept = tuple(name for name, numel in numels.items() if numel <= persists)
    owned = {module: [name for name in names if name not in kept] for module, names in owned.items()}
    state = _Coordinator(events, owned, numels, prefetch, max_live, max_reuse)
    for event in events:
        if event.enters:
            state.fetch(event.module)
        else:
            state.release(event.module)
    return Gathers(tuple(state.messages), state.peak + sum(numels[name] for name in kept), kept)


class _Coordinator:
    """The rules of DeepSpeed's PartitionedParameterCoordinator with a complete trace."""

    def __init__(
        self,
        events: Sequence[Event],
        owned: Mapping[str, Sequence[str]],
        numels: Mapping[str, int],
        prefetch: int,
        max_live: int,
        max_reuse: int,
    ) -> None:
        self.owned, self.numels = owned, numels
        self.prefetch, self.max_live, self.max_reuse = prefetch, max_live, max_reuse
        order = [event.module for event in events if event.enters]
        uses = [(step, name) for step, module in enumerate(order) for name in owned[module]]
        self.queue = deque(uses)
        self.uses: dict[str, list[int]] = {}
        for step, name in uses:
            self.uses.setdefault(name, []).append(step)
        self.before = [0]  # elements that modules before a step have, each time they run
        for module in order:
            self.before.append(self.before[-1] + sum(numels[name] for name in owned[module]))
        self.step = 0
        self.fetched_for: dict[str, int] = {}
        self.whole: set[str] = set()
        self.active: dict[str, set[str]] = {}
        self.live = self.peak = 0
        self.messages: list[tuple[str, ...]] = []

    def fetch(self, module: str) -> None:
        """Gather what a module needs and, within the limits, what comes next."""
        own = self.owned[module]
        self._gather(own)
        for name in own:
            self.active.setdefault(name, set()).add(module)
        fresh = {name for name in own if self.fetched_for.get(name, -1) < self.step}
        seen: set[str] = set()
        while self.queue and len(seen) < len(fresh):
            step, name = self.queue.popleft()
            self.fetched_for[name] = step
            seen.add(name)
        limit = min(self.max_live - self.live, self.prefetch)
        ahead: list[str] = []
        elements = 0
        while self.queue and elements < limit:
            step, name = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, -1), step)
            if name not in self.whole and name not in ahead:
                ahead.append(name)
                elements += self.numels[name]
        self._gather(ahead)
        self.step += 1

    def _gather(self, names: Sequence[str]) -> None:
        missing = tuple(name for name in names if name not in self.whole)
        if missing:
            self.messages.append(missing)
            self.whole.update(missing)
            self.live += sum(self.numels[name] for name in missing)
            self.peak = max(self.peak, self.live)

    def release(self, module: str) -> None:
        """Let go of a module's parameters that are not used again soon."""
        for name in self.owned[module]:
            self.active[name].discard(module)
            if self.active[name] or name not in self.whole or self._soon(name):
                continue
            self.whole.remove(name)
            self.live -= self.numels[name]

    def _soon(self, name: str) -> bool:
        if self.fetched_for.get(name, -1) > self.step:
            return True
        uses = self.uses[name]
        following = bisect_left(uses, self.step)
        if following == len(uses):
            return False
        return self.before[uses[following]] - self.before[self.step] < self.max_reuse
