"""What a chat template writes around an answer, read off renderings of a question with a known answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rcpo.data.reasoning import opened_at_end, usual_closing
from rcpo.data.records import BadRow, Message

QUESTION: Message = {"role": "user", "content": "What is a probe?"}
OTHER: Message = {"role": "user", "content": "Another question"}
WORDS, REASON = "probed-answer", "probed-reason"
ANSWER: Message = {"role": "assistant", "content": WORDS}
_REASONED = ANSWER | {"reasoning_content": REASON}
_TAG = re.compile(r"<[^<>\s][^<>\n]*>|\[/?[A-Z_]+\]")

Render = Callable[[list[Message], bool], str]
"""Messages and whether the generation prompt follows -> text; raises BadRow."""


@dataclass(frozen=True)
class Frame:
    """What stands around an answer.

    In a finished conversation `lead` precedes its words and `closing` follows them, of which `ending` is
    learned: all up to the end of the turn, which is a special token if `ends`. `ends_of_turns` are the tokens
    that may end a turn. `tail` is what follows the last question in a prompt: the end of its turn and
    the generation prompt. A finished conversation may lack the generation prompt's end, `surplus`. If
    generation begins inside a block of thoughts that a finished turn does not show, `opening` is what opens
    it and `close` what closes it.
    """

    lead: str = ""
    closing: str = ""
    ending: str = ""
    ends: bool = False
    ends_of_turns: tuple[str, ...] = ()
    tail: str = ""
    surplus: str = ""
    opening: str = ""
    close: str = ""


NO_FRAME = Frame()


def find_frame(render: Render, special: Sequence[str], eos: str | None) -> Frame:
    """Probes a template; `special` are the tokenizer's special tokens, `eos` its end of a sequence.

    Raises BadRow for a template that renders no answer where generation would begin.
    """
    prompt, other = (render([question], True) for question in (QUESTION, OTHER))
    whole = render([QUESTION, ANSWER], False)
    before, found, closing = whole.rpartition(WORDS)
    if not found:
        raise BadRow(
            "renders no answer: the answer's words are not in the finished conversation; give another "
            "template, such as data.template=chatml"
        )
    start, opening, close = _opening(prompt, whole, render)
    surplus = "" if opening else prompt[start:]
    if (
        not whole.startswith(prompt) and before.split() == prompt.split()
    ):  # only white space differs, wherever it stands
        start, surplus = len(before.rstrip()), prompt[len(prompt.rstrip()) :]
    if start > len(before) or not (surplus.isspace() or not surplus or _is_block(surplus)):
        raise BadRow(
            "renders an answer elsewhere than where generation would begin: "
            f"after {prompt[-40:]!r} it goes on {whole[max(0, start - 40) :][:80]!r}; "
            "set what it reads in data.template_options (as enable_thinking: false), or give another "
            "template, such as data.template=chatml"
        )
    ending, ends = _ending(closing, special, eos)
    return Frame(
        lead=before[start:],
        closing=closing,
        ending=ending,
        ends=ends,
        ends_of_turns=tuple(token for token in special if token),
        tail=prompt[len(prompt) - _common_suffix(prompt, other) :],
        surplus=surplus,
        opening=opening,
        close=close,
    )


def generation_start(prompt: str, finished: str, frame: Frame) -> int | None:
    """Where an answer begins in a finished conversation, given the prompt for it; None where it is not seen.

    What a prompt ends with and a finished turn does not show is white space, or a block of thoughts, open or
    closed.
    """
    for end in ("", frame.opening, frame.surplus):
        base = prompt.removesuffix(end)
        if finished.startswith(base):
            return len(base)
    start = _shared(prompt, finished)
    rest = prompt[start:]
    return start if _is_block(rest) or rest == opened_at_end(prompt) else None


def _opening(prompt: str, whole: str, render: Render) -> tuple[int, str, str]:
    """Where the answer begins in a finished conversation; an opened block of thoughts and what closes it."""
    start = _shared(prompt, whole)
    try:
        reasoned = render([QUESTION, _REASONED], False)
    except BadRow:
        reasoned = ""
    begun = next((text for text in (prompt, prompt[:start]) if reasoned.startswith(text + REASON)), None)
    opening = opened_at_end(prompt)
    if not opening and begun is not None and start < len(prompt):  # a block without a tag
        opening = prompt[start:]
    if not opening:
        return start, "", ""
    if begun is None:
        close = usual_closing(opening)
    else:
        close = reasoned[len(begun + REASON) :].rpartition(WORDS)[0]
    begin = len(prompt) - len(opening)
    if start == len(prompt) and close.strip() in whole[start:]:  # a finished turn shows the block, empty
        return start, "", ""
    return min(start, begin), opening, close


def _shared(prompt: str, whole: str) -> int:
    """The length of the common beginning, without a tag that the two continue differently."""
    start = len(prompt)
    if not whole.startswith(prompt):
        pairs = enumerate(zip(prompt, whole, strict=False))
        start = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    for text in (prompt, whole):
        for tag in _TAG.finditer(text):
            if tag.start() < start < tag.end():
                start = tag.start()
    return start


def _is_block(text: str) -> bool:
    """Whether all of a text is a block between tags, as an empty block of thoughts is."""
    tags = list(_TAG.finditer(text))
    return len(tags) > 1 and not text[: tags[0].start()].strip() and not text[tags[-1].end() :].strip()


def _common_suffix(one: str, other: str) -> int:
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ending(closing: str, special: Sequence[str], eos: str | None) -> tuple[str, bool]:
    """`closing` up to the end of the turn, and whether that is a special token.

    It is the first special token, after which nothing is generated, or the end-of-sequence token if only
    special tokens stand between. Without one, white space at the end goes: the end-of-sequence token follows.
    """
    found = sorted((closing.find(token), -len(token)) for token in special if token and token in closing)
    if not found:
        return closing.rstrip(), False
    end = found[0][0] - found[0][1]
    following = end
    while following < len(closing):
        token = next((token for token in special if token and closing.startswith(token, following)), None)
        if token is None:
            break
        following += len(token)
        if token == eos:
            return closing[:following], True
    return closing[:end], True
