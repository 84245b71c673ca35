"""Whether an answer is right, where a program can tell: a task's own check, a number, a pattern, the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from rcpo.config import EvalConfig
from rcpo.data.dataset import Checker

Scorer = Callable[[str, str, str], bool]
"""(prompt, chosen response, answer) → whether the answer is right."""

_NUMBER = re.compile(r"-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_MARK = "####"  # GSM8K puts it before the result


def scorer_of(config: EvalConfig, checker: Checker | None) -> Scorer | None:
    """What `eval.scorer` names; null is the task's own check, None where nothing can tell."""
    if config.scorer is None:
        return None if checker is None else lambda prompt, chosen, answer: checker(prompt, answer)
    if config.scorer == "pattern":
        assert config.answer_pattern is not None
        pattern = re.compile(config.answer_pattern)
        return lambda prompt, chosen, answer: _same(_last(pattern, chosen), _last(pattern, answer))
    return {"number": same_number, "text": same_text}[config.scorer]


def same_number(prompt: str, chosen: str, answer: str) -> bool:
    """Whether both end in the same number: the one after "####", else the last one in the text."""
    return _same(last_number(chosen), last_number(answer))


def same_text(prompt: str, chosen: str, answer: str) -> bool:
    """Whether both are the same text but for white space."""
    return chosen.split() == answer.split()


def last_number(text: str) -> Decimal | None:
    """1,234.50 as 1234.5; signs count, currency signs and thousands separators do not. None without one."""
    _, mark, result = text.rpartition(_MARK)
    found = _NUMBER.findall(result) if mark else []
    numbers = found[:1] or _NUMBER.findall(text)[-1:]
    if not numbers:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", numbers[0]))
    except InvalidOperation:
        return None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = list(pattern.finditer(text))
    return (found[-1][1] if pattern.groups else found[-1][0]).strip() if found else None


def _same(one: object | None, other: object | None) -> bool:
    return one is not None and one == other
