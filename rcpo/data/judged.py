"""Answers that somebody judged -> pairs: two answers and judgments, lists with scores or ranks, trees."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

from rcpo.data.conversations import read_turn_lists, speaker
from rcpo.data.forms import Fields
from rcpo.data.names import JUDGES, snake
from rcpo.data.records import BadRow

FIRST, SECOND, TIE = "first", "second", "tie"
BEST_WORST, ADJACENT, ALL = "best_worst", "adjacent", "all"
TIE_WEIGHT = 0.5  # of each order of a tie: together they weigh as much as a pair


@dataclass(frozen=True)
class Comparisons:
    """Two answers and one or more judgments; `meaning` says what a judgment's value, as text, stands for.

    The majority of the judgments decides; as many for one answer as for the other are a tie. A tie becomes
    both orders at half the weight, or nothing with `ties` drop. `flags` are columns of which the true one
    names the winner. `listed` is the column whose two elements are the answers.
    """

    name: str
    first: str
    second: str
    judges: tuple[str, ...]
    meaning: Mapping[str, str]
    ties: str
    flags: Mapping[str, str] = field(default_factory=dict)
    listed: str | None = None

    def rows(self, fields: Fields) -> list[Fields]:
        first, second = self._answers(fields)
        winner = self._winner(fields)
        rest = {name: value for name, value in fields.items() if name not in self._own}
        if (turns := read_turn_lists(rest.get("prompt"), first, second)) is not None:
            first, second = turns
            del rest["prompt"]
        return compared(rest, first, second, winner, self.ties)

    def _answers(self, fields: Fields) -> tuple[Any, Any]:
        if self.listed is not None:
            answers = fields.get(self.listed)
            if not isinstance(answers, list) or len(answers) != 2:
                raise BadRow(f"column {self.listed!r} is not a list of two answers")
            return _text_of(answers[0]), _text_of(answers[1])
        for column in (self.first, self.second):
            if column not in fields:
                raise BadRow(f"no field {column!r}")
        return fields[self.first], fields[self.second]

    @property
    def _own(self) -> set[str | None]:
        return {self.first, self.second, self.listed, *self.judges, *self.flags}

    def _winner(self, fields: Fields) -> str:
        if self.flags:
            [*won] = [winner for column, winner in self.flags.items() if _is_true(fields.get(column))]
            if len(won) != 1:
                raise BadRow(f"not exactly one of {', '.join(map(repr, self.flags))} is true")
            return won[0]
        votes = [vote for judge in self.judges for vote in self._votes(judge, fields.get(judge))]
        if not votes:
            raise BadRow(f"no judgment in {', '.join(map(repr, self.judges))}")
        return majority(votes)

    def _votes(self, judge: str, value: Any) -> Iterator[str]:
        for one in map(judgment_of, value if isinstance(value, list) else [value]):
            if one is None or one == "":
                continue
            vote = self.meaning.get(normal(one))
            if vote is None:
                raise BadRow(
                    f"column {judge!r} holds a judgment that is not explained: data.labels={{VALUE: first}} "
                    "explains a value, and a template turns numbers into words, as "
                    f'"data.columns.judgment=\'{{{{ \\"first\\" if {judge} < 1.5 else \\"second\\" }}}}\'"'
                )
            yield vote


def judgment_of(value: Any) -> Any:
    """Return a judgment itself, or the one that an annotator's object holds."""
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in value if snake(key) in JUDGES), None)


def _text_of(answer: Any) -> Any:
    """Return an answer in a list: itself, or the text in its object."""
    if not isinstance(answer, dict):
        return answer
    return next((answer[key] for key in TEXTS if key in answer), answer)


def _is_true(value: Any) -> bool:
    return normal(value) in ("true", "1", "yes")


def majority(votes: Sequence[str]) -> str:
    """What most votes say; a tie where as many are for the one as for the other, or most are ties."""
    first, second, ties = (votes.count(one) for one in (FIRST, SECOND, TIE))
    if first == second or ties > max(first, second):
        return TIE
    return FIRST if first > second else SECOND


def compared(fields: Fields, first: Any, second: Any, winner: str, ties: str) -> list[Fields]:
    """The pair, or pairs, that a comparison of two answers is."""
    if winner == FIRST:
        return [fields | {"chosen": first, "rejected": second}]
    if winner == SECOND:
        return [fields | {"chosen": second, "rejected": first}]
    if ties == "drop":
        return []
    half = fields | {"weight": TIE_WEIGHT}
    return [half | {"chosen": first, "rejected": second}, half | {"chosen": second, "rejected": first}]


_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


def normal(value: Any) -> str:
    """A judgment or label as text, the same for values that mean the same.

    >>> normal(1.0), normal("2.0"), normal(True), normal("Thumbs-up"), normal("[[A]]")
    ('1', '2', 'true', 'thumbs up', 'a')
    """
    text = str(value).strip().lower().strip("[]")
    if _NUMBER.fullmatch(text):
        return text.partition(".")[0]
    return re.sub(r"[\s_-]+", " ", text).strip()


@dataclass(frozen=True)
class Scored:
    """An answer and how good it is; more is better."""

    answer: Any
    score: float


