"""One call of a chat template: transformers' own rendering, with a fixed date."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

from rcpo.data.records import Message, Spans, Unrendered
from rcpo.system.text import first_line

# what the sandbox and a template's own arithmetic raise for a conversation that it was not written for
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def reads_date(source: str) -> bool:
    """Whether a template writes today's date, as those of Llama 3.2, GPT-OSS and SmolLM3 do."""
    return "strftime_now" in source


def fix_date(source: str, day: date) -> None:
    """Make `day` today for this template in this process, wherever transformers renders it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    moment = datetime.combine(day, time())
    # the compiled template is transformers' own cached one; its globals are its alone
    _compile_jinja_template(source).globals["strftime_now"] = moment.strftime


@cache
def reserved() -> frozenset[str]:
    """Names that mean something to the rendering functions themselves, so that no template can read them."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | {"messages"}) - {"documents", "kwargs"}


def render(
    source: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    day: date,
    *,
    generate: bool,
) -> str:
    """The text of a conversation, with the generation prompt if `generate`; raises Unrendered."""
    return _call(source, messages, tools, variables, day, add_generation_prompt=generate)[0]


def render_marked(
    source: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    day: date,
) -> tuple[str, Spans]:
    """The text of a finished conversation, and what `{% generation %}` marks in it; raises Unrendered."""
    return _call(source, messages, tools, variables, day, return_assistant_tokens_mask=True)


def _call(
    source: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    day: date,
    **how: bool,
) -> tuple[str, Spans]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        if reads_date(source):
            fix_date(source, day)
        [text], marked = render_jinja_template(
            [list(messages)], tools=tools, chat_template=source, **how, **variables
        )
    except (TemplateError, *_FAILURES) as error:
        # a template may quote the data, which may hold characters that are not printable
        reason = first_line(error)[:200]
        raise Unrendered(f"the chat template refuses the conversation: {reason}") from error
    return str(text), tuple((first, end) for first, end in marked[0]) if marked else ()
