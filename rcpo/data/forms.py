"""The form of a file: which of its columns are prompt, answers, judgments, and how a row becomes pairs.

A form turns a row into rows with rcpo's own fields, which `rcpo.data.formats` reads: none, one, or several.
It is found once for each source, from the columns of its first rows, or named by `data.format`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rcpo.data.conversations import speaker
from rcpo.data.records import BadRow
from rcpo.errors import ConfigError
from rcpo.system.modules import search_working_folder
from rcpo.system.text import first_line

Fields = dict[str, Any]


class Form(Protocol):
    """How the rows of a file are read; it can be pickled. `name` is for the user, after "read as"."""

    @property
    def name(self) -> str: ...

    def rows(self, fields: Fields) -> list[Fields]:
        """What a row of the file is in rcpo's own fields; raises BadRow."""
        ...


@dataclass(frozen=True)
class FormOptions:
    """What `data` says of forms: the keys of these names, as conf/data/pairs.yaml explains them."""

    format: str | None = None
    module: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    pairing: str = "best_worst"
    ties: str = "keep"
    learn: str = "last"

    def describe(self) -> str:
        """All that decides rows, the source of the user's own module or package too; raises ConfigError."""
        own = b"" if self.module is None else _source(self.module)
        return f"{self} {hashlib.sha256(own).hexdigest()}"


@dataclass(frozen=True)
class Renamed:
    """Rows that have one meaning each: `names` maps rcpo's fields to the file's columns.

    `more` is a column of text that follows the prompt where it is not empty: Alpaca's `input`. `history` is
    a column of earlier turns: LLaMA-Factory's pairs of a question and its answer. With `every_turn` each
    answer of a conversation is learned, not the last alone.
    """

    name: str
    names: Mapping[str, str]
    more: str | None = None
    every_turn: bool = False
    history: str | None = None

    def rows(self, fields: Fields) -> list[Fields]:
        found = dict(fields)
        for name, column in self.names.items():
            if column in fields:
                found[name] = fields[column]
                if column != name and column not in self.names:
                    del found[column]
        if self.more is not None and self.more in found:
            found["prompt"] = with_input(found.get("prompt"), found.pop(self.more))
        if self.history is not None and (turns_before := found.pop(self.history, None)):
            found["prompt"] = after_history(turns_before, found.get("prompt"))
        prompt = found.get("prompt")
        if isinstance(prompt, dict) and isinstance(prompt.get("messages"), list):  # OpenAI's `input`
            found = {"tools": prompt.get("tools")} | found | {"prompt": prompt["messages"]}
        if self.every_turn and isinstance(found.get("messages"), list):
            return turns(found)
        return [found]


