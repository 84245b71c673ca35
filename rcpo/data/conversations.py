"""Conversations: lists of messages and the Human/Assistant text of HH-RLHF, and where their prompt ends."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from rcpo.data.names import STRUCTURED
from rcpo.data.reasoning import FIELDS
from rcpo.data.records import BadRow, Message

TURN = "Assistant:"
_TURNS = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_JSON_MESSAGES = re.compile(r'\s*\[?\s*\{\s*"(role|from|content|value)"\s*:')
_BROKEN_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|from)"\s*:')  # not an answer, even if it is broken
_PYTHON_LIST = re.compile(
    r"\s*(array\()?\[?\s*\{\s*('(role|from)'\s*:.*'(content|value)'|'(content|value)'\s*:.*'(role|from)')\s*:",
    re.DOTALL,
)
_ROLES = {  # the names of ShareGPT, Open Assistant, Gemini, and other formats
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatbot": "assistant", "ai": "assistant", "prompter": "user", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text", "parts")  # `parts` are Gemini's
_SAID = ("role", "content", "tool_calls", "name", *FIELDS)
_TURN_KEYS = (("user", "assistant"), ("human", "assistant"), ("input", "output"), ("question", "answer"),
              ("prompt", "response"))  # fmt: skip


def as_messages(value: Any, name: str) -> list[Message]:
    """A column's messages, each with a `role` and text or tool calls; raises BadRow.

    ShareGPT's `from` and `value`, other names of roles, and objects that hold a question and its answer are
    brought to this form. Parts of text are joined, as the models' templates join them. Keys without a value
    are left out: Arrow files give every message the keys of all.
    """
    if not isinstance(value, list):
        raise BadRow(f"field {name!r} is not a list of messages")
    if not value:
        raise BadRow(f"field {name!r} has no message")
    if all(map(_is_plain, value)):
        return list(value)
    turns = [(place, part) for place, message in enumerate(value) for part in _split_turn(message)]
    return [_message(message, name, place) for place, message in turns]


def _is_plain(value: Any) -> bool:
    """Whether a message has this form already, and nothing but a role and text."""
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in _PLAIN_ROLES
        and isinstance(value["content"], str)
    )


def speaker(message: Any) -> str | None:
    """Return the role of a message in any of the known forms, None where it has none."""
    if not isinstance(message, dict):
        return None
    role = next((message[key] for key in _ROLE_KEYS if message.get(key) is not None), None)
    if not isinstance(role, str):
        return "assistant" if _turn_keys(message) else None
    return _ROLES.get(role.strip().lower(), role.strip().lower())


def begins_with_answer(messages: list[Any]) -> bool:
    """Whether the first message of some is the assistant's; a question with its answer is not."""
    return speaker(_split_turn(messages[0])[0]) == "assistant"


def _turn_keys(message: dict[str, Any]) -> tuple[str, str] | None:
    """Return the keys of a question and its answer in one object, as Capybara's `input` and `output`."""
    if any(key in message for key in _ROLE_KEYS):
        return None
    return next((keys for keys in _TURN_KEYS if all(isinstance(message.get(key), str) for key in keys)), None)


def _split_turn(value: Any) -> list[Any]:
    keys = _turn_keys(value) if isinstance(value, dict) else None
    if keys is None:
        return [value]
    roles = ("user", "assistant")
    return [{"role": role, "content": value[key]} for role, key in zip(roles, keys, strict=True)]


