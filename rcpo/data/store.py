"""Tokenised pairs in one flat array: 4 bytes a token, whatever the number of pairs."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from rcpo.data.records import Example


class PairDataset(Sequence[Example]):
    """n tokenised pairs: `tokens` (T,) int32 and `offsets` (3n + 1,) int64, parts prompt, chosen, rejected.

    `max_length` bounds the tokens of prompt and completion, for the mismatched completions that are put
    together here; None is no bound.
    """

    def __init__(self, examples: Iterable[Example], max_length: int | None = None) -> None:
        tokens = array("i")
        offsets = array("q", [0])
        ids: list[str] = []
        for example in examples:
            for part in (example.prompt, example.chosen, example.rejected):
                tokens.extend(part)
                offsets.append(len(tokens))
            ids.append(example.id)
        self.tokens = np.frombuffer(tokens, dtype=np.int32) if tokens else np.zeros(0, dtype=np.int32)
        self.offsets = np.frombuffer(offsets, dtype=np.int64)
        self.ids = ids
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        return Example(self.ids[index], *(self._part(3 * index + part) for part in range(3)))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def mismatched(self, index: int) -> list[int]:
        """What kto scores after example `index`'s prompt: the next example's chosen response.

        The partner is fixed, so that its reference log-probs can be cached and one pair a micro-batch is
        enough. It is cut to what `max_length` leaves after the prompt.
        """
        completion = self._part(3 * ((index + 1) % len(self)) + 1)
        if self.max_length is None:
            return completion
        prompt_length = int(self.offsets[3 * index + 1] - self.offsets[3 * index])
        return completion[: self.max_length - prompt_length]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Token counts (n, 3): prompt, chosen, rejected."""
        return np.diff(self.offsets).reshape(-1, 3)

    @cached_property
    def shortest(self) -> int:
        """The position of the example with the fewest tokens: the cheapest filler."""
        return int(self.lengths.sum(axis=1).argmin())

    def response_lengths(self, sides: int) -> np.ndarray:
        """Token counts (n, sides) of the responses that are scored: chosen, rejected, mismatched."""
        responses = self.lengths[:, 1:]
        if sides < 3:
            return responses[:, :sides]
        partners = np.roll(responses[:, 0], -1)
        if self.max_length is not None:
            partners = np.minimum(partners, self.max_length - self.lengths[:, 0])
        return np.column_stack([responses, partners])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, tokens and their borders: equal exactly where the contents are."""
        digest = hashlib.sha256(repr((len(self), self.max_length)).encode())
        for name in self.ids:
            encoded = name.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.tokens.astype("<i4").tobytes())
        return digest.hexdigest()

    def _part(self, part: int) -> list[int]:
        return self.tokens[self.offsets[part] : self.offsets[part + 1]].tolist()
