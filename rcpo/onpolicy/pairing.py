"""From scored answers to pairs: pure functions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from rcpo.config.onpolicy import PairingConfig

# why a prompt gives no pair
SINGLE, ALL_RIGHT, ALL_WRONG = "one_answer", "all_right", "all_wrong"
EQUAL, CLOSE = "equal_scores", "below_min_margin"


@dataclass(frozen=True)
class Scored:
    """An answer's text with its score."""

    text: str
    score: float


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt; the chosen one has the higher score."""

    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        return self.chosen.score - self.rejected.score


def pair_up(answers: Sequence[Scored], config: PairingConfig, seed: str) -> list[AnswerPair]:
    """The pairs of one prompt's answers, whose texts all differ, in the order of preference of `config`.

    Of equal margins the answers that were drawn first come first: they are as probable as any.
    """
    pairs = [
        AnswerPair(*sorted(two, key=lambda one: -one.score))
        for two in combinations(answers, 2)
        if two[0].score != two[1].score
    ]
    pairs = [pair for pair in pairs if pair.margin >= config.min_margin]
    if config.name == "random":
        random.Random(seed).shuffle(pairs)
    else:
        widest_first = config.name == "best_worst"
        pairs.sort(key=lambda pair: -pair.margin if widest_first else pair.margin)
    return pairs[: config.per_prompt]


def why_none(answers: Sequence[Scored], *, verifiable: bool) -> str:
    """Why a prompt's answers give no pair; `verifiable` scores are 1 for right and 0 for wrong."""
    if len(answers) < 2:
        return SINGLE
    if len({one.score for one in answers}) > 1:
        return CLOSE
    if not verifiable:
        return EQUAL
    return ALL_RIGHT if answers[0].score else ALL_WRONG


def distinct(answers: Sequence[Scored]) -> list[Scored]:
    """The first of each text, white space around it aside, in the order in which they were drawn."""
    found: dict[str, Scored] = {}
    for one in answers:
        found.setdefault(one.text.strip(), one)
    return list(found.values())
