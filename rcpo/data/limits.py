"""Truncation: what goes where a pair is too long. A response never becomes empty."""

from __future__ import annotations

from dataclasses import dataclass

from rcpo.errors import ConfigError

KEEP_END, KEEP_START = "keep_end", "keep_start"


class UnusablePair(ValueError):
    """Why a pair has nothing to learn from once it is tokenised and cut."""


@dataclass(frozen=True)
class Limits:
    """In tokens; None: no limit. `truncation`: which side of a prompt stays; a response keeps its start."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation: str = KEEP_END

    def check(self, opening: int) -> None:
        """Raise ConfigError where the limits leave nothing of a prompt but its `opening` tokens."""
        if self.max_prompt_length is not None and self.max_prompt_length <= opening:
            raise ConfigError(
                f"data.max_prompt_length={self.max_prompt_length} leaves no token for the prompt after the "
                f"{opening} that the tokenizer puts first; raise it"
            )

    def cut_prompt(self, ids: list[int], opening: int, tail: int) -> list[int]:
        """At most `max_prompt_length` tokens; the first `opening` and the last `tail` ones stay.

        Raises UnusablePair where they leave no room for anything between them.
        """
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return ids
        room = limit - opening - tail
        if room < 1:
            raise UnusablePair("data.max_prompt_length leaves no room beside what the template writes")
        end = len(ids) - tail
        middle = ids[end - room : end] if self.truncation == KEEP_END else ids[opening : opening + room]
        return ids[:opening] + middle + ids[end:]

    def cut_response(self, ids: list[int], prompt: int) -> list[int]:
        """What fits after a prompt of that many tokens; raises UnusablePair where nothing does."""
        if self.max_length is None or not ids:
            return ids
        room = self.max_length - prompt
        if room < 1:
            raise UnusablePair("prompt leaves no room for a response within data.max_length")
        return ids if len(ids) <= room else ids[:room]
