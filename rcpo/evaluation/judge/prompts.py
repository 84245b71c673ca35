"""Prompts and answers in AlpacaEval's formats, from any file of rows."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.data.identity import HEX_DIGITS
from rcpo.data.readers import read_file
from rcpo.data.records import BadRow
from rcpo.errors import ConfigError


@dataclass(frozen=True)
class Instruction:
    """An instruction with what its source says about it.

    `id` depends on the contents alone, `place` is where it stands in its source, by which models of different
    tokenizers are joined. `theirs` is the answer that it comes with, `ours` one that is to be judged as it
    is, `label` a person's preference for ours, 0 to 1.
    """

    id: str
    place: str
    instruction: str
    theirs: str | None = None
    ours: str | None = None
    label: float | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[Instruction]:
    """The prompts of a file in AlpacaEval's formats; raises ConfigError with the row that cannot be used.

    Rows have an `instruction` (or `prompt`), and what to compare with as `output`; or both answers, ours as
    `output_2` and the other as `output_1`, maybe with a `preference` from 1 (the first) to 2 (the second).
    """
    prompts: list[Instruction] = []
    seen: Counter[str] = Counter()
    for place, row in _rows(path):
        if len(prompts) == limit:
            break
        instruction = _text(row.get("instruction", row.get("prompt")), "instruction", place)
        digest = hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).hexdigest()[:HEX_DIGITS]
        seen[digest] += 1
        name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        theirs = row.get("output_1", row.get("output"))
        ours = row.get("output_2")
        prompts.append(
            Instruction(
                name,
                place,
                instruction,
                None if theirs is None else _text(theirs, "output", place),
                None if ours is None else _text(ours, "output_2", place),
                _label(row.get("preference"), place),
            )
        )
    if not prompts:
        raise ConfigError(f"{path} holds no row")
    if len({prompt.ours is None for prompt in prompts}) == 2:
        raise ConfigError(f"{path}: some rows have an answer of ours (output_2), others have none")
    return prompts


def read_answers(path: Path, prompts: Sequence[Instruction]) -> dict[str, str]:
    """The answers of a file (`instruction`, `output`) to the prompts; raises ConfigError where one lacks.

    An instruction that is there several times has its answers in the file's order.
    """
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for place, row in _rows(path):
        instruction = _text(row.get("instruction", row.get("prompt")), "instruction", place).strip()
        answers[instruction].append(_text(row.get("output"), "output", place))
    lacking = [prompt for prompt in prompts if prompt.instruction.strip() not in answers]
    if lacking:
        raise ConfigError(
            f"judge.against={path} has no answer to {len(lacking)} of {len(prompts)} prompts, the first is "
            f"{lacking[0].place}"
        )
    asked: Counter[str] = Counter()
    found = {}
    for prompt in prompts:
        instruction = prompt.instruction.strip()
        given = answers[instruction]
        found[prompt.id] = given[min(asked[instruction], len(given) - 1)]
        asked[instruction] += 1
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for piece in read_file(path):
        for number, row in piece.parsed():
            place = f"{path.name}:{number}"
            if isinstance(row, BadRow) or not isinstance(row, dict):
                raise ConfigError(f"{path}: row {number}: {row if isinstance(row, BadRow) else 'no object'}")
            yield place, row


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {name} is missing or no text")
    return value


def _label(value: Any, place: str) -> float | None:
    """A preference of 1 to 2 as a share for the second; AlpacaEval's 0 is a draw. None without one."""
    if value is None or value == "":
        return None
    try:
        preference = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: preference is not a number") from error
    if preference != preference:
        return None
    if preference == 0:
        return 0.5
    if not 1 <= preference <= 2:
        raise ConfigError(f"{place}: preference={preference:g} is not between 1 and 2")
    return preference - 1
