"""Rows in the forms that the field uses -> `Row`. The form is read off the columns that a row has.

- `chosen`, `rejected`, with or without `prompt`: strings or messages; without a prompt, or with responses
  that repeat it, they are whole conversations (messages, or text with turns) and the prompt is what they have
  in common. Plain text needs a prompt: what two answers have in common by chance is none.
- `prompt`, `completion`, and `label` (kto) or not (sft).
- `messages` (sft): the last message is the response. `text` (sft): all of it is.

A pair may have a third answer, `gold`, and any row numbers (`rcpo.data.values`).

Nothing is changed silently: what does not fit is a `BadRow`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rcpo.data.conversations import (
    are_whole,
    as_messages,
    has_turns,
    is_asked,
    is_open,
    parse_prompt,
    parse_response,
    said,
    speaker,
    split_conversations,
    split_texts,
    without_prompt,
)
from rcpo.data.records import PAIRS, SFT, UNPAIRED, VALUES, BadRow, Content, Message, Row
from rcpo.data.values import read_values

FIELDS = (
    "prompt", "chosen", "rejected", "completion", "label", "messages", "text", "system", "tools",
    "chat_template_kwargs", "gold", *VALUES,
)  # fmt: skip
_KNOWN = frozenset(FIELDS)
_ANSWERS = frozenset(("chosen", "rejected", "completion", "messages"))  # each follows a prompt
COLUMNS = (*FIELDS, "first", "second", "judgment", "answers", "scores", "ranks", "tree")
"""What `data.columns` may name: the fields of a row, and what other forms of files are made of."""
_PROMPT_LIKE = re.compile("prompt|instruction|question|query|input|problem|request|task|context|user")
_MEDIA = frozenset(("images", "image", "videos", "video", "audios", "audio"))
_NO_MEDIA = ("[]", "null")  # JSON in cells of CSV
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_row(row: dict[str, Any]) -> Row:
    """A row with rcpo's own fields, and maybe others, in its one form; raises BadRow."""
    fields = {name: value for name, value in row.items() if name in _KNOWN}
    if not _MEDIA.isdisjoint(row) and (
        held := [name for name in row if name in _MEDIA and row[name] and row[name] not in _NO_MEDIA]
    ):
        raise BadRow(f"field {held[0]!r} is not empty, and rcpo trains on text alone")
    prompt: Content
    chosen: Content | None
    rejected: Content | None
    gold: Content | None = None
    if "chosen" in fields or "rejected" in fields:
        kind, (prompt, chosen, rejected) = PAIRS, _preference(fields, row)
        gold = _gold(fields, prompt)
    elif "completion" in fields:
        kind, (prompt, chosen, rejected) = _completion(fields)
    elif "messages" in fields:
        messages = as_messages(fields["messages"], "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadRow("messages do not end with an answer of the assistant")
        prompt, kind = messages[:-1], UNPAIRED if "label" in fields else SFT
        wanted = kind == SFT or _label(fields["label"])
        chosen, rejected = (messages[-1:], None) if wanted else (None, messages[-1:])
    elif "text" in fields:
        if fields.get("system"):
            raise BadRow("field 'text' is a whole text, to which field 'system' cannot be added")
        kind, prompt, chosen, rejected = SFT, "", _text(fields["text"], "text"), None
    else:
        known = ", ".join(map(repr, row)) or "none"
        told = "say what is in them with data.columns"
        if len(row) == 1 and _are_rows(next(iter(row.values()))):
            told = "its objects seem to be the rows; write that array alone to a .json file"
        raise BadRow(
            f"no field 'chosen', 'completion', 'messages' or 'text'; the columns are {known}: {told}"
        )
    prompt = _unmarked(prompt)
    if fields.get("system"):
        prompt, chosen, rejected, gold = _with_system(fields["system"], prompt, chosen, rejected, gold)
    prompt, chosen, rejected, gold = _alike(prompt, chosen, rejected, gold)
    numbers = read_values(fields)
    found = Row(kind, prompt, chosen, rejected, _tools(fields), _options(fields), gold, **numbers)
    _refuse_unusable(found, needs_prompt=not fields.keys().isdisjoint(_ANSWERS))
    return found


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects other than messages."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and speaker(value[0]) is None
    )


