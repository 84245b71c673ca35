"""Text pairs -> token ids: prompt and responses apart, joined in token space, then cut to the limits.

Tokenised apart, no token can span the border between prompt and response, so the prompt's tokens are those
that generation is given, and those of both responses' prompts are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rcpo.config import ConfigError
from rcpo.data.records import Example, TextPair
from rcpo.data.report import DataReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # pairs a call of the tokenizer: its threads are busy, memory stays small
_ANCHORS = ("\n", "0", ".")


class UnusablePair(ValueError):
    """Why a pair has nothing to learn from once it is tokenised and cut."""


class PairTokeniser:
    """Turns `TextPair` into `Example` with one tokenizer and one set of limits (tokens; None is no limit).

    Raises ConfigError for a tokenizer without an end-of-sequence token, whose responses would never end, and
    for limits that leave no room.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so no response could end; "
                "set eos_token in the tokenizer_config.json of model.path"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self._prefix = self._opening_tokens()
        self._anchors = self._make_anchors()
        if max_prompt_length is not None and max_prompt_length <= len(self._prefix):
            raise ConfigError(
                f"data.max_prompt_length={max_prompt_length} leaves no token for the prompt after the "
                f"{len(self._prefix)} that the tokenizer puts first; raise it"
            )

    def encode(self, pairs: Sequence[TextPair], report: DataReport) -> Iterator[Example]:
        """The examples of the usable pairs, in order; cuts and unusable pairs go to the report."""
        for start in range(0, len(pairs), _BATCH):
            chunk = pairs[start : start + _BATCH]
            prompts = self.prompts([pair.prompt for pair in chunk])
            chosen = self.responses([pair.chosen for pair in chunk])
            rejected = self.responses([pair.rejected for pair in chunk])
            for pair, *parts in zip(chunk, prompts, chosen, rejected, strict=True):
                try:
                    yield self._fit(Example(pair.id, *parts), report)
                except UnusablePair as problem:
                    report.bad(str(problem), pair.id)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Uncut prompts: what the tokenizer puts first (a BOS, or nothing) exactly once, then the text."""
        opening = self._prefix
        return [ids if ids[: len(opening)] == opening else opening + ids for ids in self._ids(texts)]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Uncut responses: the text as it continues a prompt, then the end-of-sequence token exactly once."""
        end = self.tokenizer.eos_token_id
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in self._continuations(texts)]

    def cut_prompt(self, ids: list[int]) -> list[int]:
        """A prompt within `max_prompt_length`: the opening tokens stay, then its end."""
        if self.max_prompt_length is None or len(ids) <= self.max_prompt_length:
            return ids
        opening = len(self._prefix)
        return ids[:opening] + ids[len(ids) - (self.max_prompt_length - opening) :]

    def _fit(self, whole: Example, report: DataReport) -> Example:
        """The example within the limits; raises UnusablePair where nothing could be learned from it."""
        prompt, chosen, rejected = self.cut_prompt(whole.prompt), whole.chosen, whole.rejected
        if not prompt:
            raise UnusablePair("prompt without a token")
        if len(chosen) == 1 or len(rejected) == 1:  # the end-of-sequence token alone
            raise UnusablePair("response without a token")
        if self.max_length is not None:
            room = self.max_length - len(prompt)
            if room < 1:
                raise UnusablePair("prompt leaves no room for a response within data.max_length")
            chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:
            raise UnusablePair("both responses have the same tokens within data.max_length")
        report.truncated_prompts += len(prompt) < len(whole.prompt)
        report.truncated_responses += len(chosen) < len(whole.chosen)
        report.truncated_responses += len(rejected) < len(whole.rejected)
        return Example(whole.id, prompt, chosen, rejected)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _opening_tokens(self) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain = self._ids(["a"])[0]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        raise ConfigError(
            "the tokenizer changes a text's own tokens when it adds special ones; use another one"
        )

    def _make_anchors(self) -> list[tuple[str, list[int]]]:
        """Texts to put before a response, for tokenizers that put a space before every text (SentencePiece).

        Empty where the tokenizer does not: then a response is tokenised as it is.
        """
        once = self._ids(["a"])[0]
        if self.tokenizer.decode(once + once) == "aa":
            return []
        return list(zip(_ANCHORS, self._ids(_ANCHORS), strict=True))

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that follow another text, so without a space put before them."""
        if not self._anchors:
            return self._ids(texts)
        found: dict[int, list[int]] = {}
        for anchor, opening in self._anchors:
            missing = [place for place in range(len(texts)) if place not in found]
            for place, ids in zip(
                missing, self._ids([anchor + texts[place] for place in missing]), strict=True
            ):
                if ids[: len(opening)] == opening:  # else the text's first characters merged with the anchor
                    found[place] = ids[len(opening) :]
            if len(found) == len(texts):
                return [found[place] for place in range(len(texts))]
        lost = next(texts[place] for place in range(len(texts)) if place not in found)
        raise ConfigError(
            f"the tokenizer cannot continue a text with {lost[:40]!r} without merging the border"
        )
