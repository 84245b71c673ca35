"""Which form a file has, from the columns of its first rows; `data.format` and `data.columns` go before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.data.forms import ASSISTANTS, FORMATS, Custom, Fields, Form, FormOptions, Renamed, registered
from rcpo.data.judged import FIRST, MARKS, REPLIES, SECOND, TEXTS, TIE, Comparisons, Ranked, Trees, normal
from rcpo.errors import ConfigError

PROMPTS = (
    "prompt", "instruction", "question", "query", "conversations", "messages", "conversation",
    "history", "context", "post", "input",
)  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "output", "response", "answer", "solution", "generation", "reply")
# words that tell the better answer's column from the worse one's, whatever else is in the names
WORDS = (
    ("chosen", "rejected"), ("accepted", "rejected"), ("preferred", "dispreferred"), ("better", "worse"),
    ("best", "worst"), ("winner", "loser"), ("winning", "losing"), ("good", "bad"), ("positive", "negative"),
    ("win", "lose"),
)  # fmt: skip
KNOWN_PAIRS = (
    ("response_j", "response_k"),  # the StackExchange pairs of TRL's first examples
    ("answer_matching_behavior", "answer_not_matching_behavior"),  # Anthropic's model-written evaluations
)
SCORES = ("score", "rating", "reward", "avg_rating", "average_rating")
NUMBERED = (("1", "2"), ("0", "1"), ("a", "b"))
ANSWER_STEMS = (
    "output", "response", "answer", "completion", "reply", "generation", "conversation", "text",
    "summary", "assistant", "candidate", "option", "sample",
)  # fmt: skip
JUDGES = (
    "judgment", "judgement", "label", "labels", "preference", "preferences", "preferred", "winner",
    "choice", "better_response_id", "better", "best", "verdict", "overall_preference",
    "preference_strength", "human_preference",
)  # fmt: skip
SEVERAL = re.compile(r"(annotator|annotation|rater|judge|labeler|labeller|worker|vote)[_ ]?\d+")
LABELS = re.compile(
    "label|kto_tag|acceptable|accepted|desirable|liked?|thumbs?_?up|is_?good|is_?correct|preferred"
)
LISTS = ("answers", "responses", "completions", "candidates", "outputs", "generations", "replies")
SCORE_LISTS = ("scores", "ratings", "rewards", "score", "rating", "reward")
RANK_LISTS = ("ranks", "rankings", "rank")

WANTED = frozenset((
    "true", "1", "yes", "good", "positive", "desirable", "acceptable", "accepted", "accept", "like",
    "liked", "up", "thumbs up", "thumbs_up", "+1", "win", "correct", "chosen", "helpful", "preferred",
))  # fmt: skip
UNWANTED = frozenset((
    "false", "0", "no", "bad", "negative", "undesirable", "unacceptable", "rejected", "reject",
    "dislike", "disliked", "down", "thumbs down", "thumbs_down", "-1", "lose", "incorrect", "wrong",
    "unhelpful", "dispreferred",
))  # fmt: skip
MODELS = ("model", "response", "answer", "assistant", "output")
TIES = ("tie", "ties", "both", "equal", "same", "draw", "neither", "tie (bothbad)", "both_bad")


@dataclass(frozen=True)
class Sample:
    """The first rows of a file, renamed by `data.columns`, and the columns that half of them have."""

    rows: Sequence[Fields]
    names: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Fields]) -> Sample:
        names = dict.fromkeys(name for row in rows for name in row)
        common = (name for name in names if 2 * sum(row.get(name) is not None for row in rows) >= len(rows))
        return cls(rows, tuple(common))

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these names that is a column."""
        return next((name for name in names if name in self.names), None)

    def values(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if row.get(name) is not None]

    def example(self, name: str) -> Any:
        return next(iter(self.values(name)), None)


def find_form(rows: Sequence[Fields], options: FormOptions, place: str) -> Form:
    """The form of a file whose first rows these are; `place` names it. Raises ConfigError.

    A file in none of the known forms is read by rcpo's own names, and its rows say what they lack.
    """
    if options.format is not None and options.format not in FORMATS:
        registered(options.format, options.module)
        return Custom(options.format, options.module)
    sample = Sample.of(rows)
    wanted = FORMATS if options.format is None else (options.format,)
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


def _prompt(sample: Sample) -> tuple[str | None, str | None]:
    """The prompt's column and Alpaca's input, which follows it."""
    column = sample.first(PROMPTS)
    for name in PROMPTS:
        if name in sample.names and not (name in CONVERSATIONS and _is_answered(sample.example(name))):
            column = name
            break
    else:
        column = None
    more = "input" if column == "instruction" and "input" in sample.names else None
    return column, more


