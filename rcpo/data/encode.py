"""Pieces of files -> token arrays: parse, bring to one form, render, tokenise, cut. Runs in workers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np

from rcpo.data.columns import check_templates, is_template, rename
from rcpo.data.conversations import has_turns, is_open, parse_prompt, read_json_cells, said
from rcpo.data.detection import find_form, unread
from rcpo.data.formats import COLUMNS, as_conversation, read_row
from rcpo.data.forms import Form, FormOptions
from rcpo.data.judged import TIE_WEIGHT
from rcpo.data.readers import RowBlock
from rcpo.data.reasoning import named_reasoning
from rcpo.data.records import VALUES, BadRow, Content, Example, Row, Spans, TextPair, Unrendered
from rcpo.data.report import Tally
from rcpo.data.sample import Judged
from rcpo.data.store import PARTS, RESPONSES
from rcpo.data.templates import ChatTemplate
from rcpo.data.tokenise import PairTokeniser
from rcpo.data.turns import contexts
from rcpo.errors import ConfigError

_MADE = "15"  # counts changes of what is made of a row: tokens stored before one are made anew


@dataclass(frozen=True)
class Encoded:
    """The n usable rows of a piece, and what became of the others; places in the tally are row numbers.

    `numbers` (n,) int64 are the rows' numbers in their file, `tokens` (T,) int32 and `lengths` (n, 4) int32
    prompt, chosen, rejected and gold one after the other, `contexts` (m, 2) int64 places of tokens that are
    read but not learned, `prompts` (n,) uint64 hashes of the rows' prompts (`prompt_key`), `values` (n, 4)
    the rows' numbers (`VALUES`).
    """

    numbers: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    contexts: np.ndarray
    prompts: np.ndarray
    values: np.ndarray
    kinds: frozenset[str]
    tally: Tally

    def first(self, count: int) -> Encoded:
        """The first `count` usable rows, with the tally of all."""
        lengths = self.lengths[:count]
        kept = self.tokens[: int(lengths.sum())]
        return replace(
            self,
            numbers=self.numbers[:count],
            tokens=kept,
            lengths=lengths,
            contexts=self.contexts[self.contexts[:, 1] <= len(kept)],
            prompts=self.prompts[:count],
            values=self.values[:count],
        )


class Encoder:
    """All that decides which tokens a row becomes. `template` renders messages; text too if `always`."""

    def __init__(
        self,
        tokeniser: PairTokeniser,
        template: ChatTemplate | None = None,
        *,
        always: bool = False,
        columns: Mapping[str, str] | None = None,
        options: FormOptions | None = None,
    ) -> None:
        self.columns = dict(columns or {})
        for name in self.columns:
            if name not in COLUMNS:
                raise ConfigError(
                    f"data.columns.{name}: there is no such field; {', '.join(COLUMNS)} are known"
                )
        check_templates(self.columns)
        self.options = options or FormOptions()
        self.form: Form | None = None
        self.form_name = "rows"  # for the user
        self.template = template
        self._always = always
        self._plain = tokeniser
        self._chat = None if template is None else tokeniser.templated(template)

    @property
    def portable(self) -> bool:
        """Whether another process can have it: a tokenizer in Python may be of a module that it lacks."""
        return self._plain.fast

    def ingredients(self) -> dict[str, str]:
        """What tokens depend on besides the rows; short texts."""
        template = self.template
        known = None if template is None else [*dataclasses.astuple(template.undated), self._always]
        described = {
            "tokenizer": self._plain.description(),
            "limits": repr(self._plain.limits),
            "template": json.dumps(known, sort_keys=True, default=str),
            "columns": json.dumps(self.columns, sort_keys=True),
            "form": self.options.describe(),
            "made": _MADE,
        }
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in described.items()} | {
            name: metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")
        }

    def fitted(self, piece: RowBlock, place: str) -> Encoder:
        """The same for a file that begins with this piece: in the form that its columns have.

        Raises ConfigError for a column of `data.columns` that no row has, and for columns that leave open
        what they mean.
        """
        rows = []
        for _, value in piece.parsed():
            if isinstance(value, dict):
                with contextlib.suppress(BadRow):
                    rows.append((value, rename(read_json_cells(value), self.columns)))
        for name, spec in self.columns.items():
            if rows and not is_template(spec) and not any(name in renamed for _, renamed in rows):
                known = ", ".join(dict.fromkeys(column for row, _ in rows for column in row))
                raise ConfigError(f"data.columns.{name}={spec}: {place} has no such column; it has {known}")
        other = copy.copy(self)
        renamed_rows = [renamed for _, renamed in rows]
        other.form = find_form(renamed_rows, self.options, place)
        passed_over = [name or "a column without a name" for name in unread(other.form, renamed_rows)]
        other.form_name = other.form.name + (f"; not read: {', '.join(passed_over)}" if passed_over else "")
        return other

    def read(self, value: object) -> list[Row | BadRow]:
        """The rows that a row of the file holds, in their one form, and why one of them cannot be used."""
        try:
            if isinstance(value, BadRow):
                raise value
            if isinstance(value, list) and value and isinstance(value[0], dict):
                raise BadRow("an array of objects in one line; a file that holds one array is named .json")
            if not isinstance(value, dict):
                raise BadRow("not a JSON object")
            fields = rename(read_json_cells(value), self.columns)
            return [_row(row) for row in ([fields] if self.form is None else self.form.rows(fields))]
        except BadRow as problem:
            return [problem]

    def __call__(self, piece: RowBlock) -> Encoded:
        """Raise ConfigError for messages without a template, and for a system prompt without messages."""
        tally = Tally()
        found: list[_Found] = []
        texts: dict[bool, list[TextPair]] = {False: [], True: []}
        for number, value in piece.parsed():
            tally.counts["read"] += 1
            rows = self.read(value)
            tally.counts["left_out_ties"] += not rows
            tally.counts["compared"] += isinstance(self.form, Judged)
            for read in rows:
                try:
                    templated, row, pair = self.render(read, str(len(found)), tally.counts)
                except BadRow as problem:
                    tally.bad.append((str(number), str(problem)))
                    continue
                found.append(_Found(number, row))
                texts[templated].append(pair)
                tally.counts["templated"] += templated
                tally.counts["half_ties"] += len(rows) > 1 and row.weight == TIE_WEIGHT
        cuts = Tally()  # its places are those in `found`
        examples = [
            *self._plain.encode(texts[False], cuts),
            *(() if self._chat is None else self._chat.encode(texts[True], cuts)),
        ]
        tally.counts.update(cuts.counts)
        tally.bad += [(str(found[int(place)].number), reason) for place, reason in cuts.bad]
        tally.bad.sort(key=lambda place: int(place[0]))
        tally.counts["bad_rows"] = len({number for number, _ in tally.bad})
        examples.sort(key=lambda example: int(example.id))
        return self._arrays(examples, [found[int(example.id)] for example in examples], tally)

    def render(
        self, row: Row | BadRow, name: str, counts: Counter[str] | None = None
    ) -> tuple[bool, Row, TextPair]:
        """Whether a template is used, the row as a conversation if it is, and its text; raises BadRow.

        `counts` counts answers as `Tally` does.
        """
        if isinstance(row, BadRow):
            raise row
        if counts is not None:
            counts["repeated_prompts"] += _repeats_prompt(row)
        if self._always:
            row = as_conversation(row)
        if isinstance(row.prompt, str):
            if self.template is not None and self.template.system is not None:
                raise ConfigError(
                    "data.system_prompt needs messages, and the data is text: make them with "
                    "data.template=tokenizer, or with a named template"
                )
            answers = [_as_text(part) for part in (row.chosen, row.rejected, row.gold)]
            self._count_turns(row.prompt, answers, counts)
            return False, row, TextPair(name, row.prompt, *answers)
        template = self.template
        if template is None:
            raise ConfigError(
                "the data holds messages, and the tokenizer has no chat template; name one: data.template="
                "chatml|gemma|hermes|llama3|mistral|plain|zephyr, or a Jinja file"
            )
        try:
            return True, row, self._rendered(template, row, name, counts)
        except Unrendered as problem:
            raise BadRow(f"{problem}; {_other_template(row)}") from problem

    def _rendered(self, template: ChatTemplate, row: Row, name: str, counts: Counter[str] | None) -> TextPair:
        prompt = template.prompt(row)
        rendered: list[str | None] = []
        unlearned: dict[str, Spans] = {}
        every = self.options.learn == "all"
        for side in RESPONSES:
            answer: Content | None = getattr(row, side)
            if answer is None:
                rendered.append(None)
                continue
            text = template.response(prompt, row, answer, counts)
            rendered.append(text)
            if len(answer) > 1:
                unlearned[side] = contexts(template, row, answer, text, every=every)
                if counts is not None:
                    counts["longer_responses"] += 1
            template.refuse_other_marks(row, answer, text, unlearned.get(side, ()))
        return TextPair(name, prompt, *rendered, contexts=unlearned or None)

    def _count_turns(self, prompt: str, answers: Sequence[str | None], counts: Counter[str] | None) -> None:
        """Count answers with turns in their text; raises BadRow where every answer in them is wanted."""
        if not is_open(prompt):
            return
        found = sum(text is not None and has_turns(text) for text in answers)
        if found and self.options.learn == "all":
            raise BadRow(
                "a response holds turns as text, of which data.learn=all cannot tell the answers: "
                "data.template=tokenizer, or a named template, makes messages of them"
            )
        if counts is not None:
            counts["turns_as_text"] += found

    def prompt_ids(self, pair: TextPair, *, templated: bool) -> list[int]:
        """The uncut prompt of a rendered row."""
        return self._tokeniser(templated).prompts([pair.prompt])[0]

    def cut_prompt(self, ids: list[int], *, templated: bool) -> list[int]:
        """A prompt within the limits."""
        return self._tokeniser(templated).cut_prompt(ids)

    def answer_ids(self, value: object, name: str) -> tuple[list[int], list[int]]:
        """A row's prompt within the limits and its whole chosen response; raises BadRow."""
        templated, _, pair = self.render(self.read(value)[0], name)
        tokeniser = self._tokeniser(templated)
        prompt = self.cut_prompt(self.prompt_ids(pair, templated=templated), templated=templated)
        return prompt, [] if pair.chosen is None else tokeniser.responses([pair.chosen])[0]

    def _tokeniser(self, templated: bool) -> PairTokeniser:
        tokeniser = self._chat if templated else self._plain
        assert tokeniser is not None
        return tokeniser

    def _arrays(self, examples: Sequence[Example], found: Sequence[_Found], tally: Tally) -> Encoded:
        tokens, lengths, places = array("i"), array("i"), array("q")
        for example in examples:
            places.extend(example.context_places(len(tokens)))
            for part in example.parts:
                tokens.extend(part)
                lengths.append(len(part))
        encoded = Encoded(
            np.array([one.number for one in found], dtype=np.int64),
            np.frombuffer(tokens, dtype=np.int32) if tokens else np.zeros(0, np.int32),
            np.array(lengths, dtype=np.int32).reshape(-1, PARTS),
            np.array(places, dtype=np.int64).reshape(-1, 2),
            np.array([prompt_hash(prompt_key(one.row)) for one in found], dtype=np.uint64),
            np.array([one.row.values for one in found]).reshape(-1, len(VALUES)),
            frozenset(one.row.kind for one in found),
            tally,
        )
        spelled = self._plain.spelled_special_tokens(encoded.tokens, encoded.lengths)
        turns = (
            place for place, one in enumerate(examples) if one.contexts
        )  # between them the template does
        spelled[list(turns)] = False
        tally.counts["special_tokens"] += int(spelled.sum())
        return encoded