def _message(value: Any, name: str, place: int) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"field {name!r} holds a message that is not an object")
    message = {key: part for key, part in value.items() if part is not None}
    named = next((key for key in _ROLE_KEYS if key in message), "role")
    role = message.pop(named, None)
    if not isinstance(role, str) or not role.strip():
        raise BadRow(f"field {name!r} holds a message without a role")
    message = {"role": speaker({"role": role})} | message
    if "content" not in message:
        for key in _CONTENT_KEYS:
            if key in message:
                message["content"] = message.pop(key)
                break
    if role == "function_call":
        message["tool_calls"] = _calls(message.pop("content", None), name)
    if message.get("loss_weight") in (0, 1):
        weight = message.pop("loss_weight")  # LLaMA-Factory's mark of what is learned
        if weight == 0 and message["role"] == "assistant":
            message["train"] = False
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"field {name!r} holds a message without content")
    if isinstance(content, dict):
        content = [content]
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
    kind = (part.get("type") or "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        text = next(
            (part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None
        )
        if text is not None:
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
    """A row with the messages and lists that cells hold as JSON text, as CSV and Parquet exports write them.

    Raises BadRow for broken JSON, and for what Python prints for a list, which is not JSON.
    """
    found = {}
    for name, value in row.items():
        if not isinstance(value, str):
            continue
        if (messages := _from_json(value, name)) is not None:
            found[name] = messages
        elif name in STRUCTURED and value[:1] in ("[", "{"):
            with contextlib.suppress(ValueError, RecursionError):
                found[name] = json.loads(value)
    return row | found if found else row


def _from_json(text: str, name: str) -> list[Any] | None:
    """The messages in a text of JSON; None where it is another text, such as an answer in JSON."""
    if _PYTHON_LIST.match(text) is not None:
        raise BadRow(f"field {name!r} holds messages as Python prints them; write them as JSON (json.dumps)")
    if _JSON_MESSAGES.match(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _BROKEN_MESSAGES.match(text) is None:
            return None
        raise BadRow(f"field {name!r} holds messages as broken JSON text") from error
    messages = value if isinstance(value, list) else [value]
    return messages if _is_message(messages[0]) else None


def _is_message(value: Any) -> bool:
    """Whether an object names a speaker and holds what it says."""
    return (
        isinstance(value, dict)
        and any(key in value for key in _ROLE_KEYS)
        and any(key in value for key in (*_CONTENT_KEYS, "tool_calls"))
    )


def read_turn_lists(*parts: Any) -> tuple[list[Message], list[Message]] | None:
    """A prompt and two answers that each hold their turns as a JSON list of texts (LMSYS), as conversations.

    None for other values. Raises BadRow where a turn is missing.
    """
    found = [_turn_list(part) for part in parts]
    if any(part is None for part in found) or len({len(part or ()) for part in found}) != 1:
        return None
    questions, first, second = (part or [] for part in found)
    if not all(isinstance(text, str) for part in found for text in part or ()):
        raise BadRow("a turn is not text")

    def told(answers: list[Any]) -> list[Message]:
        return [
            {"role": role, "content": text}
            for turn in zip(questions, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    return told(first), told(second)


def _turn_list(value: Any) -> list[Any] | None:
    if not isinstance(value, str) or not value.startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    known = isinstance(found, list) and found and all(text is None or isinstance(text, str) for text in found)
    return found if known else None


def said(messages: list[Message]) -> list[Message]:
    """Who says what in some messages, without what else they hold, such as times and ids."""
    return [{name: one[name] for name in _SAID if name in one} for one in messages]


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations: the longest common beginning after which both go on with the assistant."""
    both = said(chosen), said(rejected)
    if both[0] == both[1]:
        raise BadRow("identical responses")
    end = 0
    for place, (one, other) in enumerate(zip(*both, strict=False)):
        if one["role"] == other["role"] == "assistant":
            end = place
        if one != other:
            break
    if end == 0:
        raise BadRow("the conversations have no common beginning that the assistant answers")
    return chosen[:end], chosen[end:], rejected[end:]


def has_turns(text: str) -> bool:
    """Whether a text has HH-RLHF's turns."""
    return ("Human:" in text or TURN in text) and _TURNS.search(text) is not None


def are_whole(*texts: str) -> bool:
    """Whether texts are conversations in HH-RLHF's turns, from the first question on.

    Raises BadRow where some are and others are not.
    """
    whole = {text.lstrip().startswith("Human:") and TURN in text for text in texts}
    if whole == {True, False}:
        raise BadRow("one response is a whole conversation, the other is not")
    return whole == {True}


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
    pieces = _TURNS.split(text) if is_open(text) else []
    if len(pieces) < 3:
        return [{"role": "user", "content": text}]
    if pieces[0].strip() or len(pieces) < 5 or pieces[-1].strip():
        raise BadRow(f"the prompt is not turns from 'Human:' to {TURN!r}")
    return _turns(pieces[1:-2])


def is_open(text: str) -> bool:
    """Whether a text ends where the assistant is to answer; Nectar writes a space after it."""
    return text.rstrip(" ").endswith(TURN)


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
