"""Answers that somebody judged -> pairs: two answers and judgments, lists with scores or ranks, trees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from rcpo.data.forms import ASSISTANTS, Fields
from rcpo.data.records import BadRow

FIRST, SECOND, TIE = "first", "second", "tie"
BEST_WORST, ADJACENT, ALL = "best_worst", "adjacent", "all"
TIE_WEIGHT = 0.5  # of each order of a tie: together they weigh as much as a pair


@dataclass(frozen=True)
class Comparisons:
    """Two answers and one or more judgments; `meaning` says what a judgment's value, as text, stands for.

    The majority of the judgments decides; as many for one answer as for the other are a tie. A tie becomes
    both orders at half the weight, or nothing with `ties` drop.
    """

    name: str
    first: str
    second: str
    judges: tuple[str, ...]
    meaning: Mapping[str, str]
    ties: str

    def rows(self, fields: Fields) -> list[Fields]:
        for column in (self.first, self.second):
            if column not in fields:
                raise BadRow(f"no field {column!r}")
        rest = {name: value for name, value in fields.items() if name not in self._own}
        return compared(rest, fields[self.first], fields[self.second], self._winner(fields), self.ties)

    @property
    def _own(self) -> set[str]:
        return {self.first, self.second, *self.judges}

    def _winner(self, fields: Fields) -> str:
        votes = [vote for judge in self.judges for vote in self._votes(judge, fields.get(judge))]
        if not votes:
            raise BadRow(f"no judgment in {', '.join(map(repr, self.judges))}")
        return majority(votes)

    def _votes(self, judge: str, value: Any) -> Iterator[str]:
        for one in value if isinstance(value, list) else [value]:
            if one is None or one == "":
                continue
            vote = self.meaning.get(normal(one))
            if vote is None:
                raise BadRow(f"column {judge!r} holds a judgment that is not explained; see data.labels")
            yield vote


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


def normal(value: Any) -> str:
    """A judgment or label as text: 1.0 and "1" are the same, and so are True and "true"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


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

    `text` and `mark` are keys of the objects, None where `answers` and `marks` are lists of their own. Of
    ranks the smallest is the best. Answers without a mark are left out.
    """

    name: str
    answers: str
    marks: str | None
    text: str | None
    mark: str | None
    smallest_best: bool
    pairing: str
    ties: str

    def rows(self, fields: Fields) -> list[Fields]:
        answers = fields.get(self.answers)
        if not isinstance(answers, list):
            raise BadRow(f"column {self.answers!r} is not a list of answers")
        rest = {name: value for name, value in fields.items() if name not in (self.answers, self.marks)}
        scored = [
            Scored(answer, -mark if self.smallest_best else mark)
            for answer, mark in self._marked(answers, fields)
            if mark is not None
        ]
        return paired(rest, scored, self.pairing, self.ties)

    def _marked(self, answers: list[Any], fields: Fields) -> Iterator[tuple[Any, float | None]]:
        if self.marks is not None:
            marks = fields.get(self.marks)
            if not isinstance(marks, list) or len(marks) != len(answers):
                raise BadRow(f"columns {self.answers!r} and {self.marks!r} are not lists of the same length")
            for answer, mark in zip(answers, marks, strict=True):
                yield (answer[self.text] if self.text and isinstance(answer, dict) else answer), number(mark)
            return
        for answer in answers:
            if not isinstance(answer, dict) or self.text not in answer:
                raise BadRow(f"column {self.answers!r} holds an answer without {self.text!r}")
            yield answer[self.text], number(answer.get(str(self.mark)))


def number(value: Any) -> float | None:
    """Return a score or rank, None where there is none. Raises BadRow for a value that is not finite."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow("a score or rank is not a finite number")
    return found


TEXTS = ("text", "content", "response", "answer", "output", "completion", "body", "value")
REPLIES = ("replies", "children", "responses")
MARKS = ("score", "rating", "reward", "overall_score", "rank", "ranking")


@dataclass(frozen=True)
class Trees:
    """A conversation that branches, as Open Assistant's: `root` is its first message, with replies in it.

    Every group of the assistant's replies with scores or ranks gives pairs; replies without one are left out.
    """

    name: str
    root: str
    pairing: str
    ties: str

    def rows(self, fields: Fields) -> list[Fields]:
        root = fields.get(self.root)
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
    return "assistant" if node.get("role", node.get("from")) in ASSISTANTS else "user"


def _score(node: Mapping[str, Any]) -> float | None:
    for key in MARKS:
        mark = number(node.get(key))
        if mark is not None:
            return -mark if key.startswith("rank") else mark
    return None
