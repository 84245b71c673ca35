"""What a preference pair is: as a row of a file, as text, and as tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Spans = tuple[tuple[int, int], ...]
"""Beginnings and ends of parts of a text or of a list of tokens, ascending."""

Content = str | list[Message]
"""Plain text, or the messages of a conversation: `role`, `content` and whatever else a template reads."""

VALUES = ("score_chosen", "score_rejected", "margin", "weight")
"""The numbers that a row may give beside its texts."""

PAIRS, UNPAIRED, SFT = "pairs", "unpaired", "sft"
"""Kinds of data: both responses of each prompt; one, wanted or unwanted (kto); one, to imitate."""


class BadRow(ValueError):
    """Why a row cannot be used, in words that do not depend on its contents, so that they can be counted."""


class Unrendered(BadRow):
    """What a chat template does not render as it is to be learned, and another template may."""


@dataclass(frozen=True)
class Row:
    """One row in the one form that all others are brought to; a response is None where there is none.

    Either all parts are text, or all are messages. `tools` are the functions that a template describes,
    `options` what it reads besides. `gold` is a third answer of a pair, better than both. `score_chosen` and
    `score_rejected` are someone's marks, `margin` their difference, `weight` the row's part in the loss.
    """

    kind: str
    prompt: Content
    chosen: Content | None
    rejected: Content | None
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None
    gold: Content | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    margin: float | None = None
    weight: float | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers in the order of `VALUES`, NaN for those that the row does not give."""
        found = (getattr(self, name) for name in VALUES)
        return tuple(math.nan if value is None else value for value in found)


@dataclass(frozen=True)
class TextPair:
    """One preference pair as text; `id` names where it came from (`file:line`, or the task's own number).

    `contexts` holds, by side, what of a response with several turns is read but not learned; None: nothing.
    """

    id: str
    prompt: str
    chosen: str | None
    rejected: str | None
    gold: str | None = None
    contexts: Mapping[str, Spans] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Example:
    """One preference pair as token ids; a response is empty where a prompt has none on that side.

    `contexts` holds, by side, the response tokens that are read but not learned; None: all are learned.
    """

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    gold: list[int] = field(default_factory=list)
    contexts: Mapping[str, Spans] | None = field(default=None, kw_only=True)

    @property
    def parts(self) -> tuple[list[int], ...]:
        """Prompt, chosen, rejected and gold, as they lie in a store."""
        return self.prompt, self.chosen, self.rejected, self.gold

    def context_places(self, start: int) -> Iterator[int]:
        """First and end of each context, one after the other, where the example's tokens begin at `start`."""
        if not self.contexts:
            return
        place = start + len(self.prompt)
        for side in ("chosen", "rejected", "gold"):
            for span in self.contexts.get(side, ()):
                yield from (place + edge for edge in span)
            place += len(getattr(self, side))
