"""Chat templates: messages -> the text of a prompt and of its responses, cut where generation begins.

A template is Jinja, rendered as transformers does. What it writes around an answer is learned from probes:
the text that opens the answer (the generation prompt) belongs to the prompt, and of the text that closes it
the response keeps what ends a turn. Both are checked on every row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config import ConfigError
from rcpo.data.records import SFT, BadRow, Content, Message, Row
from rcpo.visible import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"  # data.template: the tokenizer's own, for rows of text too
_QUESTION: Message = {"role": "user", "content": "What is a probe?"}
_OTHER: Message = {"role": "user", "content": "Another question"}
_WORDS = "probed-answer"
_ANSWER: Message = {"role": "assistant", "content": _WORDS}


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what it needs: `name` for messages, Jinja `source` (`tool_source` for rows with tools),
    `special` tokens and `options` that it may read, `system` a system message for conversations without one.

    `closing` is what follows an answer, of which `ending` is kept: all up to the first special token, the
    end of the turn, if it `ends` with one. `tail` is what follows the last question: the end of
    its turn and the generation prompt.
    """

    name: str
    source: str
    tool_source: str
    special: Mapping[str, str]
    options: Mapping[str, Any]
    system: str | None
    closing: str = ""
    ending: str = ""
    ends: bool = False
    tail: str = ""

    def prompt(self, row: Row) -> str:
        """What generation is given; raises BadRow where the template refuses the conversation."""
        return self._render(self.with_system(_messages(row.prompt)), row, generate=True)

    def response(self, prompt: str, row: Row, answer: Content) -> str:
        """The text of an answer to a row's rendered `prompt`, up to and with the end of the turn.

        Raises BadRow where the template renders the answer elsewhere than where generation would begin.
        """
        whole = self.conversation(row, answer)
        if not whole.startswith(prompt):
            raise BadRow("the template renders the answer elsewhere than where generation would begin")
        if not whole.endswith(self.closing) or len(whole) < len(prompt) + len(self.closing):
            raise BadRow("the template does not close the response as it closes an answer")
        text = whole[len(prompt) : len(whole) - len(self.closing)]
        if not text.strip():
            raise BadRow("the template leaves the response empty")
        return text + self.ending

    def conversation(self, row: Row, answer: Content) -> str:
        """A row's prompt and an answer to it, as the template renders them together."""
        return self._render(
            [*self.with_system(_messages(row.prompt)), *_messages(answer)], row, generate=False
        )

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation behind the template's system message, unless it has its own."""
        if self.system is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def _render(self, messages: list[Message], row: Row, *, generate: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], _ = render_jinja_template(
                [messages],
                tools=row.tools,
                chat_template=self.source_for(row),
                add_generation_prompt=generate,
                **{**self.special, **self.options, **(row.options or {})},
            )
        except (TemplateError, TypeError) as error:  # what it raises itself, and text that is no text
            # a template may quote the data, which is no text to print as it is
            reason = first_line(error)[:200]
            raise BadRow(f"the chat template refuses the conversation: {reason}") from error
        return str(text)

    def source_for(self, row: Row) -> str:
        """The Jinja text for a row, with tools or without."""
        return self.source if row.tools is None else self.tool_source


def _messages(content: Content) -> list[Message]:
    assert not isinstance(content, str), "text has no template"
    return content


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    wanted: str | None,
    options: Mapping[str, Any],
    system: str | None,
) -> ChatTemplate | None:
    """The template that `data.template` names, probed; None where the tokenizer has none and none is named.

    Raises ConfigError for a name that does not exist and for a template that cannot be used.
    """
    if wanted is None or wanted == OWN:
        if not tokenizer.chat_template:
            if wanted is None and system is None:
                return None
            if wanted is None:
                raise ConfigError(
                    "data.system_prompt needs a chat template, and the tokenizer has none; " + _choices()
                )
            raise ConfigError("data.template=tokenizer: the tokenizer has no chat template; " + _choices())
        name = "the tokenizer's own"
        source = tokenizer.get_chat_template()
        tool_source = tokenizer.get_chat_template(tools=[{}])
    else:
        name, source = wanted, _source(wanted)
        tool_source = source
    special = dict(tokenizer.special_tokens_map)
    template = ChatTemplate(name, source, tool_source, special, dict(options), system)
    return _probed(template, tokenizer)


def named_templates() -> list[str]:
    """The templates that come with rcpo."""
    folder = resources.files("rcpo") / "assets" / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir())


def _source(wanted: str) -> str:
    if os.sep in wanted or wanted.endswith((".jinja", ".jinja2")):
        try:
            return Path(wanted).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template={wanted} cannot be read: {first_line(error)}") from error
    if wanted not in named_templates():
        raise ConfigError(f"data.template={wanted}: there is no such template; " + _choices())
    return (resources.files("rcpo") / "assets" / "templates" / f"{wanted}.jinja").read_text(encoding="utf-8")


def _choices() -> str:
    return f"give data.template={'|'.join(named_templates())} or a Jinja file"


def _probed(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template with its closing, ending and tail, read off a question with a known answer."""
    try:
        prompt, other = (
            template.prompt(Row(SFT, [question], None, None)) for question in (_QUESTION, _OTHER)
        )
        whole = template.conversation(Row(SFT, [_QUESTION], None, None), [_ANSWER])
    except BadRow as problem:
        raise ConfigError(f"data.template ({template.name}): {problem}") from problem
    if not whole.startswith(prompt) or _WORDS not in whole[len(prompt) :]:
        raise ConfigError(
            f"data.template ({template.name}) renders an answer elsewhere than where generation would begin: "
            f"after {prompt[-40:]!r} it goes on {whole[max(0, len(prompt) - 40) :][:80]!r}; "
            "set what it reads in data.template_options (as enable_thinking: false), or give another template"
        )
    closing = whole.rpartition(_WORDS)[2]
    tail = prompt[len(prompt) - _common_suffix(prompt, other) :]
    ending, ends = _ending(closing, tokenizer)
    return replace(template, closing=closing, ending=ending, ends=ends, tail=tail)


def _common_suffix(one: str, other: str) -> int:
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ending(closing: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """`closing` up to and with its first special token, after which nothing is ever generated, and whether
    there is one. Without, its white space at the end goes: the end-of-sequence token follows.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [(closing.find(token), -len(token)) for token in special if token and token in closing]
    if not ends:
        return closing.rstrip(), False
    start, length = min(ends)
    return closing[: start - length], True
