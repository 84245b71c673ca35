"""A template's own marks of what is learned, `{% generation %}`, held against the answers that rcpo learns.

rcpo learns an answer and the end of its turn. What the marks hold beside that, or lack of it, is found once
for a template and told; an answer that its marks do not hold otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rcpo.data.records import BadRow

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Marks:
    """How a template's marks differ from an answer with the end of its turn, as texts.

    They hold `before` and `after` in addition, and lack `begin` of the answer and `end` of its turn.
    """

    before: str = ""
    begin: str = ""
    end: str = ""
    after: str = ""

    def note(self) -> str | None:
        """The difference for the user, if there is one."""
        more = " and ".join(repr(text) for text in (self.before, self.after) if text)
        less = " and ".join(repr(text) for text in (self.begin, self.end) if text)
        told = [f"also marks {more}, which is not learned"] if more else []
        told += [f"does not mark {less}, which is learned"] if less else []
        return f"its {{% generation %}} {' and '.join(told)}" if told else None

    def refuse_others(self, marked: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> None:
        """Raise BadRow where an answer is not in a mark of its own; all are places in one conversation."""
        free = set(marked)
        for first, after in answers:
            begin, end = first + len(self.begin), after - len(self.end)
            held = next((mark for mark in free if mark[0] <= begin and end <= mark[1]), None)
            if held is None:
                raise BadRow(
                    "the template's {% generation %} does not mark the answer as a whole: give a template "
                    "that marks each answer and the end of its turn (data.template=FILE.jinja), or one "
                    "without marks (data.template=chatml)"
                )
            free.remove(held)


def has_marks(source: str) -> bool:
    """Whether a template marks what is learned."""
    return _MARK.search(source) is not None


def compare(whole: str, marked: Sequence[tuple[int, int]], answer: tuple[int, int]) -> Marks | None:
    """The marks of a rendered conversation against its only answer; None where no mark touches it."""
    first, end = answer
    held = next(((start, after) for start, after in marked if start < end and first < after), None)
    if held is None:
        return None
    start, after = held
    return Marks(whole[start:first], whole[first:start], whole[after:end], whole[end:after])