@dataclass(frozen=True)
class _Found:
    """A row in its one form, and the number of the file's row that it is, or is a part of."""

    number: int
    row: Row


def _row(fields: dict[str, Any]) -> Row | BadRow:
    try:
        return read_row(fields)
    except BadRow as problem:
        return problem


def _other_template(row: Row) -> str:
    """A template of rcpo's that renders a row which the chosen one does not."""
    parts = (row.prompt, row.chosen, row.rejected, row.gold)
    messages = [message for part in parts if isinstance(part, list) for message in part]
    answers = [message for part in parts[1:] if isinstance(part, list) for message in part]
    more = " with data.reasoning=strip" if any(map(named_reasoning, answers)) else ""
    if row.tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return f"data.template=hermes{more} renders tools, calls, and results"
    return f"data.template=chatml{more} renders any roles"


def _repeats_prompt(row: Row) -> bool:
    """Whether the responses are text that begins with the whole prompt, as files of whole texts have it."""
    answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
    prompt = row.prompt
    return (
        isinstance(prompt, str)
        and bool(prompt.strip())
        and all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers)
    )


def _as_text(part: Content | None) -> str | None:
    return None if part is None else str(part)


def prompt_key(row: Row) -> str:
    """What makes two rows' prompts the same: the words and roles in the file, whatever renders them.

    Text with turns and the messages that it is read as are the same prompt, and so are a single message of
    the user and its text. What else a message holds, such as a time or an id, makes no other prompt of it.
    Text without a prompt (`text`) is its own.
    """
    prompt = row.prompt or row.chosen or row.rejected or ""
    try:
        messages = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    except BadRow:  # text before its first turn
        return str(prompt)
    words = said(messages)
    if len(words) == 1 and words[0].keys() == {"role", "content"} and words[0]["role"] == "user":
        content = words[0]["content"]
        if isinstance(content, str):
            return content
    return json.dumps(words, sort_keys=True, ensure_ascii=False, default=str)


def prompt_hash(prompt: str) -> int:
    """64 bits that stand for a prompt's key: of a million distinct ones two are alike with 3 in 10⁸."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
