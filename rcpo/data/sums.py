"""The embedded task: two-digit sums, "12+34=", answered in one of six phrasings.

The chosen answer has the right sum, the rejected one a plausible wrong one. Their phrasings are drawn
independently, so only the number tells the two apart. A prompt is held out by a hash of its two
numbers: a model trained with one held-out fraction has seen no held-out prompt of that fraction or of a
smaller one, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator

from rcpo.data.records import TextPair

PHRASINGS = ("{}", "= {}", "it is {}", "that is {}", "the sum is {}", "the answer is {}")
SMALLEST, LARGEST = 10, 99
EVAL_SEED = 0  # the held-out answers are the same for every run, so that runs can be compared
_PROMPT = re.compile(r"([1-9][0-9])\+([1-9][0-9])=")
_ANSWERS = re.compile(
    "|".join(re.escape(phrasing).replace(r"\{\}", "([1-9][0-9]*)") for phrasing in PHRASINGS)
)


def is_held_out(a: int, b: int, fraction: float) -> bool:
    """Whether a + b (and so b + a) is among the `fraction` of the prompts that is held out."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def operands(fraction: float, *, held_out: bool) -> list[tuple[int, int]]:
    """All prompts' numbers of one split, in ascending order; `fraction` of them are held out."""
    numbers = range(SMALLEST, LARGEST + 1)
    return [(a, b) for a in numbers for b in numbers if is_held_out(a, b, fraction) == held_out]


def training_pairs(count: int, fraction: float, seed: int) -> list[TextPair]:
    """`count` pairs with prompts of the training split, the same for the same seed.

    Prompts come in a random order without repetition until all have been used, then again with other
    phrasings and errors.
    """
    generator = random.Random(f"rcpo sums train {seed}")
    numbers = _endless(operands(fraction, held_out=False), generator)
    return [_make_pair(f"sums-train-{seed}-{place}", *next(numbers), generator) for place in range(count)]


def held_out_pairs(fraction: float) -> list[TextPair]:
    """One pair for every held-out prompt, in a random order; the same for every run."""
    generator = random.Random(f"rcpo sums held out {EVAL_SEED}")
    numbers = operands(fraction, held_out=True)
    generator.shuffle(numbers)
    return [_make_pair(f"sums-heldout-{a}+{b}", a, b, generator) for a, b in numbers]


def answer_is_correct(prompt: str, text: str) -> bool:
    """Whether `text` is one of the phrasings with exactly the sum that `prompt` asks for.

    White space around the answer does not matter; anything else that is not one of the phrasings is wrong.
    Raises ValueError for a prompt that is not one of this task's.
    """
    question = _PROMPT.fullmatch(prompt)
    if question is None:
        raise ValueError(f"{prompt!r} is not a two-digit sum such as '12+34='")
    answer = _ANSWERS.fullmatch(text.strip())
    if answer is None:
        return False
    number = next(group for group in answer.groups() if group is not None)
    return number == str(int(question[1]) + int(question[2]))


def wrong_sums(a: int, b: int) -> list[int]:
    """Plausible wrong results: off by one or ten, neighbouring digits swapped, the carry forgotten."""
    right = a + b
    digits = str(right)
    swapped = [int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]) for i in range(len(digits) - 1)]
    without_carry = 10 * (a // 10 + b // 10) + (a + b) % 10
    candidates = {right - 1, right + 1, right - 10, right + 10, without_carry, *swapped}
    return sorted(number for number in candidates - {right} if number >= SMALLEST)


def _make_pair(name: str, a: int, b: int, generator: random.Random) -> TextPair:
    chosen = generator.choice(PHRASINGS).format(a + b)
    rejected = generator.choice(PHRASINGS).format(generator.choice(wrong_sums(a, b)))
    return TextPair(name, f"{a}+{b}=", chosen, rejected)


def _endless(numbers: list[tuple[int, int]], generator: random.Random) -> Iterator[tuple[int, int]]:
    while True:
        yield from generator.sample(numbers, len(numbers))