def paired(fields: Fields, answers: Sequence[Scored], pairing: str, ties: str) -> list[Fields]:
    """The pairs of some answers to one prompt, by `data.pairing`, with their scores; raises BadRow."""
    if len(answers) < 2:
        raise BadRow("fewer than two answers with a score or rank")
    ordered = sorted(answers, key=lambda one: -one.score)
    chosen = {
        BEST_WORST: [(ordered[0], ordered[-1])],
        ADJACENT: list(pairwise(ordered)),
        ALL: list(combinations(ordered, 2)),
    }[pairing]
    found = []
    for better, worse in chosen:
        winner = TIE if better.score == worse.score else FIRST
        scores = {"score_chosen": better.score, "score_rejected": worse.score}
        found += compared(fields | scores, better.answer, worse.answer, winner, ties)
    return found


@dataclass(frozen=True)
class Ranked:
    """Several answers with scores or ranks: in two lists, or in one list of objects.

    `text` and `mark` are keys of the objects, None where `answers` and `marks` are lists of their own, or
    columns of their own. Of ranks the smallest is the best. Answers without a mark are left out.
    """

    name: str
    answers: str | tuple[str, ...]
    marks: str | tuple[str, ...] | None
    text: str | None
    mark: str | None
    smallest_best: bool
    pairing: str
    ties: str

    def rows(self, fields: Fields) -> list[Fields]:
        answers, marks = _listed(self.answers, fields), _listed(self.marks, fields)
        if isinstance(answers, dict) and isinstance(marks, dict):
            marks = [marks.get(key) for key in answers]
        answers = list(answers.values()) if isinstance(answers, dict) else answers
        if not isinstance(answers, list):
            raise BadRow(f"column {self.answers!r} is not a list of answers")
        own = [
            one
            for part in (self.answers, self.marks)
            for one in ([part] if isinstance(part, str) else part or ())
        ]
        rest = {name: value for name, value in fields.items() if name not in own}
        scored = [
            Scored(answer, -mark if self.smallest_best else mark)
            for answer, mark in self._marked(answers, marks)
            if mark is not None and answer is not None
        ]
        return paired(rest, scored, self.pairing, self.ties)

    def _marked(self, answers: list[Any], marks: Any) -> Iterator[tuple[Any, float | None]]:
        if self.marks is not None:
            if not isinstance(marks, list) or len(marks) != len(answers):
                raise BadRow(f"columns {self.answers!r} and {self.marks!r} are not lists of the same length")
            for answer, mark in zip(answers, marks, strict=True):
                inside = self.text is not None and isinstance(answer, dict)
                yield (self._said(answer) if inside else answer), number(mark)
            return
        for answer in answers:
            yield self._said(answer), number(answer.get(str(self.mark)))

    def _said(self, answer: Any) -> Any:
        """The text in an answer's object."""
        if not isinstance(answer, dict) or self.text not in answer:
            raise BadRow(f"column {self.answers!r} holds an answer without {self.text!r}")
        return answer[self.text]


def _listed(column: str | tuple[str, ...] | None, fields: Fields) -> Any:
    """A column's list, or those of several columns in their order."""
    if isinstance(column, tuple):
        return [None if fields.get(name) == "" else fields.get(name) for name in column]
    return None if column is None else fields.get(column)


def number(value: Any) -> float | None:
    """Return a score or rank, None where there is none. Raises BadRow for a value that is not finite."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow("a score or rank is not a finite number")
    return found


TEXTS = ("text", "content", "response", "answer", "output", "completion", "body", "value")
REPLIES = ("replies", "children", "responses")
MARKS = (
    "score", "rating", "reward", "overall_score", "pm_score", "elo", "votes", "vote", "upvotes",
    "rank", "ranking",
)  # fmt: skip


@dataclass(frozen=True)
class Trees:
    """A conversation that branches, as Open Assistant's: `root` holds its first message, with replies in it.

    `root` None: the row itself is that message. Every group of the assistant's replies with scores or ranks
    gives pairs; replies without one are left out.
    """

    name: str
    root: str | None
    pairing: str
    ties: str

    def rows(self, fields: Fields) -> list[Fields]:
        root = fields if self.root is None else fields.get(self.root)
        if not isinstance(root, dict):
            raise BadRow(f"column {self.root!r} holds no tree of messages")
        found = list(self._below(root, []))
        if not found:
            raise BadRow("no two replies of the tree have a rank or score")
        return found

    def _below(self, node: Mapping[str, Any], before: list[dict[str, str]]) -> Iterator[Fields]:
        path = [*before, {"role": _role(node), "content": _said(node)}]
        replies: list[Any] = next((node[key] for key in REPLIES if isinstance(node.get(key), list)), [])
        if any(not isinstance(reply, dict) for reply in replies):
            raise BadRow("a reply of the tree is not an object")
        marked = [Scored(_said(reply), score) for reply in replies if (score := _score(reply)) is not None]
        if len(marked) > 1 and path[-1]["role"] != "assistant":
            yield from paired({"prompt": path}, marked, self.pairing, self.ties)
        for reply in replies:
            yield from self._below(reply, path)


def _said(node: Mapping[str, Any]) -> str:
    text = next((node[key] for key in TEXTS if isinstance(node.get(key), str)), None)
    if text is None:
        raise BadRow("a message of the tree has no text")
    return text


def _role(node: Mapping[str, Any]) -> str:
    role = speaker(node)
    return role if role in ("assistant", "system", "tool") else "user"


def _score(node: Mapping[str, Any]) -> float | None:
    for key in MARKS:
        mark = number(node.get(key))
        if mark is not None:
            return -mark if key.startswith("rank") else mark
    return None
