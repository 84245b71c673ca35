"""Tokenised pairs in flat arrays, in memory or mapped from a file, and the choice of them that a run uses."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from rcpo.data.records import PAIRS, VALUES, Example, Spans
from rcpo.errors import ConfigError

RESPONSES = ("chosen", "rejected", "gold")
PARTS = 1 + len(RESPONSES)  # of an example: its prompt too


class TokenStore:
    """n tokenised pairs: `tokens` (T,) int32 and `offsets` (4n + 1,) int64.

    A pair's parts are prompt, chosen, rejected and gold. `prompts` (n,) uint64 stand for the prompts' texts,
    `values` (n, 4) are the rows' numbers (`VALUES`), NaN where a row gives none. `contexts` (m, 2) are places
    in `tokens`, ascending, of what is read but not learned in responses. `digest` covers all of these and the
    ids.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        prompts: np.ndarray,
        ids: Sequence[str],
        values: np.ndarray | None = None,
        contexts: np.ndarray | None = None,
        digest: str | None = None,
    ) -> None:
        assert len(offsets) == PARTS * len(ids) + 1 and len(prompts) == len(ids), (len(offsets), len(ids))
        self.tokens = tokens
        self.offsets = offsets
        self.prompts = prompts
        self.ids = ids
        self.values = np.full((len(ids), len(VALUES)), np.nan) if values is None else values
        assert self.values.shape == (len(ids), len(VALUES)), self.values.shape
        self.contexts = np.zeros((0, 2), np.int64) if contexts is None else contexts
        self._digest = digest

    @classmethod
    def of(cls, examples: Iterable[Example], values: np.ndarray | None = None) -> TokenStore:
        """The examples in memory, in their order; a prompt's tokens stand for its text."""
        tokens, offsets = array("i"), array("q", [0])
        prompts, ids, contexts = array("Q"), [], array("q")
        for example in examples:
            contexts.extend(example.context_places(len(tokens)))
            for part in example.parts:
                tokens.extend(part)
                offsets.append(len(tokens))
            own = hashlib.blake2b(array("i", example.prompt).tobytes(), digest_size=8)
            prompts.append(int.from_bytes(own.digest(), "little"))
            ids.append(example.id)
        return cls(
            np.frombuffer(tokens, dtype=np.int32) if tokens else np.zeros(0, dtype=np.int32),
            np.frombuffer(offsets, dtype=np.int64),
            np.frombuffer(prompts, dtype=np.uint64) if prompts else np.zeros(0, dtype=np.uint64),
            ids,
            values,
            np.array(contexts, dtype=np.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, tokens, their borders and values: equal exactly where the contents are."""
        if self._digest is not None:
            return self._digest
        digest = hashlib.sha256(str(len(self)).encode())
        for name in self.ids:
            encoded = name.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.values.astype("<f8").tobytes())
        digest.update(self.contexts.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Token counts (n, 4): prompt, chosen, rejected, gold."""
        return np.diff(self.offsets).reshape(-1, PARTS)

    @cached_property
    def learned(self) -> np.ndarray:
        """Counts (n, 4) of the tokens that are not `contexts`; those of prompts too."""
        if not len(self.contexts):
            return self.lengths
        learned = self.lengths.astype(np.int64).ravel()
        first, end = self.contexts.T
        np.subtract.at(learned, np.searchsorted(self.offsets, first, "right") - 1, end - first)
        return learned.reshape(-1, PARTS)

    def example(self, row: int) -> Example:
        """One of the pairs."""
        parts = [self.part(row, part) for part in range(PARTS)]
        return Example(self.ids[row], *parts, contexts=self.contexts_of(row) or None)

    def contexts_of(self, row: int) -> dict[str, Spans]:
        """What a pair's responses only read, by side, counted from where each begins."""
        if not len(self.contexts):
            return {}
        begins = self.offsets[PARTS * row + 1 : PARTS * (row + 1) + 1].tolist()  # and the next pair's
        places = np.searchsorted(self.contexts[:, 0], begins)
        found = {}
        for number, side in enumerate(RESPONSES):
            spans = self.contexts[places[number] : places[number + 1]] - begins[number]
            if len(spans):
                found[side] = tuple((first, end) for first, end in spans.tolist())
        return found

    def part(self, row: int, part: int) -> list[int]:
        """One part of a pair: 0 the prompt, 1 the chosen response, 2 the rejected one, 3 the gold one."""
        first, end = self.offsets[PARTS * row + part : PARTS * row + part + 2]
        return self.tokens[first:end].tolist()


class PairDataset(Sequence[Example]):
    """The examples that a run uses, in its order: `rows` (n,) of some stores, counted through all of them.

    `rows` None is all. `kind` says what the examples are (`rcpo.data.records`). `max_length` bounds the
    tokens of prompt and completion, for the mismatched completions that are put together here; None is no
    bound.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        max_length: int | None = None,
        *,
        rows: np.ndarray | None = None,
        kind: str = PAIRS,
    ) -> None:
        self._stores = stores
        self._firsts = np.cumsum([0, *(len(store) for store in stores)])
        everything = int(self._firsts[-1])
        if rows is not None and np.array_equal(rows, np.arange(everything)):
            rows = None  # the same contents have the same fingerprint
        self._rows = rows
        self._count = everything if rows is None else len(rows)
        self.max_length = max_length
        self.kind = kind

    def take(self, places: np.ndarray) -> PairDataset:
        """The examples at `places` (n,), in that order."""
        rows = places if self._rows is None else self._rows[places]
        return PairDataset(self._stores, self.max_length, rows=rows, kind=self.kind)

    @classmethod
    def of(
        cls, examples: Iterable[Example], max_length: int | None = None, values: np.ndarray | None = None
    ) -> PairDataset:
        """The examples themselves, in memory; `values` (n, 4) are their numbers."""
        return cls([TokenStore.of(examples, values)], max_length)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        store, row = self._find(index % len(self))
        return store.example(row)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> Sequence[str]:
        """Each example's id."""
        return _Ids(self)

    def id(self, index: int) -> str:
        store, row = self._find(index)
        return store.ids[row]

    def mismatched(self, index: int) -> list[int]:
        """What kto scores after example `index`'s prompt: its partner's chosen response, or its only one.

        It is cut to what `max_length` leaves after the prompt.
        """
        store, row = self._find(int(self.partners[index]))
        completion = store.part(row, 1) or store.part(row, 2)
        return completion if self.max_length is None else completion[: self._room(index)]

    def mismatched_contexts(self, index: int) -> Spans:
        """What is only read of `mismatched`."""
        store, row = self._find(int(self.partners[index]))
        spans = store.contexts_of(row).get("chosen" if store.lengths[row, 1] else "rejected", ())
        if self.max_length is None:
            return spans
        room = self._room(index)
        return tuple((first, min(end, room)) for first, end in spans if first < room)

    def _room(self, index: int) -> int:
        assert self.max_length is not None
        return self.max_length - int(self.lengths[index, 0])

    @cached_property
    def partners(self) -> np.ndarray:
        """The position (n,) of the next example with another prompt; after the last comes the first.

        In a file written pair by pair the next row answers the same prompt, so its completion is no
        mismatched one. The partner is fixed, so that its reference log-probs can be cached and one pair a
        micro-batch is enough. Raises ConfigError where all prompts are the same.
        """
        ends = np.flatnonzero(self.prompts != np.roll(self.prompts, -1))  # of runs of one prompt
        if not len(ends):
            raise ConfigError(
                f"data: all {len(self)} examples of a split have one prompt, and kto also scores completions "
                "of other prompts; give data with several prompts, or hold more out: data.eval_fraction"
            )
        place = np.searchsorted(ends, np.arange(len(self))) % len(ends)
        return (ends[place] + 1) % len(self)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Token counts (n, 4): prompt, chosen, rejected, gold."""
        return self._gathered([store.lengths for store in self._stores])

    @cached_property
    def learned(self) -> np.ndarray:
        """Counts (n, 4) as `lengths`, without what responses only read."""
        return self._gathered([store.learned for store in self._stores])

    @cached_property
    def values(self) -> np.ndarray:
        """The rows' numbers (n, 4) in the order of `VALUES`; NaN where a row gives none."""
        return self._chosen_rows(np.concatenate([store.values for store in self._stores]))

    @property
    def margins(self) -> np.ndarray:
        """By how much each chosen response was scored above the rejected one, (n,); NaN where nobody says."""
        return self.values[:, VALUES.index("margin")]

    @cached_property
    def weights(self) -> np.ndarray:
        """Each example's weight in the loss, (n,): 1 where its row gives none."""
        weights = self.values[:, VALUES.index("weight")]
        return np.where(np.isnan(weights), 1.0, weights)

    @cached_property
    def prompts(self) -> np.ndarray:
        """64 bits (n,) for each example's prompt, equal where the prompts' texts are."""
        return self._chosen_rows(np.concatenate([store.prompts for store in self._stores]))

    @cached_property
    def largest_token(self) -> int:
        """The largest token of the stores, which hold the examples among others; −1 without any."""
        return max((int(store.tokens.max()) for store in self._stores if len(store.tokens)), default=-1)

    @cached_property
    def prompts_fingerprint(self) -> str:
        """SHA-256 of the distinct prompts, whatever their order and their tokens."""
        return hashlib.sha256(np.unique(self.prompts).astype("<u8").tobytes()).hexdigest()

    @cached_property
    def shortest(self) -> int:
        """The position of the example with the fewest tokens: the cheapest filler."""
        return int(self.lengths.sum(axis=1).argmin())

    def response_lengths(self, sides: tuple[str, ...]) -> np.ndarray:
        """Token counts (n, sides) of the responses that are scored, which are some of `SIDES`."""
        return np.column_stack([self._side_lengths(side) for side in sides])

    def learned_lengths(self, sides: tuple[str, ...]) -> np.ndarray:
        """Counts (n, sides) as `response_lengths`, of the tokens that are scored."""
        if not any(len(store.contexts) for store in self._stores):
            return self.response_lengths(sides)
        return np.column_stack([self._side_learned(side) for side in sides])

    def _side_lengths(self, side: str) -> np.ndarray:
        if side != "mismatched":
            return self.lengths[:, RESPONSES.index(side) + 1]
        chosen, rejected = self.lengths[:, 1], self.lengths[:, 2]
        partners = np.where(chosen > 0, chosen, rejected)[self.partners]
        if self.max_length is None:
            return partners
        return np.minimum(partners, self.max_length - self.lengths[:, 0])

    def _side_learned(self, side: str) -> np.ndarray:
        if side != "mismatched":
            return self.learned[:, RESPONSES.index(side) + 1]
        read = (sum(end - first for first, end in self.mismatched_contexts(n)) for n in range(len(self)))
        return self._side_lengths(side) - np.fromiter(read, np.int64, len(self))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, tokens, their borders and their order: equal exactly where the contents are."""
        digest = hashlib.sha256(repr((len(self), self.max_length)).encode())
        for store in self._stores:
            digest.update(store.digest.encode())
        if self._rows is not None:
            digest.update(self._rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def _find(self, index: int) -> tuple[TokenStore, int]:
        row = index if self._rows is None else int(self._rows[index])
        number = 0 if len(self._stores) == 1 else int(np.searchsorted(self._firsts, row, "right")) - 1
        return self._stores[number], row - int(self._firsts[number])

    def _gathered(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return self._chosen_rows(values[0] if len(values) == 1 else np.concatenate(values))

    def _chosen_rows(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]


class _Ids(Sequence[str]):
    """The ids of a dataset, made when they are asked for."""

    def __init__(self, dataset: PairDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._dataset.id(place) for place in range(*index.indices(len(self)))]
        return self._dataset.id(range(len(self))[index])
