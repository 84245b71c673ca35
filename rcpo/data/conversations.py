"""Conversations: lists of messages and the Human/Assistant text of HH-RLHF, and where their prompt ends."""

from __future__ import annotations

import json
import re
from typing import Any

from rcpo.data.records import BadRow, Message

TURN = "Assistant:"
_TURNS = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_JSON_MESSAGES = re.compile(r'\s*\[?\s*\{\s*"(role|from|content|value)"\s*:')
_PYTHON_LIST = re.compile(r"\s*(array\()?\[?\s*\{\s*'(role|from|content|value)'\s*:")
_ROLES = {  # ShareGPT's names and those of its kin
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "prompter": "user", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


def as_messages(value: Any, name: str) -> list[Message]:
    """A column's messages: each with a `role` and text, or tool calls; ShareGPT's from and value will do.

    Parts of text are joined, as the models' templates join them.
    Keys without a value are left out: Arrow files give every message the keys of all. Raises BadRow.
    """
    if not isinstance(value, list):
        raise BadRow(f"field {name!r} is not a list of messages")
    if not value:
        raise BadRow(f"field {name!r} has no message")
    return [_message(message, name, place) for place, message in enumerate(value)]


def _message(value: Any, name: str, place: int) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"field {name!r} holds a message that is not an object")
    message = {key: part for key, part in value.items() if part is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role) if isinstance(role, str) else role} | message
        if "value" in message:
            message["content"] = message.pop("value")
        if role == "function_call":
            message["tool_calls"] = _calls(message.pop("content", None), name)
    if message.get("loss_weight") in (0, 1):
        del message["loss_weight"]  # LLaMA-Factory's mark of what is learned: prompts are not, responses are
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRow(f"field {name!r} holds a message without a role")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"field {name!r} holds a message without content")
    if isinstance(content, list):
        where = f"{name}[{place}].content"
        message["content"] = "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise BadRow(f"field {name!r} holds a message whose content is not a string")
    return message


def _part(part: Any, place: str) -> str:
    """The text of a content part; raises BadRow with its place for a part of another type."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get("text", part.get("value")) if kind == "text" else None
    if isinstance(text, str):
        return text
    named = f"of the type {kind[:20]!r}" if isinstance(kind, str) and kind != "text" else "without text"
    raise BadRow(f"{place} is a part {named}; only parts of text can be used")


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call, a JSON text with one call or several, as tool calls."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"field {name!r} holds a function_call that is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRow(f"field {name!r} holds a function_call without a name")
    return [{"type": "function", "function": call} for call in calls]


def is_asked(text: str, message: Message) -> bool:
    """Whether a message asks exactly this, white space around it aside."""
    content = message.get("content")
    return message["role"] != "assistant" and isinstance(content, str) and content.strip() == text.strip()


def read_json_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the messages that a cell holds as JSON text, as CSV and Parquet exports write them.

    Raises BadRow for broken JSON, and for what Python prints for a list, which is not JSON.
    """
    found = {}
    for name, value in row.items():
        if isinstance(value, str) and (messages := _from_json(value, name)) is not None:
            found[name] = messages
    return row | found if found else row


def _from_json(text: str, name: str) -> list[Any] | None:
    """The messages in a text of JSON; None where it is another text."""
    if _PYTHON_LIST.match(text) is not None:
        raise BadRow(f"field {name!r} holds messages as Python prints them; write them as JSON (json.dumps)")
    if _JSON_MESSAGES.match(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"field {name!r} holds messages as broken JSON text") from error
    return value if isinstance(value, list) else [value]


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations: the longest common beginning after which both go on with the assistant."""
    if chosen == rejected:
        raise BadRow("identical responses")
    end = 0
    for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one["role"] == other["role"] == "assistant":
            end = place
        if one != other:
            break
    if end == 0:
        raise BadRow("the conversations have no common beginning that the assistant answers")
    return chosen[:end], chosen[end:], rejected[end:]


def has_turns(text: str) -> bool:
    """Whether a text has HH-RLHF's turns."""
    return _TURNS.search(text) is not None


def without_prompt(prompt: str, *responses: str) -> list[str]:
    """Responses to a prompt with turns, without the prompt where all of them repeat it; raises BadRow."""
    repeated = {response.startswith(prompt) for response in responses}
    if repeated == {True, False}:
        raise BadRow("one response repeats the prompt, the other does not")
    return [response[len(prompt) :] for response in responses] if repeated == {True} else list(responses)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts with turns: the longest common prefix that ends in "Assistant:" (HH-RLHF); raises BadRow."""
    found = chosen.rfind(TURN, 0, _common_prefix(chosen, rejected))
    if found < 0:
        raise BadRow(f"no field 'prompt', and no common beginning that ends in {TURN!r}")
    end = found + len(TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def parse_prompt(text: str) -> list[Message]:
    """HH-RLHF's prompt as messages, its open last turn left out; any other text is one message of the user.

    Raises BadRow for such a prompt with text before its first turn.
    """
    pieces = _TURNS.split(text)
    if len(pieces) < 3 or not text.endswith(TURN):
        return [{"role": "user", "content": text}]
    if pieces[0].strip() or len(pieces) < 5 or pieces[-1]:
        raise BadRow(f"the prompt is not turns from 'Human:' to {TURN!r}")
    return _turns(pieces[1:-2])


def parse_response(text: str) -> list[Message]:
    """What follows HH-RLHF's "Assistant:" as messages: the answer, and turns after it where there are any."""
    return _turns([TURN[:-1], *_TURNS.split(text)])


def _turns(pieces: list[str]) -> list[Message]:
    """Speakers and words in turn, white space around the words left out."""
    roles = ("user" if name == "Human" else "assistant" for name in pieces[::2])
    return [{"role": role, "content": words.strip()} for role, words in zip(roles, pieces[1::2], strict=True)]


def _common_prefix(one: str, other: str) -> int:
    """The number of characters that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
