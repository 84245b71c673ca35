"""What is learned of a response with several turns: the assistant's answers, not what is said between them.

Everything is found in renderings: an answer begins where the prompt that generation would be given for it
ends, and it is what the template writes for it as the answer to that prompt.

An answer is learned as the finished conversation shows it, which may be without the reasoning or the empty
block of thoughts that the last answer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

from rcpo.data.forms import is_context
from rcpo.data.frames import generation_start
from rcpo.data.records import BadRow, Content, Message, Row, Spans, Unrendered
from rcpo.data.templates import ChatTemplate


def contexts(template: ChatTemplate, row: Row, answer: Content, text: str, *, every: bool) -> Spans:
    """What is read but not learned of `text`, a row's rendered `answer` of several messages.

    The last answer is learned, or `every` one. Raises BadRow where the template does not show an answer as
    generation would give it.
    """
    messages = template.spoken(answer)
    if messages[-1]["role"] != "assistant":
        raise BadRow("a response of several turns does not end with an answer of the assistant")
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if every:
        places = [place for place in places if not is_context(messages[place])]
    else:
        places = places[-1:]
    if not places:
        raise BadRow("the file marks every answer of a response as not to be learned")
    learned = [_place(template, row, messages, place, text) for place in places]
    edges = [(0, 0), *learned, (len(text), len(text))]
    return tuple((end, first) for (_, end), (first, _) in pairwise(edges) if first > end)


def _place(
    template: ChatTemplate, row: Row, messages: list[Message], place: int, text: str
) -> tuple[int, int]:
    """Where the answer `messages[place]` begins and ends in the text of all messages."""
    before = replace(row, prompt=[*row.prompt, *messages[:place]])
    given = template.prompt(before)
    start = 0
    if place:
        finished = template.finished(row, messages)
        found = generation_start(given, finished, template.frame)
        if found is None:
            raise Unrendered("the template shows the turns of a response otherwise than generation sees them")
        start = found - (len(finished) - len(text))
        if template.left_out and text.startswith(template.left_out, max(start, 0)):
            start += len(template.left_out)
    own = template.response(given, before, messages[place : place + 1])
    for shown in _shown(template, own):
        if start >= 0 and text.startswith(shown, start):
            return start, start + len(shown)
    raise Unrendered(
        "the template leaves out a part of an earlier answer of a response, such as its reasoning: "
        "data.reasoning=strip removes reasoning, data.learn=last learns the last answer alone"
    )


def _shown(template: ChatTemplate, own: str) -> Iterator[str]:
    """The forms that an answer may have in a conversation that goes on after it."""
    frame = template.frame
    for head, tail in product(("", frame.lead, frame.close), ("", frame.ending)):
        shown = own.removeprefix(head).removesuffix(tail)
        if shown.strip():
            yield shown
            if frame.lead.isspace():
                yield frame.lead + shown
