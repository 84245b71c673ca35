"""Text of others on a terminal: what is no printable character is spelled out, so that it can do nothing."""

from __future__ import annotations

import unicodedata

# of what prints as nothing or moves the cursor: controls, formats (bidirectional marks, joiners), unassigned,
# private and surrogate code points; separators of lines and paragraphs
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}


def visible(text: str, *, lines: bool = True) -> str:
    """`text` with each hidden character as its escape, \\x1b or \\u202e; line breaks stay with `lines`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines=lines) for character in text)


def _shown(character: str, *, lines: bool) -> str:
    if (character == "\n" and lines) or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def first_line(error: BaseException) -> str:
    """What an error says first: libraries quote bytes of the files that they cannot read."""
    lines = str(error).strip().splitlines()
    return visible(lines[0], lines=False) if lines else type(error).__name__
