"""Checking answers: numbers as GSM8K writes them, patterns, plain text, the task's own check."""

from __future__ import annotations

from decimal import Decimal

import pytest

from rcpo.config.schema import EvalConfig
from rcpo.data.sums import answer_is_correct
from rcpo.evaluation.checkers import checker_of, last_number, same_text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("so it costs $1,234.50.", "1234.50"),
        ("It is 5 - wait, 12 #### 9 and then 100", "9"),
        ("between 2 and -3", "-3"),
        ("0.50", "0.5"),
        ("half, .25", "0.25"),
        ("7.", "7"),
        ("10,20", "20"),
        ("12%", "12"),
        ("the range is 5-3", "3"),  # a dash between two numbers is not a sign
        ("2021-05-04", "4"),
        ("as GPT-4 does", "4"),
        ("(1+4)-3", "3"),
        ("100%-5", "5"),
        ("so x =-3", "-3"),
        ("so x = - 3", "-3"),
        ("minus: −3", "-3"),  # U+2212
        ("a list:\n- 3 apples", "3"),
        ("#### -3", "-3"),
        ("#### - 3", "-3"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("1e5", "100000"),
        ("1.5E-3", "0.0015"),
        ("-2e+2", "-200"),
        ("6.02 × 10^23", "6.02e23"),
        ("3*10**4", "30000"),
        (r"2 \times 10^{-3}", "0.002"),
        ("3e4u", "4"),  # not a number with an exponent
        ("three quarters, 3/4", "0.75"),
        ("-1/2", "-0.5"),
        ("on 5/3/2021", "2021"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["1e99999999999999999999", "3/0", "no number"])
def test_what_has_no_value_is_no_number(text: str) -> None:
    assert last_number(text) is None


def test_fractions_are_compared_by_value_and_not_by_their_denominator() -> None:
    check = checker_of(EvalConfig(scorer="number"), None)
    assert check is not None
    assert check("", "#### 1/3", "it is 2/6") and not check("", "#### 1/2", "it is 3/2")


def test_numbers_are_compared_by_value() -> None:
    check = checker_of(EvalConfig(scorer="number"), None)
    assert check is not None
    assert check("", "work\n#### 72", "The answer is $72.00")
    assert not check("", "work\n#### 72", "The answer is 7 2 1")
    assert not check("", "none", "none") and last_number("none") is None


def test_a_pattern_picks_the_answer() -> None:
    check = checker_of(EvalConfig(scorer="pattern", answer_pattern=r"answer is \(?([A-D])"), None)
    assert check is not None
    assert check("", "The answer is (B).", "I first thought the answer is A, but the answer is B")
    assert not check("", "The answer is (B).", "B")


def test_text_and_the_tasks_own_check() -> None:
    assert same_text("", "a  b\n", "a b") and not same_text("", "ab", "a b")
    own = checker_of(EvalConfig(), answer_is_correct)
    assert own is not None and own("12+34=", "wrong 1", "it is 46")
    assert checker_of(EvalConfig(), None) is None
    other = checker_of(EvalConfig(scorer="number"), answer_is_correct)
    assert other is not None and other("12+34=", "it is 47", "47")
