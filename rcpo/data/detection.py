"""Which form a file has, from the columns of its first rows; `data.format` and `data.columns` go before."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.data.conversations import begins_with_answer
from rcpo.data.formats import FIELDS
from rcpo.data.forms import FORMATS, Custom, Fields, Form, FormOptions, OtherAnswer, Renamed, registered
from rcpo.data.judged import Comparisons, normal, number
from rcpo.data.names import (
    ANSWERS,
    CONTRARY_WORDS,
    CONVERSATIONS,
    KNOWN_PAIRS,
    LABEL_WORDS,
    OTHER_ANSWERS,
    SCORES,
    UNWANTED,
    VERDICT_WORDS,
    WANTED,
    WORDS,
    words,
)  # fmt: skip
from rcpo.data.records import BadRow
from rcpo.data.rivals import explained, find_comparisons, find_judges, find_ranked, find_trees, two_answers
from rcpo.data.sample import Judged, Sample, asked, described, is_answered, is_sharegpt
from rcpo.errors import ConfigError


def find_form(rows: Sequence[Fields], options: FormOptions, place: str) -> Form:
    """The form of a file whose first rows these are; `place` names it. Raises ConfigError.

    A file in none of the known forms is read by rcpo's own names, and its rows say what they lack.
    """
    if options.format is not None and options.format not in FORMATS:
        registered(options.format, options.module)
        return Custom(options.format, options.module)
    sample = Sample.of(rows)
    wanted = FORMATS if options.format is None else (options.format,)
    if options.format is None:
        _refuse_parts_of_trees(sample, place)
    found = next(filter(None, (_FINDERS[name](sample, options, place) for name in wanted)), None)
    if found is None and options.format is not None:
        raise ConfigError(
            f"data.format={options.format}: {place} has no such columns; it has {', '.join(sample.names)}. "
            f"Name them with data.columns: {_NEEDED[options.format]}"
        )
    judged = found.form if isinstance(found, Judged) else found
    if options.labels and not isinstance(judged, Comparisons | Labelled):
        raise ConfigError(
            f"data.labels explains judgments and labels, and {place} is read as "
            f"{'rows' if found is None else found.name}; leave it out"
        )
    return Renamed("rows with rcpo's own columns", {}) if found is None else found


def unread(form: Form, rows: Sequence[Fields]) -> list[str]:
    """The columns of some rows that a form passes over, so that nobody has to guess it."""
    names: dict[str, None] = {}
    for row in rows:
        try:
            found = form.rows(row)
        except BadRow:
            continue
        names |= dict.fromkeys(
            name for name in row if any(name in one for one in found) and name not in FIELDS
        )
    return list(names)


def _refuse_parts_of_trees(sample: Sample, place: str) -> None:
    if {"parent_id", "message_id", "text", "role"} <= set(sample.names):
        raise ConfigError(
            f"{place} has the messages of trees in rows of their own; give the file that has a whole tree in "
            "each row (Open Assistant's ..._trees.jsonl.gz)"
        )


@dataclass(frozen=True)
class Labelled:
    """Completions with a label: `meaning` says for each of its values, as text, whether it is wanted."""

    name: str
    fields: Renamed
    meaning: Mapping[str, bool]

    def rows(self, fields: Fields) -> list[Fields]:
        [found] = self.fields.rows(fields)
        if (label := self.meaning.get(normal(found.get("label")))) is not None:
            found["label"] = label
        return [found]


def _preferences(sample: Sample, options: FormOptions, _: str) -> Form | None:
    pair = _pair(sample)
    if pair is None:
        return _other_answer(sample)
    chosen, rejected = pair
    asking, more, history = asked(sample)
    prompt = asking.get("prompt")
    names = {"chosen": chosen, "rejected": rejected} | asking
    for side, column in (("chosen", chosen), ("rejected", rejected)):
        words = [f"{one}{mark}{other}" for word in (side, column) for kind in SCORES for mark in "_-"
                 for one, other in ((word, kind), (kind, word))]  # fmt: skip
        guessed = (
            name for name in words if name in sample.names and any(map(_is_number, sample.values(name)))
        )
        score = f"score_{side}" if f"score_{side}" in sample.names else next(guessed, None)
        if score is not None:
            names[f"score_{side}"] = score
    kind = "preference pairs"
    if is_sharegpt(sample.example(chosen)) or (prompt is not None and is_sharegpt(sample.example(prompt))):
        kind = "ShareGPT conversations with two answers"
    elif prompt == "instruction":
        kind = "Alpaca instructions with two answers"
    return Renamed(described(kind, names, more, history), names, more, history=history)


def _other_answer(sample: Sample) -> Form | None:
    """A conversation that ends with the better answer, and a column with the worse one."""
    messages = next((name for name in CONVERSATIONS if is_answered(sample.example(name))), None)
    rejected = sample.first(OTHER_ANSWERS)
    if messages is None or rejected is None or "chosen" in sample.names:
        return None
    name = described("conversations with another answer", {"chosen": messages, "rejected": rejected})
    return OtherAnswer(name, messages, rejected)


def _pair(sample: Sample) -> tuple[str, str] | None:
    """The columns of the better and the worse answer."""
    named = {"chosen", "rejected"} & {*sample.names}
    found = None if len(named) == 2 else _pair_of_other_names(sample)
    if not named or (found and named <= {*found}):
        return found
    judged = "rejected" not in named and find_judges(sample) and two_answers(sample) is not None
    return None if judged else ("chosen", "rejected")


def _pair_of_other_names(sample: Sample) -> tuple[str, str] | None:
    for better, worse in KNOWN_PAIRS:
        if better in sample.names and worse in sample.names:
            return better, worse
    for better, worse in WORDS:
        found = [
            (name, other)
            for name in sample.names
            if better in name.lower() and _is_said(sample.example(name))
            and (other := _exchanged(name, better, worse)) in sample.names and other != name
            and not any(word in name for word in (*SCORES, "model", "_id"))
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
    return None


def _is_said(value: Any) -> bool:
    """Whether a value is an answer: text or messages, and not one of the lists that come with questions."""
    return isinstance(value, str | dict) or (
        isinstance(value, list) and isinstance(next(iter(value), None), dict)
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a score, and not a word or a list that a column of such a name may hold too."""
    try:
        return number(value) is not None
    except BadRow:
        return False