@dataclass(frozen=True)
class OtherAnswer:
    """Conversations that end with the better answer; another one is text, messages, or the whole."""

    name: str
    messages: str
    rejected: str

    def rows(self, fields: Fields) -> list[Fields]:
        found = {name: value for name, value in fields.items() if name not in (self.messages, self.rejected)}
        messages, other = fields.get(self.messages), fields.get(self.rejected)
        if not isinstance(messages, list) or len(messages) < 2:
            raise BadRow("messages do not end with an answer of the assistant")
        if isinstance(other, str):
            other = [{"role": "assistant", "content": other}]
        if isinstance(other, list) and other and speaker(other[0]) != "assistant":
            return [found | {"chosen": messages, "rejected": other}]
        return [found | {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": other}]


def with_input(instruction: Any, more: Any) -> Any:
    """Alpaca's prompt: the instruction, and on the next line its input where there is one."""
    if more is None or (isinstance(more, str) and not more.strip()):
        return instruction
    if not isinstance(instruction, str) or not isinstance(more, str):
        raise BadRow("an instruction and its input are not both text")
    return f"{instruction}\n{more}"


def after_history(history: Any, prompt: Any) -> list[Any]:
    """A prompt behind earlier turns, each a question and its answer, or messages."""
    if not isinstance(history, list) or not isinstance(prompt, str):
        raise BadRow("earlier turns are not a list, or the prompt after them is not text")
    found: list[Any] = []
    for turn in history:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            roles = ("user", "assistant")
            found += [{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)]
        elif isinstance(turn, dict):
            found.append(turn)
        else:
            raise BadRow("an earlier turn is not a question and its answer")
    return [*found, {"role": "user", "content": prompt}]


def turns(fields: Fields) -> list[Fields]:
    """A conversation once for each answer in it, cut after the answer; raises BadRow where there is none.

    Answers that the file marks as not to be learned are left out.
    """
    messages = fields["messages"]
    said = [
        place
        for place, message in enumerate(messages)
        if place and speaker(message) == "assistant" and not is_context(message)
    ]
    if not said:
        raise BadRow("the conversation holds no answer of the assistant")
    return [fields | {"messages": messages[: place + 1]} for place in said]


def is_context(message: Fields) -> bool:
    """Whether an answer is read but not learned: OpenAI's weight, LLaMA-Factory's loss_weight, or train."""
    return message.get("weight") == 0 or message.get("loss_weight") == 0 or message.get("train") is False


Reader = Callable[[Fields], "Fields | Sequence[Fields]"]
_REGISTERED: dict[str, Reader] = {}


def register_format(name: str) -> Callable[[Reader], Reader]:
    """Make a function a format: `data.format=NAME data.format_module=MODULE`.

    It takes a row of the file and returns a row with rcpo's fields (`prompt`, `chosen`, `rejected`, ...), or
    a list of such rows. It raises ValueError, with a reason, for a row that cannot be used.

    >>> @register_format("best-of-three")
    ... def read(row):
    ...     return {"prompt": row["q"], "chosen": row["answers"][0], "rejected": row["answers"][2]}
    """

    def register(reader: Reader) -> Reader:
        _REGISTERED[name] = reader
        return reader

    return register


@dataclass(frozen=True)
class Custom:
    """A format that a user's module registers."""

    name: str
    module: str | None

    def rows(self, fields: Fields) -> list[Fields]:
        reader = registered(self.name, self.module)
        try:
            found = reader(fields)
        except Exception as error:  # the user's function may raise anything
            raise BadRow(f"format {self.name} refuses the row: {type(error).__name__}: {error}") from error
        rows = [found] if isinstance(found, dict) else found
        if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
            raise BadRow(f"format {self.name} returns something other than rows")
        return list(rows)


def registered(name: str, module: str | None) -> Reader:
    """The reader of a name after the user's module is imported; raises ConfigError where there is none."""
    if module is not None:
        _imported(module)
    if name not in _REGISTERED:
        own = f"; {module} registers {', '.join(_REGISTERED) or 'none'}" if module else ""
        raise ConfigError(
            f"data.format={name}: there is no such format{own}; give one of {', '.join(FORMATS)}, or "
            "register it (rcpo.data.forms.register_format) in a module: data.format_module=MODULE"
        )
    return _REGISTERED[name]


def _imported(module: str) -> ModuleType:
    search_working_folder()
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"data.format_module={module} cannot be imported: {reason}; give a module that is installed, in "
            f"{os.getcwd()}, or in a folder of PYTHONPATH"
        ) from error


def _source(module: str) -> bytes:
    """The text of a module's file, or of all of a package's; raises ConfigError where it has none."""
    found = _imported(module)
    folders = [Path(folder) for folder in getattr(found, "__path__", ())]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    own = getattr(found, "__file__", None)
    if not folders and own is not None and own.endswith(".py"):
        files = [Path(own)]
    if not files:
        raise ConfigError(
            f"data.format_module={module} has no Python file, by which rcpo tells whether kept tokens are "
            "still those of its rows; give a module that has one"
        )
    return b"".join(file.read_bytes() for file in files)


FORMATS = ("preferences", "comparisons", "trees", "ranked", "labelled", "supervised")
