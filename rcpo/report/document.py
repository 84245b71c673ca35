"""What a report consists of, whatever it is rendered to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class Table:
    """Cells of plain text; `texts` are the columns that hold words, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    texts: Sequence[int] = (0,)
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is its file's, `caption` says what to look for."""

    name: str
    figure: Figure
    caption: str
    kind: str = "picture"


Block = Paragraph | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Document:
    """A whole report: the headline says what happened, `notes` what to beware of."""

    title: str
    status: str
    headline: str
    details: Sequence[str] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    def pictures(self) -> list[Picture]:
        """All figures, in order."""
        return [block for part in self.sections for block in part.blocks if isinstance(block, Picture)]
