"""Splits as the datasets library writes them: `train`, `train[:10%]`, `train[100:200]`, `train[:5%]+test`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rcpo.config.data import SourceSpec
from rcpo.errors import ConfigError

WHOLE = "train"  # the split that a file without splits is


@dataclass(frozen=True)
class Split:
    """Whole splits or parts of them: the library's `text`, and the `names` of the splits in it."""

    text: str
    names: tuple[str, ...]

    def rows(self, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
        """Split, first row and end of each part, where the splits have so many rows."""
        from datasets import ReadInstruction

        instructions = ReadInstruction.from_spec(self.text).to_absolute(dict(sizes))
        return [(part.splitname, part.from_, part.to) for part in instructions]


def read_split(spec: SourceSpec) -> Split:
    """What `data.split` or another key of that kind asks for; raises ConfigError where it cannot be read.

    `[100:200]` is short for `train[100:200]`.
    """
    from datasets import ReadInstruction

    text = f"{WHOLE}{spec.split}" if spec.split.startswith("[") else spec.split
    try:
        ReadInstruction.from_spec(text)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"{spec.key('split')}={spec.split} is not a split: write train, train[:10%], train[100:200], or "
            "several of these joined by +, in quotes"
        ) from error
    names = dict.fromkeys(part.partition("[")[0].strip() for part in text.split("+"))
    return Split(text, tuple(names))
