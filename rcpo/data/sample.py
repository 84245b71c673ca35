"""The first rows of a file, and the columns in them that ask: prompt, system message, earlier turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcpo.data.conversations import speaker
from rcpo.data.forms import Fields, Form, Renamed
from rcpo.data.names import CONVERSATIONS, PROMPTS, SYSTEMS


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


def asked(sample: Sample) -> tuple[dict[str, str], str | None, str | None]:
    """The columns of prompt and system message, of what follows the prompt, and of earlier turns."""
    column = next(
        (
            name
            for name in PROMPTS
            if name in sample.names and not (name in CONVERSATIONS and is_answered(sample.example(name)))
        ),
        None,
    )
    names = {} if column is None else {"prompt": column}
    system = next((name for name in SYSTEMS if isinstance(sample.example(name), str | dict)), None)
    if system is not None:
        names["system"] = system
    # files leave them out of rows that have none: one row that has some is enough
    more = next((name for name in ("input", "context") if sample.example(name) is not None), None)
    more = more if column == "instruction" else None
    history = "history" if column != "history" and isinstance(sample.example("history"), list) else None
    return names, more, history


def is_answered(value: Any) -> bool:
    """Whether a conversation ends with an answer, so that it is more than a prompt."""
    last = value[-1] if isinstance(value, list) and value else None
    return speaker(last) == "assistant"


def is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first and "value" in first


def described(
    kind: str, names: Mapping[str, str], more: str | None = None, history: str | None = None
) -> str:
    """The form with the columns that have other names than rcpo's."""
    others = [f"{name} from {column!r}" for name, column in names.items() if name != column]
    others += [f"with {more!r} after it where it is not empty"] if more else []
    others += [f"earlier turns from {history!r}"] if history else []
    return f"{kind} ({', '.join(others)})" if others else kind


@dataclass(frozen=True)
class Judged:
    """A form of several answers behind the renaming of the prompt."""

    name: str
    fields: Renamed
    form: Form

    def rows(self, fields: Fields) -> list[Fields]:
        return [row for renamed in self.fields.rows(fields) for row in self.form.rows(renamed)]
