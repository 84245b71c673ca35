"""What loading did to the data: nothing is dropped or cut without being counted here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rcpo.config import ConfigError


@dataclass
class DataReport:
    """Counts of one `load_datasets`.

    `drop` is `data.on_bad=drop`: unusable pairs are counted and left out, otherwise the first is an error.
    `dropped` and `examples` map a reason to how many pairs it cost and to the first place (`file:line`).
    """

    source: str
    drop: bool = False
    read: int = 0
    train: int = 0
    evaluation: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0
    shared_prompts: int = 0

    def bad(self, reason: str, place: str) -> None:
        """Counts a pair that is left out and keeps the first place of each reason, or raises ConfigError."""
        if not self.drop:
            raise ConfigError(f"{place}: {reason}; mend it, or leave such pairs out: data.on_bad=drop")
        self.dropped[reason] += 1
        self.examples.setdefault(reason, place)

    def as_dict(self) -> dict[str, int | str | dict[str, int]]:
        """Plain values, ready for JSON."""
        return {
            "source": self.source,
            "read": self.read,
            "train": self.train,
            "evaluation": self.evaluation,
            "dropped": dict(self.dropped),
            "truncated_prompts": self.truncated_prompts,
            "truncated_responses": self.truncated_responses,
            "shared_prompts": self.shared_prompts,
        }

    def lines(self) -> list[str]:
        """The counts as sentences for a person."""
        told = [
            f"{self.source}: {self.read} pairs read, {self.train} to train on, {self.evaluation} held out"
        ]
        total = sum(self.dropped.values())
        if total:
            told.append(f"{total} pairs dropped:")
            for reason, count in self.dropped.most_common():
                told.append(f"  {count} {reason} (first: {self.examples[reason]})")
        if self.truncated_prompts or self.truncated_responses:
            told.append(
                f"truncated: {self.truncated_prompts} prompts at their start (data.max_prompt_length), "
                f"{self.truncated_responses} responses at their end (data.max_length)"
            )
        if self.shared_prompts:
            told.append(
                f"warning: {self.shared_prompts} held-out pairs have a prompt that is also trained on"
            )
        return told
