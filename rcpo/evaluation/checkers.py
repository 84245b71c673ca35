"""Whether an answer is right, where a program can tell: a task's own check, a number, a pattern, the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, DivisionByZero, InvalidOperation, Overflow

from rcpo.config.schema import EvalConfig
from rcpo.data.dataset import Checker

Scorer = Callable[[str, str, str], bool]
"""(prompt, chosen response, answer) → whether the answer is right."""

# A dash is a sign where it stands right before its number and not between two things ("5-3", "GPT-4"), or
# after an equals sign or GSM8K's mark. Powers of ten and fractions belong to their number.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%.])[-−](?=(?:[$€£]\s?)?\.?\d)|(?<=[=#])\s?[-−]\s?)?"
    r"[$€£]?\s?(?P<minus>(?<=[$€£])[-−])?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+−]?\d+)(?!\w)"
    r"|\s?(?:[×*·]|\\times|\\cdot)\s?10(?:\^|\*\*)\{?(?P<power>[-+−]?\d+)\}?)?"
    r"(?:/(?P<denominator>\d+(?:\.\d+)?)(?![\w/]))?"
)
_MARK = "####"  # GSM8K puts it before the result


def checker_of(config: EvalConfig, checker: Checker | None) -> Scorer | None:
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
    """The value of a text's last number, None without one; after "####" that of the first.

    Signs, exponents (1e5, 2 × 10^3) and fractions (3/4) count; currency signs and thousands separators do
    not.
    """
    _, mark, result = text.rpartition(_MARK)
    found = [*_NUMBER.finditer(mark + result)] if mark else []
    numbers = found[:1] or [*_NUMBER.finditer(text)][-1:]
    return _value(numbers[0]) if numbers else None


def _value(number: re.Match[str]) -> Decimal | None:
    if number["denominator"] and number.string[: number.start()].endswith("/"):  # a date
        return Decimal(number["denominator"])
    digits = number["digits"].replace(",", "")
    exponent = (number["exponent"] or number["power"] or "0").replace("−", "-")
    try:
        value = Decimal(f"{digits}e{exponent}")
        if number["denominator"]:
            value /= Decimal(number["denominator"])
    except (InvalidOperation, DivisionByZero, Overflow):
        return None
    return -value if number["sign"] or number["minus"] else value


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = list(pattern.finditer(text))
    return (found[-1][1] if pattern.groups else found[-1][0]).strip() if found else None


def _same(one: object | None, other: object | None) -> bool:
    return one is not None and one == other
