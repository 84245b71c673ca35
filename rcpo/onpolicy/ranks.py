"""Work shared out over ranks, in batches that do not depend on their number, nor on where one was killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from rcpo.errors import ConfigError, RunError
from rcpo.onpolicy.kept import Kept, Row
from rcpo.onpolicy.progress import Progress
from rcpo.system import distributed
from rcpo.system.signals import Stopped


class Item(Protocol):
    """Something that is made a row, whose key it has."""

    @property
    def key(self) -> str: ...


One = TypeVar("One", bound=Item)


def make_rows(
    items: Sequence[One],
    size: int,
    kept: Kept,
    compute: Callable[[Sequence[One]], Sequence[Row]],
    progress: Progress,
    stop: Callable[[], bool],
) -> None:
    """Make the rows that `kept` lacks. Collective. Raises Stopped on all ranks where one is to stop.

    `items` are cut into batches of `size` in their order, and a batch is computed as a whole or not at all,
    so that each number is that of an unbroken run of one rank.
    """
    known = kept.read()
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    with kept, progress:
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            if stop():
                break
            if all(item.key in known for item in batch):
                continue
            for row in compute(batch):
                if row["key"] not in known:
                    kept.write(row)
            progress.look()
    leave_if_asked(stop)


def nothing_lacks(kept: Kept, items: Sequence[Item]) -> bool:
    """Whether `kept` has all rows, as rank 0 finds it: the ranks go on together. Collective."""
    known = kept.read() if distributed.is_main() else {}
    return bool(distributed.broadcast_object(all(item.key in known for item in items)))


def leave_if_asked(stop: Callable[[], bool]) -> None:
    """Raise Stopped on all ranks where `stop` says on any that the process is to end. Collective."""
    if any(distributed.gather_objects(bool(stop()))):
        raise Stopped("stopped; the same command continues from there")


def on_main_or_refused(task: Callable[[], None]) -> None:
    """Run a task on rank 0 while the others wait; every rank raises what it raises for users. Collective."""
    problems: list[Exception] = []

    def attempt() -> None:
        try:
            task()
        except (ConfigError, RunError, Stopped) as error:
            problems.append(error)

    distributed.on_main_alone(attempt)
    problem = distributed.broadcast_object(problems[0] if problems else None)
    if problem is not None:
        raise problem
