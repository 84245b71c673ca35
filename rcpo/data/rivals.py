"""Detects files of several answers to a prompt and a judgment of them: comparisons, scores, ranks, trees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rcpo.data.conversations import speaker
from rcpo.data.forms import Form, FormOptions, Renamed
from rcpo.data.judged import (
    FIRST,
    MARKS,
    REPLIES,
    SECOND,
    TEXTS,
    TIE,
    Comparisons,
    Ranked,
    Trees,
    judgment_of,
    normal,
)  # fmt: skip
from rcpo.data.names import (
    ANSWER_STEMS,
    DEGREES,
    JUDGES,
    LISTS,
    MARKED,
    MODELS,
    RANK_LISTS,
    SCORE_LISTS,
    SEVERAL,
    TIES,
    families,
    pair_of,
    snake,
    words,
)  # fmt: skip
from rcpo.data.sample import Judged, Sample, asked, described
from rcpo.errors import ConfigError


def find_comparisons(sample: Sample, options: FormOptions, place: str) -> Form | None:
    answers = two_answers(sample)
    listed = None if answers else _two_in_a_list(sample)
    flags = {} if answers is None else _flags(sample, answers)
    judges = () if flags else find_judges(sample)
    stated = {} if answers is None or flags or judges else _stated(sample, answers)
    judges = judges or tuple(stated)
    if (answers is None and listed is None) or not (judges or flags):
        return None
    first, second, tokens = answers or ("first", "second", ("0", "1"))
    own = {first, second, listed, *judges, *flags}
    asking, more, history = asked(
        Sample(sample.rows, tuple(name for name in sample.names if name not in own))
    )
    fields = Renamed("", asking, more, history=history)
    values = {
        normal(one)
        for judge in judges
        for value in sample.values(judge)
        for one in map(judgment_of, value if isinstance(value, list) else [value])
        if one is not None and one != ""
    }
    if listed is not None and "2" in values and "0" not in values:
        tokens = ("1", "2")
    meaning: dict[str, str] = next(iter(stated.values()), {})
    if judges and not stated:
        where = f"{place}: column {judges[0]!r}"
        meaning = _winners(first, second, tokens, values, options.labels, where, listed is not None)
    read_from = described("", asking, more, history).strip(" ()")
    answered = f"the two in {listed!r}" if listed else f"{first!r} and {second!r}"
    name = f"comparisons of {answered} judged by {', '.join(map(repr, judges or flags))}" + (
        f", {read_from}" if read_from else ""
    )
    form = Comparisons(name, first, second, judges, meaning, options.ties, flags, listed)
    return Judged(name, fields, form)


def two_answers(sample: Sample) -> tuple[str, str, tuple[str, str]] | None:
    """Two columns of answers that differ in a number or letter, and these two."""
    if "first" in sample.names and "second" in sample.names:
        return "first", "second", ("first", "second")
    found = []
    for family in families(name for name in sample.names if _is_answer(sample, name)):
        marks = pair_of(family.columns)
        if marks is not None and len(family.columns) == 2:
            one, two = marks
            found.append((family.stem, (family.columns[one], family.columns[two], marks)))
    exact = [pair for stem, pair in found if len(stem) == 1 and stem[0] in ANSWER_STEMS]
    known = [pair for stem, pair in found if stem and stem[-1] in ANSWER_STEMS]
    for pairs in (exact, known, [pair for _, pair in found]):
        if pairs:
            return pairs[0] if len(pairs) == 1 else None
    return None


def _is_answer(sample: Sample, name: str) -> bool:
    return isinstance(sample.example(name), str | list | dict) and not SEVERAL.fullmatch(snake(name))


def _two_in_a_list(sample: Sample) -> str | None:
    """A column whose rows are lists of two answers."""
    return next(
        (
            name
            for name in LISTS
            if name in sample.names
            and all(isinstance(value, list) and len(value) == 2 for value in sample.values(name))
        ),
        None,
    )


def find_judges(sample: Sample) -> tuple[str, ...]:
    """The columns that hold judgments: one by its name or its values, or those of several people."""
    one = next((name for judge in JUDGES for name in sample.names if snake(name) == judge), None)
    if one is not None:
        return (one,)
    several = tuple(name for name in sample.names if SEVERAL.fullmatch(snake(name)))
    if several:
        return several
    spoken = [
        name
        for name in sample.names
        if (values := {normal(value) for value in sample.values(name) if isinstance(value, str | int)})
        and all(value in _SPOKEN or (name == "chosen" and value in ("0", "1", "2")) for value in values)
    ]
    return tuple(spoken) if len(spoken) == 1 else ()


def _flags(sample: Sample, answers: tuple[str, str, tuple[str, str]]) -> dict[str, str]:
    """Columns such as `winner_model_a`, `winner_model_b`, `winner_tie`, of which one is true in each row."""
    _, _, (one, two) = answers
    true = {"true", "false", "0", "1"}
    flags = [
        name
        for name in sample.names
        if words(name)[:1] in (("winner",), ("win",), ("wins",), ("better",), ("preferred",))
        and {normal(value) for value in sample.values(name)} <= true
    ]
    meaning = {one: FIRST, two: SECOND} | dict.fromkeys(TIES, TIE)
    found = {name: meaning[last] for name in flags if (last := (words(name) or ("",))[-1]) in meaning}
    return found if {FIRST, SECOND} <= set(found.values()) else {}


def _stated(sample: Sample, answers: tuple[str, str, tuple[str, str]]) -> dict[str, dict[str, str]]:
    """The one column such as `is_a_better`, which is true or false, and what its values say."""
    winners = dict(zip(answers[2], ((FIRST, SECOND), (SECOND, FIRST)), strict=True))
    found: dict[str, dict[str, str]] = {}
    for name in sample.names:
        named = [winners[word] for word in words(name) if word in winners]
        values = {normal(value) for value in sample.values(name)}
        if len(named) == 1 and _BETTER & {*words(name)} and values <= {"true", "false", "0", "1"}:
            [(yes, no)] = named
            found[name] = {"true": yes, "1": yes, "false": no, "0": no}
    return found if len(found) == 1 else {}


_BETTER = frozenset(("better", "wins", "win", "won", "winner", "preferred", "best"))


def _said_of(token: str) -> list[str]:
    """What a judgment in words may be for the answer with this number or letter."""
    plain = [f"{word}{mark}{token}" for word in MODELS for mark in (" ", "")]
    better = [
        f"{name} {verb}{degree}better{than}"
        for name in (token, *plain)
        for verb in ("is ", "")
        for degree in DEGREES
        for than in ("",)
    ]
    return [*plain, *better]


_SPOKEN = frozenset(
    text for pair in (("1", "2"), ("0", "1"), ("a", "b")) for token in pair for text in _said_of(token)
) | frozenset(TIES)


def _winners(
    first: str,
    second: str,
    tokens: tuple[str, str],
    values: set[str],
    labels: Mapping[str, str],
    place: str,
    counted: bool,
) -> dict[str, str]:
    """What each value of a judgment says; `counted` where the answers have places, no names of their own.

    Raises ConfigError where numbers could mean either.
    """
    if labels:
        return explained(labels, {FIRST: FIRST, SECOND: SECOND, TIE: TIE})
    one, two = tokens
    meaning = dict.fromkeys(TIES, TIE) | ({"c": TIE} if tokens == ("a", "b") else {})
    for token, other, column, ordinal, winner in (
        (one, two, first, "first", FIRST),
        (two, one, second, "second", SECOND),
    ):
        meaning |= dict.fromkeys((token, normal(column), ordinal, f"the {ordinal}"), winner)
        meaning |= dict.fromkeys(_said_of(token), winner)
        signs = (f"{token}>{other}", f"{token}>>{other}", f"{other}<{token}", f"{other}<<{token}")
        meaning |= dict.fromkeys(signs, winner)
    meaning |= {">": FIRST, "<": SECOND}
    meaning |= dict.fromkeys((f"{one}={two}", f"{two}={one}", "="), TIE)
    numbers = {value for value in values if re.fullmatch(r"-?\d+", value)}
    if any(value.startswith("-") for value in numbers):  # how much better the second is, as in HelpSteer
        return meaning | {v: TIE if int(v) == 0 else FIRST if int(v) < 0 else SECOND
                          for v in map(str, range(-10, 11))}  # fmt: skip
    if tokens == ("1", "2") and not ("0" in numbers and "2" not in numbers):
        return meaning | {"0": TIE, "1.5": TIE}
    if numbers and (tokens != ("0", "1") or (counted and "0" not in numbers)):
        low, high = min(numbers), max(numbers)
        if low == high:  # the other one is not among the first rows
            low, high = ("0", "1") if low in ("0", "1") else ("1", "2")
        raise ConfigError(
            f"{place} holds {', '.join(sorted(numbers))}, which may mean {first!r} or {second!r}; say which: "
            f"data.labels={{'{low}': first, '{high}': second}}, or the other way round"
        )
    return meaning


def explained(labels: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """`data.labels` by values as text; raises ConfigError for a meaning that there is not."""
    found = {}
    for value, meaning in labels.items():
        if normal(meaning) not in known:
            raise ConfigError(
                f"data.labels: {value!r} is explained as {meaning!r}; the meanings are {', '.join(known)}"
            )
        found[normal(value)] = known[normal(meaning)]
    return found


def find_ranked(sample: Sample, options: FormOptions, _: str) -> Form | None:
    asking, more, history = asked(sample)
    fields = Renamed("", asking, more, history=history)

    if (columns := _marked_columns(sample)) is not None:
        answers, marks, word = columns
        name = (
            f"answers {', '.join(map(repr, answers))} by {word} ({marks[0]!r}, ...), paired {options.pairing}"
        )
        by_column = Ranked(name, answers, marks, None, None, word == "rank", options.pairing, options.ties)
        return Judged(name, fields, by_column)
    listed = next((name for name in LISTS if isinstance(sample.example(name), list | dict)), None)
    if listed is None:
        return None
    inside = next(iter(_inside(sample.example(listed))), None)
    text = mark = marked = None
    if isinstance(inside, dict):
        text = next((key for key in TEXTS if key in inside), None)
        mark = next((key for key in MARKS if key in inside), None)
    if mark is None:
        lists = (*SCORE_LISTS, *RANK_LISTS)
        marked = next((name for name in lists if isinstance(sample.example(name), list | dict)), None)
    told = mark or marked
    if told is None or (isinstance(inside, dict) and text is None):
        return None
    smallest = told.startswith("rank")
    name = f"answers in {listed!r} by {'rank' if smallest else 'score'} ({told!r}), paired {options.pairing}"
    return Judged(
        name, fields, Ranked(name, listed, marked, text, mark, smallest, options.pairing, options.ties)
    )


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _marked_columns(sample: Sample) -> tuple[tuple[str, ...], tuple[str, ...], str] | None:
    """Answers in columns of their own and their scores or ranks: `response_1`, `score_1`, and so on."""
    found = families(sample.names)
    answers = [
        one
        for one in found
        if one.stem and one.stem[-1] in ANSWER_STEMS
        and all(isinstance(sample.example(name), str | list) for name in one.columns.values())
    ]  # fmt: skip
    for word in MARKED:
        for marks in found:
            for texts in answers:
                if word in marks.stem and marks.columns.keys() == texts.columns.keys():
                    keys = list(texts.columns)
                    return tuple(texts.columns[k] for k in keys), tuple(marks.columns[k] for k in keys), word
    return None


def find_trees(sample: Sample, options: FormOptions, _: str) -> Form | None:
    for name in ("tree", *sample.names):
        node = sample.example(name) if name in sample.names else None
        if isinstance(node, dict) and any(isinstance(node.get(key), list) for key in REPLIES):
            return Trees(
                f"trees of replies in {name!r}, paired {options.pairing}", name, options.pairing, options.ties
            )
    below = next((sample.example(key) for key in REPLIES if isinstance(sample.example(key), list)), None)
    if below and isinstance(below[0], dict) and speaker(below[0]) is not None and sample.first(TEXTS):
        return Trees(f"trees of replies, paired {options.pairing}", None, options.pairing, options.ties)
    return None
