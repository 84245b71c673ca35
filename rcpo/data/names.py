"""The names that files give their columns and values, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PROMPTS = (
    "prompt", "instruction", "question", "query", "conversations", "messages", "conversation", "dialogue",
    "dialog", "chat", "contents", "history", "context", "post", "input",
)  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents")
ANSWERS = ("completion", "output", "response", "answer", "solution", "generation", "reply")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
# words that tell the better answer's column from the worse one's, whatever else is in the names
WORDS = (
    ("chosen", "rejected"), ("chosen", "reject"), ("accepted", "rejected"), ("accept", "reject"),
    ("selected", "rejected"), ("preferred", "non_preferred"), ("preferred", "dispreferred"),
    ("preferred", "unpreferred"), ("preferred", "rejected"), ("better", "worse"), ("best", "worst"),
    ("winner", "loser"), ("winning", "losing"), ("good", "bad"), ("positive", "negative"), ("pos", "neg"),
    ("win", "lose"), ("win", "loss"), ("desirable", "undesirable"), ("correct", "incorrect"),
    ("correct", "wrong"), ("right", "wrong"),
)  # fmt: skip
KNOWN_PAIRS = (
    ("response_j", "response_k"),  # the StackExchange pairs of TRL's first examples
    ("answer_matching_behavior", "answer_not_matching_behavior"),  # Anthropic's model-written evaluations
    ("y_w", "y_l"),  # as the DPO paper calls them
    ("yw", "yl"),
)
OTHER_ANSWERS = (
    "rejected_response",
    "rejected_messages",
)  # ms-swift's, beside a conversation with the better one
SCORES = ("score", "rating", "reward", "avg_rating", "average_rating")
NUMBERED = (("1", "2"), ("0", "1"), ("a", "b"), ("first", "second"), ("left", "right"))
ANSWER_STEMS = (
    "output", "response", "answer", "completion", "reply", "generation", "conversation", "text",
    "summary", "assistant", "candidate", "option", "sample", "choice", "ref", "generated",
)  # fmt: skip
JUDGES = (
    "judgment", "judgement", "judgments", "judgements", "label", "labels", "preference", "preferences",
    "preferred", "winner", "choice", "better_response_id", "better", "best", "verdict", "verdicts",
    "overall_preference", "overall_pref", "preference_strength", "human_preference", "human_label",
    "gold_label", "pref", "annotation", "annotations", "vote", "votes", "preferred_response",
    "preferred_output", "preferred_answer", "better_response", "better_answer", "better_output",
    "best_response", "best_answer", "winning_response", "decision", "selected", "selection",
)  # fmt: skip
_RATER = "annotator|annotation|rater|judge|labeler|labeller|worker|vote|human|evaluator|expert"
_JUDGMENT = "label|preference|choice|vote|judge?ment|rating|annotation"
SEVERAL = re.compile(
    rf"(({_RATER})_?\d+(_({_JUDGMENT}))?)|(({_JUDGMENT})_?(({_RATER})_?)?\d+)"
)  # annotator1, rater_2_label, label_3, preference_annotator_1
LISTS = (
    "answers", "responses", "completions", "candidates", "outputs", "generations", "replies", "summaries",
    "options", "choices", "samples", "answer_list", "response_list",
)  # fmt: skip
SCORE_LISTS = (
    "scores", "ratings", "rewards", "score", "rating", "reward", "overall_scores", "reward_scores", "elo",
    "elos", "votes", "upvotes",
)  # fmt: skip
RANK_LISTS = ("ranks", "rankings", "rank")
STRUCTURED = frozenset((*LISTS, *SCORE_LISTS, *RANK_LISTS, "history", "tree"))  # JSON in cells of CSV
MARKED = ("score", "rating", "reward", "rank")  # words of the columns that mark answers in columns

LABEL_WORDS = frozenset((
    "label", "labels", "kto", "acceptable", "accepted", "desirable", "like", "liked", "thumb", "thumbs",
    "thumbsup", "thumbup", "good", "correct", "preferred", "feedback", "approved", "upvoted", "safe",
    "helpful", "harmless", "appropriate", "satisfactory",
))  # fmt: skip
VERDICT_WORDS = frozenset((  # of columns that can only be labels, whatever their values
    "kto", "acceptable", "desirable", "liked", "thumb", "thumbs", "thumbsup", "thumbup", "approved",
    "upvoted",
))  # fmt: skip
CONTRARY_WORDS = frozenset((
    "unacceptable", "undesirable", "dislike", "disliked", "dispreferred", "bad", "incorrect", "wrong",
    "rejected", "downvoted", "not", "unsafe", "unhelpful", "harmful", "toxic", "inappropriate", "offensive",
    "hateful",
))  # fmt: skip
WANTED = frozenset((
    "true", "1", "yes", "good", "positive", "desirable", "acceptable", "accepted", "accept", "like",
    "liked", "up", "thumbs up", "thumb up", "upvote", "+1", "win", "correct", "chosen", "helpful",
    "preferred", "safe", "harmless", "appropriate", "👍",
))  # fmt: skip
UNWANTED = frozenset((
    "false", "0", "no", "bad", "negative", "undesirable", "unacceptable", "rejected", "reject",
    "dislike", "disliked", "down", "thumbs down", "thumb down", "downvote", "-1", "lose", "incorrect",
    "wrong", "unhelpful", "dispreferred", "unsafe", "harmful", "toxic", "inappropriate", "👎",
))  # fmt: skip
MODELS = ("model", "response", "answer", "assistant", "output", "option", "choice", "candidate", "summary",
          "completion", "winner", "prefer")  # fmt: skip
DEGREES = ("", "slightly ", "clearly ", "much ", "significantly ", "marginally ")
TIES = (
    "tie", "ties", "tied", "both", "equal", "equally good", "same", "draw", "neither", "tie (bothbad)",
    "tie (both bad)", "both bad", "both good", "about the same", "similar", "no preference",
)  # fmt: skip

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words(name: str) -> tuple[str, ...]:
    """The words of a name, lower case.

    >>> words("responseA"), words("human_ref_B"), words("acceptable?"), words("output1")
    (('response', 'a'), ('human', 'ref', 'b'), ('acceptable',), ('output', '1'))
    """
    return tuple(word.lower() for word in _WORD.findall(name))


def snake(name: str) -> str:
    """A name in lower case with underscores: `Label`, `Overall Preference` and `overallPreference` are known.

    >>> snake("Overall Preference"), snake("annotator1")
    ('overall_preference', 'annotator_1')
    """
    return "_".join(words(name))


@dataclass(frozen=True)
class Family:
    """Columns whose names differ in one word, which is a number or letter; `columns` by that word."""

    stem: tuple[str, ...]
    columns: Mapping[str, str]


def families(names: Iterable[str]) -> list[Family]:
    """The groups of columns that differ in one word alone, each with two marks of `NUMBERED` at least.

    >>> [dict(family.columns) for family in families(["response_1", "response_2", "prompt"])]
    [{'1': 'response_1', '2': 'response_2'}]
    """
    marks = {mark for pair in NUMBERED for mark in pair}
    found: dict[tuple[tuple[str, ...], int], dict[str, str]] = {}
    for name in names:
        parts = words(name)
        for place, word in enumerate(parts):
            if word in marks or word.isdigit() or (len(word) == 1 and word.isalpha()):
                stem = parts[:place] + parts[place + 1 :]
                found.setdefault((stem, place), {})[word] = name
    return [Family(stem, columns) for (stem, _), columns in found.items() if pair_of(columns) is not None]


def pair_of(columns: Mapping[str, str] | Sequence[str]) -> tuple[str, str] | None:
    """The first two marks that a family begins with, None where it has no such two."""
    return next((pair for pair in NUMBERED if all(mark in columns for mark in pair)), None)
