"""Answers to prompts, from this machine's ranks or an OpenAI-compatible endpoint, kept as they arrive."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config.onpolicy import SampleConfig
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.evaluation.answers import own_stop_ids, positions_of
from rcpo.evaluation.asking import Asking, Request
from rcpo.evaluation.endpoint import CHAT, TEXT, Endpoint, Reply
from rcpo.evaluation.generation import Decoding, generate
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_whole
from rcpo.onpolicy.kept import Kept, Row
from rcpo.onpolicy.progress import Progress
from rcpo.onpolicy.prompts import Prompt, Prompts
from rcpo.onpolicy.ranks import make_rows, nothing_lacks, on_main_or_refused
from rcpo.system import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "answers"
# why an endpoint's answer ended before its end: its longest length, a filter of the provider, vLLM or SGLang
CUT_OFF = ("length", "content_filter", "abort")


@dataclass(frozen=True)
class Draw:
    """The `number`-th answer to a prompt, counted from 0."""

    prompt: Prompt
    number: int

    @property
    def key(self) -> str:
        return f"{self.prompt.id}/{self.number}"

    def seed(self, config: RunConfig, sample: SampleConfig) -> int:
        """A seed of its own, 63 bits: its tokens depend on neither its place, its batch nor its rank."""
        text = f"{config.seed} {sample.round} {self.prompt.id} {self.number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Answer:
    """What was answered; `ended` is false where the answer was cut off, as by its longest length."""

    prompt: Prompt
    number: int
    text: str
    ended: bool

    @property
    def key(self) -> str:
        """What its score is kept under in a sampling."""
        return f"{self.prompt.id}/{self.number}"


def draws(prompts: Sequence[Prompt], count: int) -> list[Draw]:
    """All answers that are wanted, neighbours in length side by side: less padding, less work."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.tokens), prompt.id))
    return [Draw(prompt, number) for prompt in ordered for number in range(count)]


def longest(sample: SampleConfig, prompts: Prompts) -> int:
    """Tokens that an answer may have."""
    return sample.max_new_tokens or prompts.longest


def answer_here(
    config: RunConfig,
    sample: SampleConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    wanted: Sequence[Draw],
    folder: Path,
    stop: Callable[[], bool],
) -> None:
    """Each rank holds the whole model and answers its share. Collective."""
    kept = Kept(folder / FOLDER)
    if nothing_lacks(kept, wanted):
        return
    model = load_whole(source, config.model, config.train.dtype, config.seed).to(distributed.device())
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    decoding = Decoding(
        max_new_tokens=longest(sample, prompts),
        stop_ids=tuple(sorted(own_stop_ids(tokenizer, model) | set(prompts.ends))),
        pad_id=pad,
        temperature=sample.temperature,
        top_p=sample.top_p,
        positions=positions_of(model, [(draw.prompt.place, draw.prompt.tokens) for draw in wanted]),
    )

    def compute(batch: Sequence[Draw]) -> list[Row]:
        tokens = [draw.prompt.tokens for draw in batch]
        seeds = [draw.seed(config, sample) for draw in batch]
        found = generate(model, tokens, decoding, batch_size=len(batch), seeds=seeds)
        texts = continuations(tokenizer, tokens, [one.tokens for one in found])
        return [
            _row(draw, text, one.end is not None, len(one.whole))
            for draw, text, one in zip(batch, texts, found, strict=True)
        ]

    progress = Progress("answers", folder / FOLDER, len(wanted))
    make_rows(wanted, sample.batch_size, kept, compute, progress, stop)


def continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[str]:
    """Answers as texts that continue their prompts: some tokenizers drop the space that begins a text."""
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
    both = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    texts = zip(decode(prompts), decode(both), decode(answers), strict=True)
    return [whole[len(before) :] if whole.startswith(before) else alone for before, whole, alone in texts]


def _row(draw: Draw, text: str, ended: bool, tokens: int) -> Row:
    return {"key": draw.key, "text": text, "ended": ended, "tokens": tokens}


def answer_by_endpoint(
    config: RunConfig,
    sample: SampleConfig,
    endpoint: Endpoint,
    prompts: Prompts,
    wanted: Sequence[Draw],
    folder: Path,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Rank 0 asks for each answer that is missing, while the others wait. Collective.

    Raises RunError where the endpoint refuses or stays silent; what it said so far is kept.
    """
    most = longest(sample, prompts)
    kept = Kept(folder / FOLDER)

    def ask() -> None:
        known = kept.read()
        missing = {draw.key: draw for draw in wanted if draw.key not in known}
        if not missing:
            return

        def read(request: Request, reply: Reply) -> Row | None:
            ended = reply.finish not in CUT_OFF
            return _row(missing[request.key], reply.text, ended, reply.completion_tokens)

        progress = Progress("answers", folder / FOLDER, len(wanted))
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731 - the progress says how far it is
        put = Asking(sample, endpoint, "endpoint", "answers", read, "the reply holds no answer", quiet, stop)
        requests = [_request(draw, config, sample, most) for draw in missing.values()]
        say(put.estimate(requests, most))
        with kept, progress:

            def keep(row: Row) -> None:
                kept.write(row)
                progress.look()

            asked = put.ask(requests, keep)
        say(put.spent(asked, "an answer"))

    on_main_or_refused(ask)


def _request(draw: Draw, config: RunConfig, sample: SampleConfig, most: int) -> Request:
    """A conversation goes to the chat route, whose server has the template; text goes as it stands."""
    prompt = draw.prompt
    body: dict[str, Any] = {
        "model": sample.model,
        "temperature": sample.temperature,
        "top_p": sample.top_p,
        "max_tokens": most,
        "seed": draw.seed(config, sample) % 2**31,  # servers differ in how large a seed they take
    }
    if isinstance(prompt.content, str):
        return Request(draw.key, {**body, "prompt": prompt.content}, prompt.content, TEXT)
    return Request(draw.key, {**body, "messages": prompt.content, **prompt.more}, prompt.text, CHAT)


def refuse_cut(prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError for prompts that an endpoint would read whole, and training reads cut."""
    cut = [prompt for prompt in prompts if prompt.cut]
    if cut:
        raise ConfigError(
            f"{cut[0].place}: the prompt (one of {len(cut)}) is longer than data.max_prompt_length, "
            "and the endpoint would read it whole; raise data.max_prompt_length, or let this machine answer"
        )


def read_answers(folder: Path, wanted: Sequence[Draw]) -> list[Answer]:
    """The answers that are there, in the order of what is wanted."""
    known = Kept(folder / FOLDER).read()
    return [
        Answer(draw.prompt, draw.number, str(known[draw.key]["text"]), bool(known[draw.key]["ended"]))
        for draw in wanted
        if draw.key in known
    ]