def as_conversation(row: Row) -> Row:
    """A row of text as messages, for a template: HH-RLHF's turns, or one question and answer.

    Text without a prompt (`text`) is not a conversation and stays as it is.
    """
    if not isinstance(row.prompt, str) or not row.prompt:
        return row
    prompt, chosen, rejected, gold = _as_turns(row.prompt, row.chosen, row.rejected, row.gold)
    return replace(row, prompt=prompt, chosen=chosen, rejected=rejected, gold=gold)


def _as_turns(prompt: str, *answers: Content | None) -> list[Any]:
    """A prompt of text as messages, and the answers to it, those that are text, as messages too."""
    read = parse_response if is_open(prompt) else _said_by_assistant
    return [parse_prompt(prompt), *(read(one) if isinstance(one, str) else one for one in answers)]


def _said_by_assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _preference(fields: dict[str, Any], row: Mapping[str, Any]) -> tuple[Content, Content, Content]:
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise BadRow(f"no field {name!r}{_likely_answer(name, row)}")
    chosen, rejected = (_content(fields[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one response is a string, the other a list of messages")
    if "prompt" not in fields:
        return _implicit(chosen, rejected, row)
    prompt = _content(fields["prompt"], "prompt")
    if isinstance(chosen, str) or isinstance(rejected, str):
        if isinstance(prompt, str) and has_turns(prompt):
            chosen, rejected = without_prompt(prompt, str(chosen), str(rejected))
        elif isinstance(prompt, str) and are_whole(str(chosen), str(rejected)):
            asked = prompt.strip()
            prompt, chosen, rejected = split_texts(str(chosen), str(rejected))
            if asked not in prompt:
                raise BadRow("the prompt is not in the conversations' common beginning")
        return prompt, chosen, rejected
    return _explicit(prompt, chosen, rejected)


def _implicit(chosen: Content, rejected: Content, row: Mapping[str, Any]) -> tuple[Content, Content, Content]:
    if not (isinstance(chosen, str) or isinstance(rejected, str)):
        return split_conversations(chosen, rejected)
    chosen, rejected = str(chosen), str(rejected)
    if has_turns(chosen) or has_turns(rejected):
        return split_texts(chosen, rejected)
    raise BadRow(f"no field 'prompt'{_likely_prompt(row)}")


def _unmarked(prompt: Content) -> Content:
    """A prompt without marks of answers that are not to be learned, as nothing of a prompt is."""
    if isinstance(prompt, str) or not any(message.get("train") is False for message in prompt):
        return prompt
    return [{key: part for key, part in message.items() if key != "train"} for message in prompt]


def _likely_prompt(row: Mapping[str, Any]) -> str:
    """Advice with the text column that may hold the prompt."""
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in FIELDS]
    talks = [name for name, value in row.items() if name not in FIELDS and _is_question(value)]
    named = [*talks, *(name for name in texts if _PROMPT_LIKE.search(name.lower()))]
    if named:
        return f"; name the column that holds it, such as data.columns.prompt={named[0]}"
    others = f"; the other columns of text are {', '.join(map(repr, texts))}" if texts else ""
    return (
        f"{others}; name the column that holds it (data.columns.prompt), or take it out of another one with "
        "a Jinja template"
    )


def _likely_answer(name: str, row: Mapping[str, Any]) -> str:
    """Advice with the columns that may hold the answer; none where the row has no other one."""
    others = [other for other, value in row.items() if isinstance(value, str | list) and other not in FIELDS]
    if not others:
        return ""
    return f"; name the column that holds it (data.columns.{name}): there are {', '.join(map(repr, others))}"


def _is_question(value: Any) -> bool:
    """Whether a value is a conversation that the assistant has not answered."""
    return isinstance(value, list) and bool(value) and speaker(value[-1]) not in (None, "assistant")


def _explicit(
    prompt: Content, chosen: list[Message], rejected: list[Message]
) -> tuple[Content, Content, Content]:
    """A prompt beside message lists: the answers alone, or whole conversations that repeat it."""
    answers = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if isinstance(prompt, str):
        if answers and not any(is_asked(prompt, message) for message in (*chosen, *rejected)):
            return [{"role": "user", "content": prompt}], chosen, rejected
        shared, chosen, rejected = split_conversations(chosen, rejected)
        if not any(is_asked(prompt, message) for message in shared):
            raise BadRow("the prompt is not in the conversations' common beginning")
        return shared, chosen, rejected
    count = len(prompt)
    repeated = [said(side[:count]) == said(prompt) for side in (chosen, rejected)]
    if all(repeated):
        return prompt, chosen[count:], rejected[count:]
    if prompt[-1]["role"] == "assistant" and answers and not any(repeated):
        raise BadRow("the prompt ends with an answer, which the responses do not repeat")
    if any(repeated) or not answers:
        raise BadRow("the conversations do not begin with the prompt's messages")
    return prompt, chosen, rejected


def _gold(fields: dict[str, Any], prompt: Content) -> Content | None:
    """A pair's third answer: by itself, or a whole conversation or text that begins with the pair's prompt.

    Files with columns give every row one, empty where the pair has none.
    """
    if fields.get("gold") in (None, "", []):
        return None
    gold = _content(fields["gold"], "gold")
    if isinstance(gold, str) and isinstance(prompt, str):
        if "prompt" in fields:
            return gold
        if not gold.startswith(prompt):
            raise BadRow("field 'gold' does not begin as the two responses do")
        return gold[len(prompt) :]
    if isinstance(gold, str) or gold[0]["role"] == "assistant":
        return gold
    if isinstance(prompt, str) or said(gold[: len(prompt)]) != said(prompt):
        raise BadRow("field 'gold' does not begin with the prompt's messages")
    return gold[len(prompt) :]


def _completion(fields: dict[str, Any]) -> tuple[str, tuple[Content, Content | None, Content | None]]:
    if "prompt" not in fields:
        raise BadRow("no field 'prompt'")
    prompt, completion = (_content(fields[name], name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(completion, list):
        repeats = said(completion[: len(prompt)]) == said(prompt)
        completion = completion[len(prompt) :] if repeats else completion
    elif isinstance(prompt, str) and isinstance(completion, str) and has_turns(prompt):
        [completion] = without_prompt(prompt, completion)
    if "label" not in fields:
        return SFT, (prompt, completion, None)
    wanted = _label(fields["label"])
    return UNPAIRED, (prompt, completion if wanted else None, None if wanted else completion)


def _label(value: Any) -> bool:
    """True: a wanted completion."""
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow("field 'label' is not true or false; explain its values with data.labels")
    return label


def _content(value: Any, name: str) -> Content:
    if isinstance(value, dict):  # one message
        _refuse_object(value, name)
        value = [value]
    elif isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        raise BadRow(
            f"field {name!r} is a list of texts; say which one to take, as data.columns.{name}='COLUMN[0]'"
        )
    return _text(value, name) if not isinstance(value, list) else as_messages(value, name)


def _refuse_object(value: Mapping[str, Any], name: str) -> None:
    """Raise BadRow for an object that is not a message, but has a part that may hold the text."""
    if speaker(value) is None and not isinstance(value.get("messages"), list):
        texts = [key for key, part in value.items() if isinstance(part, str)]
        if value and all(str(key).isdecimal() for key in value):
            raise BadRow(
                f"field {name!r} holds a whole column by row numbers, as pandas writes it; write rows: "
                'to_json(FILE, orient="records", lines=True)'
            )
        told = min(texts, key=lambda key: ("text" not in key, "content" not in key), default="KEY")
        raise BadRow(
            f"field {name!r} is an object without a role; name the part that holds the text, as "
            f"data.columns.{name}=COLUMN.{told}"
        )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else "a number" if type(value) in (int, float) else "another value"
        raise BadRow(f"field {name!r} is {found}, not a string or a list of messages")
    return value


def _alike(*parts: Content | None) -> list[Any]:
    """All parts as messages where one of them is: text beside messages is what its side said."""
    if not any(isinstance(part, list) for part in parts):
        return list(parts)
    roles = ("user", "assistant", "assistant", "assistant")
    return [
        [{"role": role, "content": part}] if isinstance(part, str) else part
        for role, part in zip(roles, parts, strict=True)
    ]


def _with_system(system: Any, prompt: Content, *answers: Content | None) -> list[Any]:
    """The prompt behind the row's own system message, and the answers; text becomes messages by it."""
    message = _system_message(system)
    parts: list[Any] = _as_turns(prompt, *answers) if isinstance(prompt, str) else [prompt, *answers]
    has_own = parts[0][0]["role"] == "system"
    if has_own and parts[0][0].get("content") != message["content"]:
        raise BadRow(
            "field 'system' differs from the conversation's own system message; to leave out the field: "
            '"data.columns.system=\'{{ \\"\\" }}\'"'
        )
    return [parts[0] if has_own else [message, *parts[0]], *parts[1:]]


def _system_message(system: Any) -> Message:
    """Text, typed parts, or a message under another name, as Gemini's systemInstruction."""
    if isinstance(system, list):
        system = {"content": system}
    if isinstance(system, dict):
        return as_messages([system | {"role": "system"}], "system")[0]
    return {"role": "system", "content": _text(system, "system")}


def _tools(fields: dict[str, Any]) -> list[Any] | None:
    """The functions as they are; Arrow files hold them as JSON text, for their parameters differ in type."""
    tools = _parsed(fields, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("field 'tools' is not a list of objects")
    return tools or None


def _parsed(fields: dict[str, Any], name: str) -> Any:
    """A field's value, or what its JSON text holds; None where there is none."""
    value = fields.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"field {name!r} is broken JSON") from error


def _options(fields: dict[str, Any]) -> dict[str, Any] | None:
    """What the row's template is to read besides, as TRL has it; Arrow gives every row the keys of all."""
    options = _parsed(fields, "chat_template_kwargs")
    if options is None:
        return None
    if not isinstance(options, dict):
        raise BadRow("field 'chat_template_kwargs' is not an object")
    return {name: value for name, value in options.items() if value is not None} or None


def _refuse_unusable(row: Row, *, needs_prompt: bool) -> None:
    parts = (row.prompt, row.chosen, row.rejected, row.gold)
    if any(_broken_unicode(part) for part in (*parts, row.tools, row.options)):
        raise BadRow("invalid Unicode: half of a surrogate pair")
    if needs_prompt and _is_empty(row.prompt):
        raise BadRow("empty prompt")
    for side, response in (("chosen", row.chosen), ("rejected", row.rejected), ("gold", row.gold)):
        if response is not None and _is_empty(response):
            raise BadRow("empty completion" if row.kind != PAIRS else f"empty {side} response")
        if isinstance(response, list) and response[0]["role"] != "assistant":
            raise BadRow("a response does not begin with a message of the assistant")
    if row.chosen == row.rejected:
        raise BadRow("identical responses")


def _is_empty(part: Content) -> bool:
    """Whether nothing is said, in text or in the messages' last one."""
    if isinstance(part, str):
        return not part.strip()
    if not part:
        return True
    content = part[-1].get("content") or ""
    return not content.strip() and not part[-1].get("tool_calls")


_SURROGATE = re.compile("[\ud800-\udfff]")


def _broken_unicode(value: Any) -> bool:
    """Whether any string in here holds half of a surrogate pair."""
    if isinstance(value, str):
        return not value.isascii() and _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_broken_unicode(key) or _broken_unicode(part) for key, part in value.items())
    return isinstance(value, list) and any(map(_broken_unicode, value))
