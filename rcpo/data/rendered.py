"""Whether a template writes all that a row holds: nothing that is to be read or learned may disappear."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rcpo.data.reasoning import FIELDS, split_reasoning
from rcpo.data.records import BadRow, Message, Row, Unrendered

_WORDS, _TOOL, _CALL, _KEY = "probed-content", "probed_tool_{}", "probed_call_{}", "probed_key_{}"

Render = Callable[[Sequence[Message], list[Any] | None, Row], str]
"""A prompt's text from its messages and tools; raises BadRow."""


def refuse_unrendered(text: str, messages: Sequence[Message], row: Row, render: Render) -> None:
    """Raise Unrendered where the prompt `text` lacks a message, a tool or a tool call of its row.

    Reasoning of earlier turns is the template's to leave out.
    """
    for place, message in enumerate(messages):
        if not _shows(message, text) and not _shows_probe(place, messages, row, render):
            raise Unrendered(f"the template leaves out a message of the role {message['role']!r}")
    if row.tools is None and not any(message.get("tool_calls") for message in messages):
        return
    tools, tool_names = _probed_tools(row.tools)
    probes, call_names = _probed_calls(messages)
    try:
        probed = render(probes, tools, row)
    except BadRow:  # the template compares names: what it renders for them is its own
        return
    if row.tools is not None:
        missing = not all(name in probed for name in tool_names)
        if missing or (not tool_names and text == render(messages, None, row)):
            raise Unrendered("the template leaves out the tools")
    if not all(name in probed for name in call_names):
        raise Unrendered("the template leaves out the tool calls")


def refuse_unrendered_calls(messages: Sequence[Message], render: Callable[[list[Message]], str]) -> None:
    """Raise Unrendered where a rendered answer lacks one of its tool calls."""
    probes, names = _probed_calls(messages)
    probed = render(probes)
    if not all(name in probed for name in names):
        raise Unrendered("the template leaves out the tool calls")


def is_said(message: Message, text: str) -> bool:
    """Whether a rendered answer has a message's words and its reasoning, white space aside."""
    content = message.get("content")
    if isinstance(content, str) and content.strip() in text and not any(name in message for name in FIELDS):
        return True  # as nearly always
    reasoning, plain = split_reasoning(message)
    content = plain.get("content")
    return all(_holds(text, part) for part in (reasoning, content) if isinstance(part, str))


def _shows(message: Message, text: str) -> bool:
    content = message.get("content")
    if not isinstance(content, str) or content.strip() in text:
        return True
    said = split_reasoning(message)[1]["content"] if message["role"] == "assistant" else content
    return _holds(text, said)


def _holds(text: str, part: str) -> bool:
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _shows_probe(place: int, messages: Sequence[Message], row: Row, render: Render) -> bool:
    """Whether other words in the message's place are in the prompt: a template may write it its own way."""
    probes = list(messages)
    probes[place] = probes[place] | {"content": _WORDS}
    try:
        return _WORDS in render(probes, row.tools, row)
    except BadRow:
        return False


def _probed_tools(tools: list[Any] | None) -> tuple[list[Any] | None, list[str]]:
    """The tools with other names."""
    if tools is None:
        return None, []
    probes, names = [], []
    for number, tool in enumerate(tools):
        name = _TOOL.format(number)
        function = tool.get("function")
        if isinstance(function, dict) and "name" in function:
            tool = tool | {"function": function | {"name": name}}
        elif "name" in tool:
            tool = tool | {"name": name}
        else:
            probes.append(tool)
            continue
        probes.append(tool)
        names.append(name)
    return probes, names


def _probed_calls(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """The messages with other names and arguments in their tool calls."""
    probes: list[Message] = []
    names: list[str] = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = message | {"tool_calls": [_probed_call(call, names) for call in calls]}
        probes.append(message)
    return probes, names


def _probed_call(call: Any, names: list[str]) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict):
        return call | {"function": _probed_call(function, names)}
    number = len(names)
    probe = dict(call)
    if "name" in call:
        probe["name"] = _CALL.format(number)
        names.append(probe["name"])
    arguments = {_KEY.format(number): "probed-value"}
    if call.get("arguments") and call["arguments"] != "{}":
        as_text = isinstance(call["arguments"], str)
        probe["arguments"] = json.dumps(arguments) if as_text else arguments
        names.append(_KEY.format(number))
    return probe
