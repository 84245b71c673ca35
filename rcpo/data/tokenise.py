"""Text pairs -> token ids: prompt and responses apart, joined in token space, then cut to the limits.

Tokenised apart, no token can span the border between prompt and response, so the prompt's tokens are those
that generation is given, and those of both responses' prompts are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rcpo.data.limits import Limits, UnusablePair
from rcpo.data.records import Example, Spans, TextPair
from rcpo.data.report import Tally
from rcpo.data.templates import ChatTemplate
from rcpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # pairs a call of the tokenizer: its threads are busy, memory stays small
_ANCHORS = ("\n", "0", ".")


class PairTokeniser:
    """Turns `TextPair` into `Example` with one tokenizer and one set of limits.

    The tokenizer's opening tokens and its end-of-sequence token are put around the texts; `templated` gives
    one for texts that a template has opened and ended. Raises ConfigError for a tokenizer without an
    end-of-sequence token, whose responses would never end, and for limits that leave no room. It can be
    pickled; workers get it so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so no response could end; "
                "set eos_token in the tokenizer_config.json of model.path"
            )
        self.end: int = tokenizer.eos_token_id
        self.limits = limits or Limits()
        self._backend = _backend(tokenizer)
        self._opening = self._opening_tokens(tokenizer)
        self._separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end
        self._anchors = self._make_anchors(tokenizer)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._templated = self._ends_itself = False
        self._tail: list[int] = []
        self.limits.check(len(self._opening))

    def templated(self, template: ChatTemplate) -> PairTokeniser:
        """The same for pairs that `template` rendered."""
        other = copy.copy(self)
        other._templated = True
        other._ends_itself = template.frame.ends
        [other._tail] = self.ids([template.tail])
        if self._anchors:
            other._anchors = [(template.tail, other._tail), *self._anchors]
        return other

    def encode(self, pairs: Sequence[TextPair], tally: Tally) -> Iterator[Example]:
        """The examples of the usable pairs, in order; cuts and unusable pairs go to the tally."""
        for start in range(0, len(pairs), _BATCH):
            chunk = pairs[start : start + _BATCH]
            prompts = self.prompts([pair.prompt for pair in chunk])
            answers = [(pair.chosen, pair.rejected, pair.gold) for pair in chunk]
            texts = [text for answer in answers for text in answer if text is not None]
            responses = iter(self.responses(texts))
            for pair, prompt, answer in zip(chunk, prompts, answers, strict=True):
                own = [[] if text is None else next(responses) for text in answer]
                example = Example(pair.id, prompt, *own)
                if pair.contexts:
                    example = self._with_contexts(example, pair)
                try:
                    yield self._fit(example, tally)
                except UnusablePair as problem:
                    tally.bad.append((pair.id, str(problem)))

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Uncut prompts: what the tokenizer puts first (a BOS, or nothing) exactly once, then the text.

        A template has put that first itself. No text at all is opened by a BOS, or by what ends a document.
        """
        if self._templated:
            return self.ids(texts)
        opening, prompts = self._opening, self.ids(texts)
        if opening:
            prompts = [ids if ids[: len(opening)] == opening else opening + ids for ids in prompts]
        return [ids if ids or text else [self._separator] for ids, text in zip(prompts, texts, strict=True)]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Uncut responses: the text as it continues a prompt, then what ends it, exactly once."""
        found = self._continuations(texts)
        return found if self._ends_itself else [self._ended(ids) for ids in found]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._ends_itself or ids[-1:] == [self.end] else [*ids, self.end]

    def cut_prompt(self, ids: list[int]) -> list[int]:
        """A prompt within the limits; what opens it and, with a template, what opens the answer stay."""
        if self.limits.max_prompt_length is None or len(ids) <= self.limits.max_prompt_length:
            return ids
        opening = self._opening if ids[: len(self._opening)] == self._opening else []
        tail = self._tail if self._tail and ids[-len(self._tail) :] == self._tail else []
        return self.limits.cut_prompt(ids, len(opening), len(tail))

    @property
    def fast(self) -> bool:
        """Whether the tokenizer is the Rust one."""
        return isinstance(self._backend, FastBackend)

    def description(self) -> str:
        """All of the tokenizer that decides tokens, as text."""
        fixed = [self._opening, self.end, self._separator, sorted(self._special)]
        return f"{fixed} {self._backend.description()}"

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text as it is, special ones only where the text spells them."""
        return self._backend(texts)

    def spelled_special_tokens(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which responses hold a special token before their last, (n, parts − 1).

        tokens (T,), lengths (n, parts) of prompts and responses.
        """
        if not len(tokens) or not self._special:
            return np.zeros((len(lengths), lengths.shape[1] - 1), dtype=bool)
        table = np.zeros(max(int(tokens.max()), *self._special) + 1, dtype=bool)
        table[list(self._special)] = True
        before = np.concatenate([[0], np.cumsum(table[tokens])])
        ends = np.cumsum(lengths.ravel()).reshape(lengths.shape)
        starts = ends - lengths
        interior = before[np.maximum(ends - 1, starts)] - before[starts]
        return interior[:, 1:] > 0

    def _with_contexts(self, example: Example, pair: TextPair) -> Example:
        """The example with what it only reads tokenised apart from what it learns, as a prompt is."""
        contexts = {}
        for side, spans in (pair.contexts or {}).items():
            tokens, contexts[side] = self._in_pieces(getattr(pair, side), spans)
            example = replace(example, **{side: tokens})  # type: ignore[arg-type]
        return replace(example, contexts=contexts)

    def _in_pieces(self, text: str, spans: Spans) -> tuple[list[int], Spans]:
        """A response's tokens, and which of them are those of the parts `spans` of its text."""
        pieces: list[tuple[str, bool]] = []
        end = 0
        for first, after in (*spans, (len(text), len(text))):
            pieces += [(text[end:first], True), (text[first:after], False)]
            end = after
        pieces = [piece for piece in pieces if piece[0]]
        *others, last = self._continuations([piece for piece, _ in pieces])
        tokens: list[int] = []
        unlearned: list[tuple[int, int]] = []
        for ids, (_, learned) in zip([*others, self._ended(last)], pieces, strict=True):
            if not learned:
                unlearned.append((len(tokens), len(tokens) + len(ids)))
            tokens += ids
        return tokens, tuple(unlearned)

    def _fit(self, whole: Example, tally: Tally) -> Example:
        """The example within the limits; raises UnusablePair where nothing could be learned from it."""
        prompt = self.cut_prompt(whole.prompt)
        if not prompt:
            raise UnusablePair("prompt without a token")
        if [self.end] in whole.parts[1:]:
            raise UnusablePair("response without a token")
        responses = [self.limits.cut_response(part, len(prompt)) for part in whole.parts[1:]]
        if responses[0] == responses[1]:
            raise UnusablePair("both responses have the same tokens within data.max_length")
        tally.cut("prompts", len(whole.prompt) - len(prompt))
        for before, after in zip(whole.parts[1:], responses, strict=True):
            tally.cut("responses", len(before) - len(after))
        fitted = Example(whole.id, prompt, *responses)
        return fitted if whole.contexts is None else replace(fitted, contexts=_cut_contexts(whole, fitted))

    def _opening_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain = self.ids(["a"])[0]
        whole = tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return list(whole[:start])
        raise ConfigError(
            "the tokenizer changes a text's own tokens when it adds special ones; use another one"
        )

    def _make_anchors(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
        """Texts to put before a response, for tokenizers that put a space before every text (SentencePiece).

        Empty where the tokenizer does not: then a response is tokenised as it is.
        """
        once = self.ids(["a"])[0]
        if tokenizer.decode(once + once) == "aa":
            return []
        return list(zip(_ANCHORS, self.ids(_ANCHORS), strict=True))

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that follow another text, so without a space put before them."""
        if not self._anchors:
            return self.ids(texts)
        found: dict[int, list[int]] = {}
        for anchor, opening in self._anchors:
            missing = [place for place in range(len(texts)) if place not in found]
            for place, ids in zip(
                missing, self.ids([anchor + texts[place] for place in missing]), strict=True
            ):
                if ids[: len(opening)] == opening:  # else the text's first characters merged with the anchor
                    found[place] = ids[len(opening) :]
            if len(found) == len(texts):
                return [found[place] for place in range(len(texts))]
        lost = next(texts[place] for place in range(len(texts)) if place not in found)
        raise ConfigError(
            f"the tokenizer cannot continue a text with {lost[:40]!r} without merging the border"
        )


def _cut_contexts(whole: Example, cut: Example) -> dict[str, Spans]:
    """The contexts in responses that were cut; raises UnusablePair where a response learns nothing then."""
    found = {}
    for side, spans in (whole.contexts or {}).items():
        length = len(getattr(cut, side))
        kept = tuple((first, min(end, length)) for first, end in spans if first < length)
        if sum(end - first for first, end in kept) == length:
            raise UnusablePair("data.max_length leaves no answer to learn of a response with several turns")
        if kept:
            found[side] = kept
    return found


def _backend(tokenizer: PreTrainedTokenizerBase) -> FastBackend | SlowBackend:
    return FastBackend(tokenizer) if tokenizer.is_fast else SlowBackend(tokenizer)


class FastBackend:
    """The Rust tokenizer alone: it needs no transformers in a worker, and gives up on characters' offsets.

    It is the tokenizer's own, for a copy of a large vocabulary takes half a second. transformers sets what it
    needs before each of its calls, and so does this.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._split = bool(tokenizer.split_special_tokens)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._set().encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def description(self) -> str:
        return f"{self._split} {self._set().to_str()}"

    def _set(self) -> Any:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = self._split
        return self._tokenizer


class SlowBackend:
    """A tokenizer in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: Any = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def description(self) -> str:
        tokenizer = self._tokenizer
        return f"{type(tokenizer)} {tokenizer.init_kwargs} {sorted(tokenizer.get_vocab().items())}"
