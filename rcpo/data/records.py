"""What a preference pair is, as text and as tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPair:
    """One preference pair as text; `id` names where it came from (`file:line`, or the task's own number)."""

    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Example:
    """One preference pair as token ids; `rejected` is empty where a prompt has one response (sft)."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
