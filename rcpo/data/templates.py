"""Chat templates: messages -> the text of a prompt and of its responses, cut where generation begins.

A template is Jinja, rendered as transformers does. The prompt is what generation is given. The response is
what the model should generate then: what the template writes for the answer, up to and with the end of the
turn. Where a finished conversation renders differently from the prompt, what the template writes around an
answer is known from probes (`rcpo.data.frames`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.data.frames import ANSWER, NO_FRAME, QUESTION, REASON, WORDS, Frame, find_frame, generation_start
from rcpo.data.marks import Marks, compare, has_marks
from rcpo.data.reasoning import closed_at_end, opened_at_end, split_reasoning
from rcpo.data.records import SFT, BadRow, Content, Message, Row, Spans, Unrendered
from rcpo.data.rendered import is_said, refuse_unrendered, refuse_unrendered_calls
from rcpo.data.rendering import reads_date, render, render_marked, reserved
from rcpo.errors import ConfigError
from rcpo.system.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"  # data.template: the tokenizer's own, for rows of text too
KEEP, STRIP, EMPTY = "keep", "strip", "empty"  # data.reasoning


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what it needs: `name` for messages, Jinja `source` (`tool_source` for rows with tools),
    `special` tokens and `options` that it may read, `system` a system message for conversations without one,
    `day` for templates that write today's date, `reasoning` what becomes of the reasoning before an answer,
    `frame` and `marks` what probes found.
    """

    name: str
    source: str
    tool_source: str
    special: Mapping[str, str]
    options: Mapping[str, Any]
    system: str | None
    day: date
    reasoning: str = KEEP
    frame: Frame = NO_FRAME
    marks: Marks | None = None

    @property
    def reads_date(self) -> bool:
        """Whether what it renders depends on `day`."""
        return reads_date(self.source) or reads_date(self.tool_source)

    @property
    def undated(self) -> ChatTemplate:
        """The same on a fixed day unless the day matters: all that decides what it renders."""
        return self if self.reads_date else replace(self, day=date.min)

    def notes(self) -> list[str]:
        """What to tell the user about the template's prompts and marks, if anything."""
        found = (self._prompt_note(), None if self.marks is None else self.marks.note())
        return [note for note in found if note is not None]

    def _prompt_note(self) -> str | None:
        """How prompts differ from the beginnings of finished conversations, if they do."""
        frame = self.frame
        if frame.opening:
            how = {
                KEEP: "the answer's own reasoning follows it",
                EMPTY: "the response closes it at once",
                STRIP: "prompts end before it",
            }[self.reasoning]
            return f"generation begins with {frame.opening!r}; data.reasoning={self.reasoning}: {how}"
        if frame.surplus:
            return f"prompts end with {frame.surplus!r}, which finished conversations do not show"
        return None

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends a learned turn."""
        if not self.frame.ends:
            assert isinstance(tokenizer.eos_token_id, int)
            return tokenizer.eos_token_id
        return int(tokenizer(self.frame.ending, add_special_tokens=False)["input_ids"][-1])

    @property
    def tail(self) -> str:
        """What follows the last question in a prompt: the end of its turn and the generation prompt."""
        return self.frame.tail[: len(self.frame.tail) - len(self.left_out)]

    @property
    def left_out(self) -> str:
        """The end of the generation prompt that prompts lack: with `strip`, the opened block of thoughts."""
        return self.frame.opening if self.reasoning == STRIP else ""

    def prompt(self, row: Row) -> str:
        """What generation is given; raises BadRow where the template refuses or leaves out a message."""
        messages = self.with_system(_messages(row.prompt))
        text = self._render(messages, row, generate=True)
        refuse_unrendered(text, messages, row, self._renders_prompt)
        return text.removesuffix(self.left_out)

    def response(self, prompt: str, row: Row, answer: Content, counts: Counter[str] | None = None) -> str:
        """The text of an answer to a row's rendered `prompt`, up to and with the end of the turn.

        `counts` counts answers that the finished conversation renders differently (`rendered_otherwise`).
        Raise BadRow where it is not clear what the model should generate.
        """
        messages = self.spoken(answer)
        if self.reasoning == KEEP and closed_at_end(prompt) and split_reasoning(messages[0])[0] is not None:
            raise BadRow(
                "the generation prompt closes its block of thoughts, and the answer has reasoning: "
                "data.reasoning=strip leaves it out; data.template_options may open the block (as "
                "enable_thinking: true)"
            )
        calls = any(message.get("tool_calls") for message in messages)
        if self.frame.opening and (self.reasoning == STRIP or prompt.endswith(self.frame.opening)):
            text, otherwise = self._behind_opening(prompt, row, messages)
        else:
            whole = self.conversation(row, messages)
            text, otherwise = self._after(prompt.removesuffix(self.frame.surplus), row, whole)
            if self.frame.surplus.isspace() and self.frame.lead.isspace():
                text = text.removeprefix(self.frame.lead)
        if calls:
            refuse_unrendered_calls(messages, lambda probes: self.conversation(row, probes))
        if not is_said(messages[-1], text):  # `rcpo.data.turns` looks at those before it
            text, otherwise = self._literal(messages), True
        if not text[: len(text) - len(self.frame.ending)].strip():
            if self.reasoning != KEEP and split_reasoning(_messages(answer)[-1])[0] is not None:
                raise BadRow("the answer is reasoning alone, which data.reasoning=keep learns")
            raise Unrendered("the template leaves the response empty")
        if otherwise and counts is not None:
            counts["rendered_otherwise"] += 1
        return text

    def conversation(self, row: Row, answer: Content) -> str:
        """A row's prompt and an answer to it, as the template renders them together."""
        messages = [*self.with_system(_messages(row.prompt)), *_messages(answer)]
        return self._render(messages, row, generate=False)

    def spoken(self, answer: Content) -> list[Message]:
        """An answer's messages, without reasoning where none is to be learned."""
        messages = _messages(answer)
        return messages if self.reasoning == KEEP else [_unreasoned(message) for message in messages]

    def finished(self, row: Row, answer: Content) -> str:
        """A row's prompt and an answer to it, up to and with the end of the last turn."""
        return self._ended(self.conversation(row, answer))

    def refuse_other_marks(self, row: Row, answer: Content, text: str, contexts: Spans) -> None:
        """Raise BadRow where the template marks other parts of a rendered answer than those that are learned.

        `contexts` are the parts of `text` that are not. An answer's own text, where the template renders it
        differently, has no marks.
        """
        if self.marks is None or not has_marks(self.source_for(row)):
            return
        messages = [*self.with_system(_messages(row.prompt)), *self.spoken(answer)]
        whole, marked = render_marked(
            self.source_for(row), messages, row.tools, self.variables(row), self.day
        )
        finished = self._ended(whole)
        start = len(finished) - len(text)
        if not finished.endswith(text):
            return
        edges = [0, *chain.from_iterable(contexts), len(text)]
        learned = [(start + a, start + b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        self.marks.refuse_others(marked, learned)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation behind the template's system message, unless it has its own."""
        if self.system is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def variables(self, row: Row) -> dict[str, Any]:
        """What the template may read besides messages and tools; raises BadRow for a row's own misuse."""
        for name in row.options or {}:
            if name in reserved():
                raise BadRow(f"field 'chat_template_kwargs' holds {name!r}, which no template reads")
        return {**self.special, **self.options, **(row.options or {})}

    def source_for(self, row: Row) -> str:
        """The Jinja text for a row, with tools or without."""
        return self.source if row.tools is None else self.tool_source

    def probe(self, row: Row, messages: Sequence[Message], generate: bool) -> str:
        """Messages in the place of a row's own, rendered; raises BadRow."""
        return self._render(self.with_system(messages), row, generate=generate)

    def _render(self, messages: Sequence[Message], row: Row, *, generate: bool) -> str:
        return render(
            self.source_for(row), messages, row.tools, self.variables(row), self.day, generate=generate
        )

    def _renders_prompt(self, messages: Sequence[Message], tools: list[Any] | None, row: Row) -> str:
        return self._render(messages, replace(row, tools=tools), generate=True)

    def _behind_opening(self, prompt: str, row: Row, messages: list[Message]) -> tuple[str, bool]:
        """The response where generation begins inside a block of thoughts that no finished turn shows."""
        frame, (first, *others) = self.frame, messages
        reasoning, plain = split_reasoning(first)
        if self.reasoning == STRIP:
            text, otherwise = self._after(prompt, row, self.conversation(row, messages))
            return text.removeprefix(frame.opening), otherwise
        if self.reasoning == KEEP and reasoning is None:
            raise BadRow(
                "generation begins with an opened block of thoughts, and the answer has none: "
                "data.reasoning=empty closes the block at once, data.reasoning=strip leaves it out"
            )
        marked = REASON if reasoning is None else reasoning
        base = prompt.removesuffix(frame.opening)
        whole = self.conversation(row, [plain | {"reasoning_content": marked}, *others])
        begun = next((begun for begun in (prompt, base) if whole.startswith(begun + marked)), None)
        if begun is not None:
            text, otherwise = self._ended(whole[len(begun + marked) :]), False
        else:
            text, _ = self._after(base, row, self.conversation(row, [plain, *others]))
            text, otherwise = frame.close + text.removeprefix(frame.opening), True
        return (text if reasoning is None else reasoning + text), otherwise

    def _after(self, base: str, row: Row, whole: str) -> tuple[str, bool]:
        """What a finished conversation says after `base`, and whether it begins differently."""
        if whole.startswith(base):
            return self._ended(whole[len(base) :]), False
        around = self.frame.lead + WORDS + self.frame.closing
        probed = self.conversation(row, [ANSWER])
        head = probed.removesuffix(around)
        if head == probed or not whole.startswith(head):
            start = generation_start(base, whole, self.frame)
            if start is not None:  # earlier turns lack the prompt's block of thoughts, which `lead` closes
                lead = self.frame.lead if opened_at_end(base[start:]) else ""
                return lead + self._ended(whole[start:]), True
            raise Unrendered("the template renders the answer elsewhere than where generation would begin")
        return self._ended(whole[len(head) :]), True

    def _ended(self, text: str) -> str:
        """A rendered answer up to and with the end of its turn."""
        frame = self.frame
        if text.endswith(frame.closing):
            return text[: len(text) - len(frame.closing)] + frame.ending
        text = text.rstrip()  # as after a tool call, which may end otherwise
        if frame.ends and not any(text.endswith(token) for token in frame.ends_of_turns):
            raise Unrendered("the template does not close the response as it closes an answer")
        return text

    def _literal(self, messages: Sequence[Message]) -> str:
        """An answer's own text and the end of its turn, where the template changes what it says."""
        frame, (message, *others) = self.frame, messages
        reasoning, plain = split_reasoning(message)
        content = message.get("content")
        if others or message.get("tool_calls") or not isinstance(content, str):
            raise Unrendered("the template leaves out a part of the answer")
        if reasoning is not None and plain.get("content") == content:
            raise BadRow(
                "the template does not render the answer's reasoning; data.reasoning=strip removes it from "
                "the answers"
            )
        return frame.lead + content + frame.ending


def _unreasoned(message: Message) -> Message:
    return split_reasoning(message)[1] if message["role"] == "assistant" else message


def _messages(content: Content) -> list[Message]:
    assert not isinstance(content, str), "text has no template"
    return content


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    wanted: str | None,
    options: Mapping[str, Any],
    system: str | None,
    *,
    reasoning: str = KEEP,
    day: date | None = None,
) -> ChatTemplate | None:
    """The template that `data.template` names, probed; None where the tokenizer has none and none is named.

    `day` None is today. Raises ConfigError for a name that does not exist and for a template that cannot be
    used.
    """
    sources = template_sources(tokenizer, wanted)
    if sources is None:
        if system is None:
            return None
        raise ConfigError(
            "data.system_prompt needs a chat template, and the tokenizer has none; " + _choices()
        )
    for name in options:
        if name in reserved():
            raise ConfigError(f"data.template_options.{name}: no template reads this name; remove it")
    name, source, tool_source = sources
    special = dict(tokenizer.special_tokens_map)
    day = day or date.today()
    template = ChatTemplate(name, source, tool_source, special, dict(options), system, day, reasoning)
    template, row = _framed(template, tokenizer)
    return replace(template, marks=_marks(template, row))


def template_sources(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> tuple[str, str, str] | None:
    """Name, Jinja text, and that for rows with tools; None where none is named and the tokenizer has none.

    Raises ConfigError for a template that is not there.
    """
    if wanted is not None and wanted != OWN:
        source = _source(wanted)
        return wanted, source, source
    if tokenizer.chat_template:
        try:
            own = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        except ValueError as error:  # several by name, none of which is the default
            raise ConfigError(
                f"the tokenizer has chat templates ({', '.join(tokenizer.chat_template)}), and none is named "
                f"default; {_choices()}"
            ) from error
        return "the tokenizer's own", *own
    if wanted is None:
        return None
    raise ConfigError("data.template=tokenizer: the tokenizer has no chat template; " + _choices())


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


def _framed(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[ChatTemplate, Row]:
    """The template with what it writes around an answer, and the kind of row that it was probed with.

    A template for rows with tools alone is probed with one.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    problems = []
    for tools in (None, [_TOOL]):
        row = Row(SFT, [], None, None, tools)
        try:
            frame = find_frame(partial(template.probe, row), special, tokenizer.eos_token)
            return replace(template, frame=frame), row
        except BadRow as problem:
            problems.append(problem)
    reason = str(problems[0])
    raise ConfigError(f"data.template ({template.name}): {reason}{_remedy(reason)}") from problems[0]


def _marks(template: ChatTemplate, row: Row) -> Marks | None:
    """How the template's marks differ from an answer; None where it has none."""
    source = template.source_for(row)
    if not has_marks(source):
        return None
    asked = replace(row, prompt=[QUESTION])
    prompt = template.probe(row, [QUESTION], True)
    messages = template.with_system([QUESTION, ANSWER])
    whole, marked = render_marked(source, messages, row.tools, template.variables(row), template.day)
    finished = template.finished(asked, [ANSWER])
    start = generation_start(prompt, finished, template.frame)
    found = None if start is None else compare(whole, marked, (start, len(finished)))
    if found is None:
        raise ConfigError(
            f"data.template ({template.name}): its {{% generation %}} does not mark the answer; give a "
            "template that marks each answer and the end of its turn, or one without marks, such as "
            "data.template=chatml"
        )
    return found


_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def _remedy(reason: str) -> str:
    """What to do about a template that cannot be used, as far as its reason does not tell."""
    if "data." in reason:
        return ""
    name = reason.rpartition("refuses the conversation: '")[2].removesuffix("' is undefined")
    if not name.isidentifier():
        return "; give another template, such as data.template=chatml"
    value = '""' if name.endswith("_token") else "..."
    return f"; the tokenizer has none: give it as data.template_options={{{name}: {value}}}"