def _exchanged(name: str, better: str, worse: str) -> str:
    """The name with the worse answer's word, in the case of the better one's: `Chosen`, `Rejected`."""

    def exchange(found: re.Match[str]) -> str:
        return worse.capitalize() if found[0][0].isupper() else worse

    return re.sub(better, exchange, name, flags=re.IGNORECASE)


def _labelled(sample: Sample, options: FormOptions, place: str) -> Form | None:
    label = "label" if "label" in sample.names else _label(sample)
    said = _answered(sample)
    if said is None:
        return None
    if label is None:
        _refuse_contrary(sample, place)
        _refuse_unexplained(sample, place)
        return None
    names, more, history = said
    if options.learn == "all" and "messages" in names:
        raise ConfigError(
            f"data.learn=all: {place} has a label for each conversation, which is that of its last answer; "
            "leave data.learn out"
        )
    names = names | {"label": label}
    name = described("completions with labels", names, more, history)
    fields = Renamed("", names, more, history=history)
    values = {normal(value) for value in sample.values(label)}
    if options.labels:
        known = {"true": True, "false": False, "wanted": True, "unwanted": False}
        return Labelled(name, fields, explained(options.labels, known))
    if {"-1", "0"} <= values:
        raise ConfigError(
            f"{place}: column {label!r} holds -1 and 0; say which answers are wanted: "
            "data.labels={'1': true, '0': false, '-1': false}"
        )
    meaning = dict.fromkeys(WANTED, True) | dict.fromkeys(UNWANTED, False)
    return Labelled(name, fields, meaning)


