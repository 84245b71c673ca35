"""Command lines that are valid but for one mutation: all refused, with the key that is wrong.

A hundred by default; `RCPO_MUTATIONS=1000 scripts/test tests/config/test_bad_configs.py` is the long form.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import forked
import pytest

from rcpo.config.composition import PRIMARY, compose_with, hydra_session, split_arguments, user_part
from rcpo.config.fields import key_of, keys_of
from rcpo.config.parsing import parse
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("objective", "rc", "model", "data", "engine", "optim", "eval")
SYNTAX = ("{key}", "={value}", "{key}=[1", "{key}={{a:1", "{key}=${{nope}}", "{key}='open", "~{key}x")
COUNT = int(os.environ.get("RCPO_MUTATIONS", "100"))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a configuration with their values."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


LEAVES = {key: value for key, value in leaves(RunConfig()) if not isinstance(value, dict)}
KEYS = {name: found for name, field in keys_of(RunConfig) if (found := key_of(field)) is not None}
CHOICES = {name: found.choices for name, found in KEYS.items() if found.choices}
LOWEST = {
    name: found for name, found in KEYS.items() if found.bounds[:2] in ("at", "gr") and name != "optim.betas"
}
NUMBERS = [key for key, value in LEAVES.items() if isinstance(value, int | float)]


def misspelt(word: str, pick: random.Random) -> str:
    """The word with a letter dropped, doubled, exchanged or put in, never itself."""
    place = pick.randrange(len(word))
    letter = pick.choice("abcdefghijklmnopqrstuvwxyz")
    kinds = (
        word[:place] + word[place + 1 :],
        word[:place] + word[place] + word[place:],
        word[:place] + letter + word[place:],
        word[:place] + letter + word[place + 1 :],
    )
    other = pick.choice(kinds)
    return misspelt(word, pick) if other == word or not other else other


def mutation(pick: random.Random) -> tuple[str, str]:
    """A command-line argument that is wrong, and a word that its refusal has to hold."""
    kind = pick.choice(("key", "key", "type", "range", "choice", "option", "syntax"))
    if kind == "key":
        key = pick.choice(list(LEAVES))
        head, dot, last = key.rpartition(".")
        wrong = f"{head}{dot}{misspelt(last, pick)}"
        return (f"{wrong}=1", wrong) if wrong not in LEAVES and wrong not in GROUPS else mutation(pick)
    if kind == "type":
        key = pick.choice(NUMBERS)
        return f"{key}={pick.choice(('abc', '1.5.2', '[1]', '{{a: 1}}', '1e', 'maybe'))}", key
    if kind == "range":
        key = pick.choice(list(LOWEST))
        low, high = LOWEST[key].at_least, LOWEST[key].at_most
        open_low = LOWEST[key].above or 0
        below = open_low - pick.choice((0, 1, 5)) if low is None else low - pick.choice((1, 17, 10**6))
        above = below if high is None else high + pick.choice((1, 10**6))
        return f"{key}={pick.choice((below, above))}", key
    if kind == "choice":
        key = pick.choice(list(CHOICES))
        value = misspelt(str(pick.choice(CHOICES[key])), pick)
        return (f"{key}={value}", key) if value not in CHOICES[key] else mutation(pick)
    if kind == "option":
        group = pick.choice(GROUPS)
        known = [path.stem for path in (CONF / group).glob("*.yaml")]
        value = misspelt(pick.choice(known), pick)
        return (f"{group}={value}", value) if value not in known else mutation(pick)
    key, pattern = pick.choice(NUMBERS), pick.choice(SYNTAX)
    return pattern.format(key=key, value=3), key if "{key}" in pattern else "=3"


def mutations(count: int) -> dict[str, str]:
    """Different wrong arguments, the same ones every time."""
    pick, found = random.Random(0), {}
    while len(found) < count:
        argument, word = mutation(pick)
        found[argument] = word
    return found


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * COUNT)
def test_mutations_are_refused_by_name() -> None:
    accepted, unnamed, slowest = [], [], 0.0
    with hydra_session(None, None) as hydra:
        for argument, word in mutations(COUNT).items():
            start = time.process_time()  # what another process takes is not counted
            try:
                parse(user_part(compose_with(hydra, PRIMARY, split_arguments([argument]).overrides)))
            except ConfigError as error:
                if word not in str(error):
                    unnamed.append((argument, str(error)))
            else:
                accepted.append(argument)
            slowest = max(slowest, time.process_time() - start)
    assert not accepted
    assert not unnamed
    assert slowest < 5


@pytest.mark.slow
def test_a_sample_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    arguments = list(mutations(100))[::20]
    for argument in arguments:
        command = [sys.executable, "-m", "rcpo.cli", "train", argument, f"hydra.run.dir={tmp_path / 'run'}"]
        result = forked.run(command)
        assert result.returncode == 2, (argument, result.stderr)
        assert "Traceback" not in result.stderr + result.stdout
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
