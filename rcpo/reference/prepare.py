"""Where a run's reference log-probs come from: a frozen model that is held, or one pass whose result is kept.

With `reference.mode=precompute` no second model is in memory while training: without `reference.path` the
policy scores the data before its first step; another model is loaded if the cache lacks its log-probs, and
freed after.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rcpo.config.schema import RunConfig
from rcpo.data.store import PairDataset
from rcpo.engine.load import read_model, recalls_start, reference_source
from rcpo.engine.zero import Engine
from rcpo.errors import RunError
from rcpo.method.types import TokenBatch
from rcpo.models.contents import source_hash, tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.models.policy import Policy
from rcpo.reference import keys
from rcpo.reference.cache import Cache, LogpRequest, Say
from rcpo.reference.entry import Sink
from rcpo.reference.parts import Piece
from rcpo.reference.rows import Reference, Rows, StoredReference
from rcpo.system import distributed
from rcpo.system.files import cache_folder
from rcpo.system.signals import Stopped

Stop = Callable[[], bool]
"""Whether this rank was asked to end the run."""

PROGRESS_EVERY = 30.0  # seconds
# By precision, how much padding may move log-probs of equal weights: the mean over tokens, and a single one.
# Measured on 8 layers and 200 to 300 tokens: 4e-6 and 2e-5 in fp32, 0.002 and 0.3 in bf16, 0.0004 and 0.05 in
# fp16. Dropout, a wrong mask or another model's weights exceed all of them by far.
START_TOLERANCE = {"fp32": (1e-5, 1e-3), "bf16": (5e-2, 2.0), "fp16": (1e-2, 0.5)}
Acting = Callable[[], AbstractContextManager[None]]
"""Makes the policy act as another one, inside."""


@dataclass(frozen=True)
class ReferenceData:
    """A dataset whose responses the reference scores: those on `sides` of each example in `positions`.

    `batches` yields this rank's share of them, as many batches on every rank; `positions` None is all.
    `layout` is that of the batches' rows. `partial`: other examples will be asked for too, and have none.
    """

    name: str
    dataset: PairDataset
    sides: tuple[str, ...]
    positions: np.ndarray | None
    layout: str
    batches: Callable[[], Iterator[TokenBatch]]
    partial: bool = False


class ReferencePass:
    """Made before the policy goes under its engine, which may take the weights apart.

    `other` is the model that is the reference, loaded beside the policy; None where the policy itself is:
    before its first step, or acting as its start (adapters off, or a copy of those that it started from).
    """

    def __init__(self, config: RunConfig, policy: Policy, start: ModelSource, final: Path | None) -> None:
        self._config = config
        self._start = start
        self.other = reference_source(config)
        self.held: Engine | None = None  # under which `other` stays, with reference.mode=model
        self._acting: Acting = nullcontext
        if recalls_start(config, final):
            self._acting = partial(_starting_adapters, policy.model)
        elif self.other is None and (final is not None or config.reference.mode == "model"):
            self.other = start
        self._attention = str(policy.model.config._attn_implementation)

    def prepare(self, engine: Engine, data: list[ReferenceData], say: Say, stop: Stop) -> list[Reference]:
        """The reference of each dataset. Collective; raises Stopped where `stop` says so on any rank.

        `engine` holds the policy with its starting weights: a resumed run loads its checkpoint only after
        this, so the reference is never the trained policy, cached or not.
        """
        if self._config.reference.mode == "model":
            if self.other is not None:
                self.held = Engine(self._load(), self._config)
            return [_token_logps(self.held or engine, self._acting)] * len(data)
        cache = Cache(cache_folder(self._config.reference.cache), say)
        model = _ReferenceEngine(engine, self._acting, None if self.other is None else self._load)
        own = self._own_ingredients(cache)
        references: list[Reference] = []
        for part in data:
            rows = Rows(part.dataset, part.sides, part.positions, partial=part.partial)
            ingredients = own | {
                "dataset": part.dataset.fingerprint,
                "examples": keys.positions_hash(part.positions),
                "sides": ",".join(part.sides),
                "layout": part.layout,
            }
            fill = _Fill(part, rows, model, self._config, say, stop)
            values, check = cache.fetch(
                LogpRequest(f"reference log-probs ({part.name})", ingredients, rows.total), fill
            )
            references.append(StoredReference(rows, values, check))
        model.close()
        return references

    def _load(self) -> Policy:
        assert self.other is not None
        model = read_model(self.other, self._config)
        model.requires_grad_(False)
        return Policy(model)

    def _own_ingredients(self, cache: Cache) -> dict[str, str]:
        """What the log-probs depend on besides the data; hashed by rank 0."""
        if not distributed.is_main():
            return distributed.broadcast_object(None)
        config = self._config
        ingredients = {
            "format": str(keys.FORMAT),
            "weights": source_hash(self.other or self._start, config.seed, cache.memo),
            "tokenizer": tokenizer_hash(self._start.tokenizer, cache.memo),
            "dtype": config.train.dtype,
            "quantization": str(config.adapter.quantization),
            # these decide which kernels run, and so the last digits
            "attention": self._attention,
            "device": distributed.device_name(model=not config.reference.cache_any_device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return distributed.broadcast_object(ingredients)


class _ReferenceEngine:
    """The engine that scores: the policy's, acting as it has to, or one that `load` gets when needed."""

    def __init__(self, engine: Engine, acting: Acting, load: Callable[[], Policy] | None) -> None:
        self._policy_engine = engine
        self.acting = acting
        self._load = load
        self._own: Engine | None = None

    def engine(self, config: RunConfig) -> Engine:
        if self._load is None:
            return self._policy_engine
        if self._own is None:
            self._own = Engine(self._load(), config)
        return self._own

    def close(self) -> None:
        """Free the other model."""
        own, self._own = self._own, None
        if own is not None:
            own.close()
            del own
            gc.collect()  # DeepSpeed's engine refers to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Fill:
    """Scores a dataset, each rank its share, and hands all values to rank 0's sink batch by batch.

    Batches whose responses an earlier pass has computed are left out, on all ranks or on none: the forward
    pass under ZeRO-3 is collective.
    """

    def __init__(
        self,
        data: ReferenceData,
        rows: Rows,
        model: _ReferenceEngine,
        config: RunConfig,
        say: Say,
        stop: Stop,
    ) -> None:
        self._data = data
        self._rows = rows
        self._model = model
        self._config = config
        self._say = say
        self._stop = stop

    def __call__(self, sink: Sink | None) -> None:
        found = self._found(sink)
        resumed = bool(found.any())
        logps = _token_logps(self._model.engine(self._config), self._model.acting)
        done, spoken = int(self._rows.lengths[found].sum()), time.monotonic()
        for batch in self._data.batches():
            own: list[Piece] = []
            if not (resumed and all(distributed.gather_objects(self._rows.within(batch, found)))):
                own = list(self._rows.pieces(batch, logps(batch), found))
            gathered = distributed.gather_objects((self._stop(), own))
            stopped = any(stop for stop, _ in gathered)
            if sink is not None:
                for place, values in (piece for _, part in gathered for piece in part):
                    sink.write(place, values)
                    done += len(values)
                if stopped or time.monotonic() - spoken > PROGRESS_EVERY:
                    spoken = time.monotonic()
                    sink.keep()
                    share = done / self._rows.total
                    self._say(f"reference log-probs ({self._data.name}): {share:.0%} computed")
            if stopped:
                raise Stopped("stopped while the reference was computed, before the first step")

    def _found(self, sink: Sink | None) -> np.ndarray:
        """Which responses (n·sides,) an earlier pass has computed, on rank 0 now in the sink. Collective."""
        found = np.zeros(len(self._rows.lengths), np.uint8)  # every backend can send it
        if sink is not None and len(places := sink.restore()):
            found[:] = self._rows.at(places)
        return distributed.broadcast_array(found).view(bool)


