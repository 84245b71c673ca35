"""The reasoning before an answer: in a field of its message, or between tags at the beginning of its text."""

from __future__ import annotations

import re

from rcpo.data.records import Message

FIELDS = ("reasoning_content", "thinking", "reasoning")  # transformers' names
_TAG = r"(?:\w+:)?think(?:ing)?(?::\w+)?|thought|reasoning"
_OPEN = re.compile(rf"(?:<(?:{_TAG})>|\[THINK\]|<\|START_THINKING\|>)\s*\Z")
_CLOSED = re.compile(rf"(?:</(?:{_TAG})>|\[/THINK\]|<\|END_THINKING\|>)\s*\Z")
_CLOSING = re.compile(rf"</(?:{_TAG})>|\[/THINK\]")
_BLOCK = re.compile(
    rf"\s*(?:(?:<(?P<tag>{_TAG})>|(?P<mark>\[THINK\]))(?P<inner>.*?)(?:</(?P=tag)>|\[/THINK\])"
    rf"|(?P<open>(?:(?!<(?:{_TAG})>).)*?)</(?:{_TAG})>)\s*",  # what a model says after an opened block
    re.DOTALL,
)


def named_reasoning(message: Message) -> list[str]:
    """What a message's fields for reasoning hold."""
    return [message[name] for name in FIELDS if isinstance(message.get(name), str)]


def split_reasoning(message: Message) -> tuple[str | None, Message]:
    """A message's reasoning (None: it has none) and the message without it."""
    named = named_reasoning(message)
    plain = {name: value for name, value in message.items() if name not in FIELDS}
    content = plain.get("content")
    found = _BLOCK.match(content) if isinstance(content, str) and _CLOSING.search(content) else None
    if found is not None:
        plain["content"] = str(content)[found.end() :]
        named.append(found["open"] if found["inner"] is None else found["inner"])
    spoken = [text for text in named if text.strip()]
    return (spoken[0].strip() if spoken else None), plain


def opened_at_end(prompt: str) -> str:
    """The tag that a prompt ends with and that opens a block of thoughts; "" where it does not."""
    found = _OPEN.search(prompt)
    return "" if found is None else found[0]


def closed_at_end(prompt: str) -> bool:
    """Whether a prompt ends with a block of thoughts that it has closed itself."""
    return _CLOSED.search(prompt[-64:]) is not None  # longer than any tag


def usual_closing(opening: str) -> str:
    """What closes a block that `opening` opened, as the models write it whose templates do not show it."""
    tag = opening.strip()
    if "START" in tag:
        end = tag.replace("START", "END")
    else:
        end = tag.replace("[", "[/") if tag.startswith("[") else tag.replace("<", "</")
    return f"\n{end}\n\n" if opening.endswith("\n") else end