def _answered(sample: Sample) -> tuple[dict[str, str], str | None, str | None] | None:
    """The columns of a prompt and its one answer, or of a conversation that ends with it."""
    asking, more, history = asked(sample)
    answer = sample.first(ANSWERS)
    conversation = next((n for n in (*CONVERSATIONS, *ANSWERS) if is_answered(sample.example(n))), None)
    whole = conversation is not None and not begins_with_answer(sample.example(conversation))
    if answer is not None and "prompt" in asking and not (whole and conversation in CONVERSATIONS):
        return asking | {"completion": answer}, more, history
    if not whole:
        return None
    asking.pop("prompt", None)
    return {"messages": str(conversation)} | asking, None, None


def _label(sample: Sample) -> str | None:
    """The one column whose name and values are those of a label."""
    found = [
        name
        for name in sample.names
        if LABEL_WORDS & {*words(name)} and not CONTRARY_WORDS & {*words(name)} and _is_label(sample, name)
    ]
    return found[0] if len(found) == 1 else None


def _is_label(sample: Sample, name: str) -> bool:
    values = {normal(value) for value in sample.values(name) if isinstance(value, str | int | float)}
    return bool(values) and values <= WANTED | UNWANTED


def _refuse_contrary(sample: Sample, place: str) -> None:
    """Raise ConfigError for a column that says which answers are not wanted: `disliked`, `unacceptable`."""
    for name in sample.names:
        if CONTRARY_WORDS - {"not"} & {*words(name)} and _is_label(sample, name):
            values = sorted({normal(value) for value in sample.values(name)})
            told = ", ".join(f"'{value}': {str(value in UNWANTED).lower()}" for value in values)
            raise ConfigError(
                f"{place}: column {name!r} seems to tell which answers are not wanted; if so, write "
                f'data.columns.label={name!r} "data.labels={{{told}}}"; else data.format=supervised'
            )


def _refuse_unexplained(sample: Sample, place: str) -> None:
    """Raise ConfigError for a column that is a label by its name, with values that nobody has explained."""
    for name in sample.names:
        if VERDICT_WORDS & {*words(name)}:
            values = sorted({normal(value) for value in sample.values(name)})[:4]
            told = ", ".join(f"'{value}': true" for value in values)
            raise ConfigError(
                f"{place}: column {name!r} seems to tell which answers are wanted; explain its values: "
                f'data.columns.label={name!r} "data.labels={{{told}}}", with false for those that are not; '
                "else data.format=supervised"
            )


def _supervised(sample: Sample, options: FormOptions, place: str) -> Form | None:
    said = _answered(sample)
    for name in ANSWERS:
        if isinstance(value := sample.example(name), list) and all(isinstance(text, str) for text in value):
            raise ConfigError(
                f"{place}: column {name!r} holds lists of {len(value)} texts; say which of them is better: "
                f"data.columns.chosen='{name}[0]' data.columns.rejected='{name}[1]'"
            )
    if said is None:
        return Renamed("text", {"text": "text"}) if "text" in sample.names else None
    names, more, history = said
    if "completion" in names:
        kind = "Alpaca instructions" if names["prompt"] == "instruction" else "prompts and completions"
        return Renamed(described(kind, names, more, history), names, more, history=history)
    example, every = sample.example(names["messages"]), options.learn == "all"
    kind = "ShareGPT conversations" if is_sharegpt(example) else "conversations"
    learned = ", every answer learned" if every else ", the last answer learned"
    return Renamed(described(kind, names) + learned, names, None, every)


Finder = Callable[[Sample, FormOptions, str], "Form | None"]
_FINDERS: dict[str, Finder] = {
    "preferences": _preferences,
    "comparisons": find_comparisons,
    "trees": find_trees,
    "ranked": find_ranked,
    "labelled": _labelled,
    "supervised": _supervised,
}
_NEEDED = {
    "preferences": "prompt, chosen, rejected",
    "comparisons": "prompt, first, second, judgment",
    "ranked": "prompt, answers, and scores or ranks",
    "trees": "tree",
    "labelled": "prompt, completion, label; or messages, label",
    "supervised": "prompt, completion; or messages; or text",
}