def check_start(engine: Engine, reference: Reference, batch: TokenBatch, dtype: str) -> None:
    """Raise RunError where policy and reference disagree on a batch before step 1. Collective.

    Token by token, |u| is 0 for a batch of the same rows; stored log-probs were computed with other padding,
    which moves them a little: `START_TOLERANCE`.
    """
    difference = (_token_logps(engine)(batch) - reference(batch)).abs().double()
    real = batch.weights.double()[batch.sequences % batch.num_pairs]
    total, count = distributed.reduce_sum(torch.stack([(difference * real).sum(), real.sum()])).tolist()
    worst = float(distributed.reduce_max((difference * real).max()))
    mean_limit, limit = START_TOLERANCE[dtype]
    if not (total < mean_limit * count and worst < limit):
        raise RunError(
            f"policy and reference are the same weights, yet their log-probs differ by {total / count:.2g} "
            f"a token, by {worst:.2g} at most (< {mean_limit:g} and < {limit:g} expected in {dtype}): the "
            "model depends on what shares a batch with a row (dropout, positions, masks), or the cache is "
            "of other weights (reference.cache=off computes it again)"
        )


def _token_logps(engine: Engine, acting: Acting = nullcontext) -> Reference:
    engine.eval()

    def logps(batch: TokenBatch) -> Tensor:
        with torch.no_grad(), acting():
            return engine.forward(batch)[0].detach()

    return logps


def _starting_adapters(model: PreTrainedModel) -> AbstractContextManager[None]:
    from rcpo.models.adapters import starting_adapters  # peft takes two seconds to import

    return starting_adapters(model)
