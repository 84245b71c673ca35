"""`data=pairs`: preference pairs from JSON Lines, plain or gzipped.

A row holds `prompt`, `chosen` and `rejected` as strings, or `chosen` and `rejected` alone as whole
conversations (HH-RLHF), whose implicit prompt is their longest common prefix that ends in "Assistant:".
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rcpo.config import ConfigError
from rcpo.data.records import TextPair
from rcpo.data.report import DataReport

TURN = "Assistant:"


class BadRow(ValueError):
    """Why a row cannot be used, in words that do not depend on its contents, so that they can be counted."""


def read_pairs(path: Path, report: DataReport) -> list[TextPair]:
    """The usable pairs of a file, in its order, with the ids `name:line`; blank lines are skipped.

    Raises ConfigError for a file that cannot be read, for one without a usable pair, and (unless the report
    drops them) for the first unusable row, with its line number.
    """
    pairs = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        report.read += 1
        try:
            pairs.append(parse_row(line, f"{path.name}:{number}"))
        except BadRow as problem:
            report.bad(str(problem), f"{path}:{number}")
    if not pairs:
        raise ConfigError(f"{path}: no usable pair of prompt, chosen and rejected in {report.read} rows")
    return pairs


def parse_row(line: bytes, name: str) -> TextPair:
    """One line of a file as a pair; raises BadRow where it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid UTF-8") from error
    except (ValueError, RecursionError) as error:  # also numbers too long, nesting too deep
        raise BadRow("broken JSON") from error
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    pair = _texts(row, name)
    if any(_has_surrogates(text) for text in (pair.prompt, pair.chosen, pair.rejected)):
        raise BadRow("invalid Unicode: half of a surrogate pair")
    if not pair.prompt.strip():
        raise BadRow("empty prompt")
    for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not text.strip():
            raise BadRow(f"empty {side} response")
    if pair.chosen == pair.rejected:
        raise BadRow("identical responses")
    return pair


def split_prompts(
    pairs: Iterable[TextPair], fraction: float, seed: int
) -> tuple[list[TextPair], list[TextPair]]:
    """Pairs to train on and pairs held out: all pairs of a prompt go to the same side.

    The distinct prompts are put in the order of a hash of (seed, prompt), whatever their order in the file,
    and the first `fraction` of them (at least one, rounded to the nearest) are held out; 0 holds out none.
    """
    pairs = list(pairs)
    if fraction == 0:
        return pairs, []
    ordered = sorted({pair.prompt for pair in pairs}, key=lambda prompt: _rank(prompt, seed))
    held_out = set(ordered[: max(1, round(fraction * len(ordered)))])
    if len(held_out) == len(ordered):
        raise ConfigError(
            f"data.eval_fraction={fraction} of {len(ordered)} distinct prompt(s) leaves none to train on; "
            "lower it, give more data, or give held-out pairs: data.eval_path=FILE"
        )
    train = [pair for pair in pairs if pair.prompt not in held_out]
    return train, [pair for pair in pairs if pair.prompt in held_out]


def _lines(path: Path) -> Iterator[bytes]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise ConfigError(
            f"{path} cannot be read: {error}; data.path and data.eval_path take JSONL[.gz]"
        ) from error


def _texts(row: dict[str, Any], name: str) -> TextPair:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"no field {key!r}")
    for key in ("prompt", "chosen", "rejected"):
        if key in row and not isinstance(row[key], str):
            raise BadRow(f"field {key!r} is not a string")
    if "prompt" in row:
        return TextPair(name, row["prompt"], row["chosen"], row["rejected"])
    shared = _common_prefix(row["chosen"], row["rejected"])
    end = shared.rfind(TURN)
    if end < 0:
        raise BadRow(f"no field 'prompt', and no common beginning that ends in {TURN!r}")
    end += len(TURN)
    return TextPair(name, shared[:end], row["chosen"][end:], row["rejected"][end:])


def _common_prefix(one: str, other: str) -> str:
    places = enumerate(zip(one, other, strict=False))
    end = next((place for place, (a, b) in places if a != b), min(len(one), len(other)))
    return one[:end]


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _rank(prompt: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