def _is_answered(value: Any) -> bool:
    """Whether a conversation ends with an answer, so that it is more than a prompt."""
    last = value[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ASSISTANTS


def _preferences(sample: Sample, options: FormOptions, _: str) -> Form | None:
    pair = _pair(sample)
    if pair is None:
        return None
    chosen, rejected = pair
    prompt, more = _prompt(sample)
    names = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    for side, column in (("chosen", chosen), ("rejected", rejected)):
        words = [f"{one}{mark}{other}" for word in (side, column) for kind in SCORES for mark in "_-"
                 for one, other in ((word, kind), (kind, word))]  # fmt: skip
        score = sample.first([f"score_{side}", *words])
        if score is not None:
            names[f"score_{side}"] = score
    kind = "preference pairs"
    if _is_sharegpt(sample.example(chosen)) or (prompt is not None and _is_sharegpt(sample.example(prompt))):
        kind = "ShareGPT conversations with two answers"
    elif prompt == "instruction":
        kind = "Alpaca instructions with two answers"
    return Renamed(_described(kind, names, more), names, more)


def _pair(sample: Sample) -> tuple[str, str] | None:
    """The columns of the better and the worse answer."""
    if "chosen" in sample.names or "rejected" in sample.names:
        return "chosen", "rejected"
    for better, worse in KNOWN_PAIRS:
        if better in sample.names and worse in sample.names:
            return better, worse
    for better, worse in WORDS:
        found = [
            (name, other)
            for name in sample.names
            if better in name and isinstance(sample.example(name), str | list | dict)
            and (other := name.replace(better, worse)) in sample.names and other != name
            and not any(word in name for word in (*SCORES, "model", "_id"))
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
    return None


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first and "value" in first


def _described(kind: str, names: Mapping[str, str], more: str | None = None) -> str:
    """The form with the columns that have other names than rcpo's."""
    others = [f"{name} from {column!r}" for name, column in names.items() if name != column]
    others += [f"with {more!r} after it where it is not empty"] if more else []
    return f"{kind} ({', '.join(others)})" if others else kind


def _comparisons(sample: Sample, options: FormOptions, place: str) -> Form | None:
    answers = _two_answers(sample)
    judges = _judges(sample)
    if answers is None or not judges:
        return None
    first, second, tokens = answers
    names = [name for name in sample.names if name not in (first, second, *judges)]
    prompt, more = _prompt(Sample(sample.rows, tuple(names)))
    fields = Renamed("", {} if prompt is None else {"prompt": prompt}, more)
    values = {
        normal(one)
        for judge in judges
        for value in sample.values(judge)
        for one in (value if isinstance(value, list) else [value])
    }
    meaning = _winners(first, second, tokens, values, options.labels, f"{place}: column {judges[0]!r}")
    prompts = "" if prompt is None else f", prompt from {prompt!r}" + (f" and {more!r}" if more else "")
    name = f"comparisons of {first!r} and {second!r} judged by {', '.join(map(repr, judges))}{prompts}"
    return Judged(name, fields, Comparisons(name, first, second, judges, meaning, options.ties))


@dataclass(frozen=True)
class Judged:
    """A form of several answers behind the renaming of the prompt."""

    name: str
    fields: Renamed
    form: Form

    def rows(self, fields: Fields) -> list[Fields]:
        return [row for renamed in self.fields.rows(fields) for row in self.form.rows(renamed)]


def _two_answers(sample: Sample) -> tuple[str, str, tuple[str, str]] | None:
    """Two columns that differ in a number or letter at their end, and these two."""
    if "first" in sample.names and "second" in sample.names:
        return "first", "second", ("first", "second")
    found = []
    for one, two in NUMBERED:
        for name in sample.names:
            stem = name[:-1]
            other = next((o for o in sample.names if o[:-1] == stem and o[-1:].lower() == two), None)
            if name[-1:].lower() == one and other is not None and _is_answer(sample, name):
                found.append((name, other, (one, two)))
    known = [pair for pair in found if pair[0][:-1].strip("_- ").lower().endswith(ANSWER_STEMS)]
    return known[0] if len(known) == 1 or (known and not found[1:]) else found[0] if len(found) == 1 else None


def _is_answer(sample: Sample, name: str) -> bool:
    return isinstance(sample.example(name), str | list) and not SEVERAL.fullmatch(name.lower())


def _judges(sample: Sample) -> tuple[str, ...]:
    several = tuple(name for name in sample.names if SEVERAL.fullmatch(name.lower()))
    one = sample.first(JUDGES)
    return several if several and one is None else () if one is None else (one,)


def _winners(
    first: str, second: str, tokens: tuple[str, str], values: set[str], labels: Mapping[str, str], place: str
) -> dict[str, str]:
    """What each value of a judgment says. Raises ConfigError where numbers could mean either."""
    if labels:
        return _explained(labels, {FIRST: FIRST, SECOND: SECOND, TIE: TIE})
    one, two = tokens
    meaning = dict.fromkeys(TIES, TIE)
    for token, column, ordinal, winner in ((one, first, "first", FIRST), (two, second, "second", SECOND)):
        meaning |= dict.fromkeys((token, column.lower(), ordinal), winner)
        meaning |= {f"{word}{mark}{token}": winner for word in MODELS for mark in ("_", " ", "")}
    numbers = {value for value in values if re.fullmatch(r"-?\d+", value)}
    if any(value.startswith("-") for value in numbers):  # how much better the second is, as in HelpSteer
        return meaning | {v: TIE if int(v) == 0 else FIRST if int(v) < 0 else SECOND
                          for v in map(str, range(-10, 11))}  # fmt: skip
    if tokens == ("1", "2") and not ("0" in numbers and "2" not in numbers):
        return meaning | {"0": TIE}
    if numbers and tokens != ("0", "1"):
        raise ConfigError(
            f"{place} holds {', '.join(sorted(numbers))}, which may mean {first!r} or {second!r}; say which: "
            f"data.labels={{'{min(numbers)}': first, '{max(numbers)}': second}}"
        )
    return meaning


def _explained(labels: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """`data.labels` by values as text; raises ConfigError for a meaning that there is not."""
    found = {}
    for value, meaning in labels.items():
        if normal(meaning) not in known:
            raise ConfigError(
                f"data.labels: {value!r} is explained as {meaning!r}; the meanings are {', '.join(known)}"
            )
        found[normal(value)] = known[normal(meaning)]
    return found


def _ranked(sample: Sample, options: FormOptions, _: str) -> Form | None:
    answers = next((name for name in LISTS if isinstance(sample.example(name), list)), None)
    if answers is None:
        return None
    inside = next((value[0] for value in sample.values(answers) if isinstance(value, list) and value), None)
    text = mark = marks = None
    if isinstance(inside, dict):
        text = next((key for key in TEXTS if key in inside), None)
        mark = next((key for key in MARKS if key in inside), None)
    if mark is None:
        lists = (*SCORE_LISTS, *RANK_LISTS)
        marks = next((name for name in lists if isinstance(sample.example(name), list)), None)
    told = mark or marks
    if told is None or (isinstance(inside, dict) and text is None):
        return None
    prompt, more = _prompt(sample)
    fields = Renamed("", {} if prompt is None else {"prompt": prompt}, more)
    smallest = told.startswith("rank")
    name = f"answers in {answers!r} by {'rank' if smallest else 'score'} ({told!r}), paired {options.pairing}"
    return Judged(
        name, fields, Ranked(name, answers, marks, text, mark, smallest, options.pairing, options.ties)
    )


def _trees(sample: Sample, options: FormOptions, _: str) -> Form | None:
    for name in ("tree", *sample.names):
        node = sample.example(name) if name in sample.names else None
        if isinstance(node, dict) and any(isinstance(node.get(key), list) for key in REPLIES):
            return Trees(
                f"trees of replies in {name!r}, paired {options.pairing}", name, options.pairing, options.ties
            )
    return None


def _labelled(sample: Sample, options: FormOptions, place: str) -> Form | None:
    label = "label" if "label" in sample.names else _label(sample)
    conversation = next((n for n in CONVERSATIONS if _is_answered(sample.example(n))), None)
    prompt, more = _prompt(sample)
    answer = sample.first(ANSWERS)
    if label is None or (conversation is None and (prompt is None or answer is None)):
        return None
    if answer is not None and prompt is not None:
        names = {"prompt": prompt, "completion": answer, "label": label}
    else:
        names, more = {"messages": str(conversation), "label": label}, None
    name = _described("completions with labels", names, more)
    values = {normal(value) for value in sample.values(label)}
    if options.labels:
        known = {"true": True, "false": False, "wanted": True, "unwanted": False}
        return Labelled(name, Renamed("", names, more), _explained(options.labels, known))
    if {"-1", "0"} <= values:
        raise ConfigError(
            f"{place}: column {label!r} holds -1 and 0; say which answers are wanted: "
            "data.labels={'1': true, '0': false, '-1': false}"
        )
    meaning = dict.fromkeys(WANTED, True) | dict.fromkeys(UNWANTED, False)
    return Labelled(name, Renamed("", names, more), meaning)


def _label(sample: Sample) -> str | None:
    """The one column whose name and values are those of a label."""
    found = [
        name
        for name in sample.names
        if LABELS.search(name.lower())
        and (values := {normal(value) for value in sample.values(name)})
        and values <= WANTED | UNWANTED
    ]
    return found[0] if len(found) == 1 else None


def _supervised(sample: Sample, options: FormOptions, _: str) -> Form | None:
    prompt, more = _prompt(sample)
    answer = sample.first(ANSWERS)
    every = options.learn == "all"
    conversation = next((n for n in CONVERSATIONS if _is_answered(sample.example(n))), None)
    if prompt is not None and answer is not None:
        names = {"prompt": prompt, "completion": answer}
        kind = "Alpaca instructions" if prompt == "instruction" else "prompts and completions"
        return Renamed(_described(kind, names, more), names, more)
    if conversation is not None:
        kind = "ShareGPT conversations" if _is_sharegpt(sample.example(conversation)) else "conversations"
        learned = ", every answer learned" if every else ", the last answer learned"
        names = {"messages": conversation}
        return Renamed(_described(kind, names) + learned, names, None, every)
    return Renamed("text", {"text": "text"}) if "text" in sample.names else None


Finder = Callable[[Sample, FormOptions, str], "Form | None"]
_FINDERS: dict[str, Finder] = {
    "preferences": _preferences,
    "comparisons": _comparisons,
    "trees": _trees,
    "ranked": _ranked,
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
