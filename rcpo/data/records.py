"""What a preference pair is: as a row of a file, as text, and as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Content = str | list[Message]
"""Plain text, or the messages of a conversation: `role`, `content` and whatever else a template reads."""

PAIRS, UNPAIRED, SFT = "pairs", "unpaired", "sft"
"""Kinds of data: both responses of each prompt; one, wanted or unwanted (kto); one, to imitate."""


class BadRow(ValueError):
    """Why a row cannot be used, in words that do not depend on its contents, so that they can be counted."""


@dataclass(frozen=True)
class Row:
    """One row in the one form that all others are brought to; a response is None where there is none.

    Either all parts are text, or all are messages. `tools` are the functions that a template describes,
    `options` what it reads besides.
    """

    kind: str
    prompt: Content
    chosen: Content | None
    rejected: Content | None
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class TextPair:
    """One preference pair as text; `id` names where it came from (`file:line`, or the task's own number)."""

    id: str
    prompt: str
    chosen: str | None
    rejected: str | None


@dataclass(frozen=True)
class Example:
    """One preference pair as token ids; a response is empty where a prompt has none on that side."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
