"""The embedded task."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data import sums

two_digits = st.integers(10, 99)
fractions = st.floats(0, 1)


def test_answers_by_hand() -> None:
    for text in ("46", "= 46", "it is 46", "that is 46", "the sum is 46", "the answer is 46", " it is 46\n"):
        assert sums.answer_is_correct("12+34=", text), text
    for text in (
        "47",
        "it is 64",
        "",
        "it is",
        "046",
        "46.",
        "46 46",
        "it is  46",
        "It is 46",
        "= = 46",
        "٤٦",
        "4 6",
    ):
        assert not sums.answer_is_correct("12+34=", text), text


@pytest.mark.parametrize("prompt", ["", "1+2=", "12+34", "12-34=", "012+34="])
def test_a_prompt_of_another_task_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="two-digit sum"):
        sums.answer_is_correct(prompt, "3")


def test_wrong_sums_by_hand() -> None:
    # 38 + 47 = 85: ±1, ±10, 58 swapped, 75 without the carry
    assert sums.wrong_sums(38, 47) == [58, 75, 84, 86, 95]
    # 99 + 99 = 198: ±1, ±10, swaps 918 and 189, 188 without the carry
    assert sums.wrong_sums(99, 99) == [188, 189, 197, 199, 208, 918]
    # 10 + 10 = 20: 10 from ten less, 02 swapped is not a number of two digits
    assert sums.wrong_sums(10, 10) == [10, 19, 21, 30]


@given(a=two_digits, b=two_digits)
def test_there_is_always_a_wrong_sum_and_never_the_right_one(a: int, b: int) -> None:
    wrong = sums.wrong_sums(a, b)
    assert wrong and a + b not in wrong


@given(a=two_digits, b=two_digits, fraction=fractions)
def test_both_orders_of_a_sum_are_in_the_same_split(a: int, b: int, fraction: float) -> None:
    assert sums.is_held_out(a, b, fraction) == sums.is_held_out(b, a, fraction)


@given(a=two_digits, b=two_digits, one=fractions, other=fractions)
def test_what_a_fraction_holds_out_a_larger_one_does_too(a: int, b: int, one: float, other: float) -> None:
    assert sums.is_held_out(a, b, max(one, other)) or not sums.is_held_out(a, b, min(one, other))


def test_splits_share_no_prompt_and_leave_none_out() -> None:
    train, held_out = (set(sums.operands(0.1, held_out=held_out)) for held_out in (False, True))
    assert not train & held_out
    assert len(train | held_out) == 90 * 90
    assert 0.08 < len(held_out) / 8100 < 0.12
    assert sums.operands(0.0, held_out=True) == sums.operands(1.0, held_out=False) == []


def test_pairs_are_right_wrong_and_of_their_split() -> None:
    for held_out, pairs in ((False, sums.training_pairs(500, 0.1, 4)), (True, sums.held_out_pairs(0.1))):
        for pair in pairs:
            a, b = (int(number) for number in pair.prompt.rstrip("=").split("+"))
            assert sums.is_held_out(a, b, 0.1) == held_out
            assert sums.answer_is_correct(pair.prompt, pair.chosen)
            assert not sums.answer_is_correct(pair.prompt, pair.rejected)


def test_prompts_repeat_only_after_all_have_been_used() -> None:
    total = len(sums.operands(0.9, held_out=False))
    pairs = sums.training_pairs(total + 5, 0.9, seed=0)
    assert len({pair.prompt for pair in pairs[:total]}) == total
    assert len({pair.id for pair in pairs}) == total + 5
    held_out = sums.held_out_pairs(0.1)
    assert len({pair.prompt for pair in held_out}) == len(held_out) == len(sums.operands(0.1, held_out=True))


def test_every_phrasing_is_used_on_both_sides() -> None:
    pairs = sums.training_pairs(300, 0.1, seed=0)
    for side in ("chosen", "rejected"):
        shapes = {"".join("#" if c.isdigit() else c for c in getattr(pair, side)) for pair in pairs}
        assert {shape.replace("###", "##").replace("##", "{}") for shape in shapes} == set(sums.PHRASINGS)


def test_the_seed_decides() -> None:
    assert sums.training_pairs(50, 0.1, 1) == sums.training_pairs(50, 0.1, 1)
    assert sums.training_pairs(50, 0.1, 1) != sums.training_pairs(50, 0.1, 2)
    assert sums.training_pairs(50, 0.1, 1) == sums.training_pairs(90, 0.1, 1)[:50]
