"""What a rank sends in an optimizer step, message by message: DeepSpeed's collectives and rcpo's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.method.calibration import RANK_NUMBERS, STEP_SUMS
from rcpo.planner.gathers import Gathers
from rcpo.planner.states import ELEMENT, SUM, Parameter, flat_elements, partition, plain, sums_apart
from rcpo.training.metrics import StepSums

BUCKET = 500_000_000  # elements of gradients that DeepSpeed reduces in one message: its default
# of a rank's bytes in a message, those that cross its link in a ring, as multiples of (ranks - 1) / ranks
_RING = {"all_reduce": 2.0, "reduce_scatter_tensor": 1.0}


@dataclass(frozen=True)
class Message:
    """`count` collectives of `size` bytes on each rank, as DeepSpeed's communication log counts them.

    For an all-gather that is what the rank puts in, for the others the whole tensor. `purpose` is for people.
    """

    name: str
    size: int
    count: int
    purpose: str

    def wire(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives) in a ring of `ranks`."""
        if self.name == "all_gather_into_tensor":
            return float(self.count * self.size * (ranks - 1))
        return self.count * self.size * _RING[self.name] * (ranks - 1) / ranks


def messages(
    parameters: Sequence[Parameter],
    config: RunConfig,
    ranks: int,
    microbatches: int,
    gathered: Gathers | None,
) -> list[Message]:
    """DeepSpeed's collectives in a step of `microbatches` on each rank, as its log counts them.

    `gathered` are ZeRO-3's all-gathers of a micro-batch.
    """
    element, stage = ELEMENT[config.train.dtype], config.zero_stage
    trained = [p.numel for p in parameters if p.trained]
    half = config.train.dtype != "fp32"
    if stage == 0:
        buckets = [] if plain(config) and ranks == 1 else list(_overflowing(trained))
        return list(_counted("all_reduce", (SUM * size for size in buckets), 1, "gradients"))
    if stage == 3:
        assert gathered is not None
        numels = {p.name: p.numel for p in parameters}
        buckets = [
            sum(partition(numel, ranks) * ranks for numel in bucket) for bucket in _filled(reversed(trained))
        ]
        whole = [] if ranks == 1 else gathered.sizes(numels, ranks).elements()
        kept = 0 if ranks == 1 else sum(partition(numels[name], ranks) for name in gathered.kept)
        return [
            *_counted("all_gather_into_tensor", [element * kept] if kept else [], 1, "norms and biases"),
            *_counted("all_gather_into_tensor", (element * n for n in whole), microbatches, "weights"),
            *_counted("reduce_scatter_tensor", (SUM * n for n in buckets), microbatches, "gradients"),
            Message("all_reduce", 8, 1, "gradient norm"),
        ]
    flat = flat_elements(trained, ranks)
    if sums_apart(config):
        found = [Message("all_reduce", SUM * flat, 1, "gradients")]
    else:
        order = trained if stage == 1 else list(reversed(trained))
        sizes = (SUM * sum(bucket) for bucket in _filled(order))
        found = list(_counted("all_reduce", sizes, 1 if stage == 1 else microbatches, "gradients"))
        found.append(Message("all_reduce", 4, 1, "gradient norm"))
        if half:
            found.append(Message("all_reduce", 1, 1, "overflow"))
    if ranks > 1:
        own = flat // ranks
        found.append(Message("all_gather_into_tensor", element * own, 1, "weights"))
    return found


def _counted(name: str, sizes: Iterable[int], times: int, purpose: str) -> Iterator[Message]:
    counts: dict[int, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + times
    for size, count in sorted(counts.items()):
        yield Message(name, size, count, purpose)


def _filled(numels: Iterable[int]) -> Iterator[list[int]]:
    """Gradients in buckets of at most BUCKET elements; a larger one is alone."""
    bucket: list[int] = []
    for numel in numels:
        if bucket and sum(bucket) + numel > BUCKET:
            yield bucket
            bucket = []
        bucket.append(numel)
    if bucket:
        yield bucket


def _overflowing(numels: Iterable[int]) -> Iterator[int]:
    """Elements of the messages of ZeRO-0: each ends with the gradient that takes it over BUCKET."""
    size = 0
    for numel in numels:
        size += numel
        if size > BUCKET:
            yield size
            size = 0
    if size:
        yield size


def own_messages(config: RunConfig, scores: int, microbatches: int) -> list[Message]:
    """rcpo's own collectives in a step that is measured; `scores` are the elements of both sides."""
    found = [
        Message("all_reduce", StepSums().nbytes, 1, "metrics"),
        Message("all_reduce", 8, 1, "peak memory"),
    ]
    if scores:
        found.append(Message("all_reduce", calibration_bytes(scores), 1, "calibration"))
    if config.rc.enabled and config.rc.update == "microbatch":
        found.append(Message("all_reduce", 8 * RANK_NUMBERS, microbatches, "calibration"))
    return found


def calibration_bytes(scores: int) -> int:
    """Bytes of a step's statistics on each rank, in fp32: the scores, and the sums in three words."""
    return 4 * (scores + 3 * STEP_SUMS)
