"""Text of others on a terminal: spell out characters that cannot be printed, so that they do nothing."""

from __future__ import annotations

import errno
import os
import unicodedata

# of what prints as nothing or moves the cursor: controls, formats (bidirectional marks, joiners), unassigned,
# private and surrogate code points; separators of lines and paragraphs
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}


_LONGEST_NAME = 200


def visible(text: str, *, lines: bool = True) -> str:
    """`text` with each hidden character as its escape, \\x1b or \\u202e; line breaks stay with `lines`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines=lines) for character in text)


def _shown(character: str, *, lines: bool) -> str:
    if (character == "\n" and lines) or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def text_lines(text: str) -> list[str]:
    """The lines of a text, without their ends, as files and terminals have them: \\n, \\r\\n or \\r.

    str.splitlines also cuts at U+2028, U+0085, form feeds, and others, which JSON Lines hold inside strings.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def is_about_a_file(error: OSError) -> bool:
    """Whether the user has to change a path, or its permissions, before anything can run."""
    kinds = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    return isinstance(error, kinds) or error.errno in (errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP)


def os_message(error: OSError) -> str:
    """What an error of the operating system is about, and what it says."""
    if error.filename is None or error.strerror is None:
        return first_line(error)
    name = error.filename if error.filename2 is None else error.filename2
    name = visible(os.fsdecode(name) if isinstance(name, str | bytes) else str(name), lines=False)
    short = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    return f"{short}: {error.strerror}"


def first_line(error: BaseException) -> str:
    """What an error says first: libraries quote bytes of the files that they cannot read."""
    first = next((line.strip() for line in text_lines(str(error)) if line.strip()), type(error).__name__)
    return visible(first, lines=False)
