"""Many requests to an endpoint, some at a time; each usable reply becomes a line as soon as it arrives."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from rcpo.config.judge import EndpointConfig, JudgeConfig
from rcpo.errors import RunError
from rcpo.evaluation.endpoint import CHAT, Endpoint, Refused, Reply, Unanswered
from rcpo.system.signals import Stopped

PATIENCE = 10  # requests in a row without an answer, after all their tries: then the endpoint is gone
CHARACTERS = 4  # of English text in a token, roughly; the estimate says that it counts so
_LOOK_SECONDS = 0.5  # between looks whether to stop


def judge_body(config: JudgeConfig, template: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """The request that shows a judge a template with its fields filled in."""
    field = rf"\{{({'|'.join(parts)})\}}"
    text = re.sub(field, lambda match: parts[match[1]], template)  # one pass: braces in answers stay
    body: dict[str, Any] = {"model": config.model, "messages": [{"role": "user", "content": text}]}
    given = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    return body | {key: value for key, value in given.items() if value is not None}


def content_hash(content: Any) -> str:
    """A hash of what is asked, by which its answer is kept."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Request:
    """What is asked, `text` of it for the estimate; `key` is what its line is kept under."""

    key: str
    body: Mapping[str, Any]
    text: str
    route: str = CHAT


@dataclass
class Asked:
    """What became of some requests."""

    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)


Line = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How requests are put: `who` asks and `what` is asked for, in messages.

    `read` makes a line of a reply, None of one that is not usable: then it is asked once more, and `unusable`
    is the reason why it has none.
    """

    config: EndpointConfig
    endpoint: Endpoint
    who: str
    what: str
    read: Callable[[Request, Reply], Line | None]
    unusable: str
    say: Callable[[str], None]
    stop: Callable[[], bool] = lambda: False

    def ask(self, requests: Sequence[Request], keep: Callable[[Line], None]) -> Asked:
        """Ask all of `requests`; `keep` gets each line from this thread.

        Raises RunError where the endpoint refuses or stays silent, Stopped where `stop` says so.
        """
        asked, waiting, silent = Asked(), iter(requests), 0
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix=self.who) as pool:
            running: dict[Future[tuple[Reply, Line]], Request] = {}
            try:
                while True:
                    while len(running) < self.config.concurrency and (request := next(waiting, None)):
                        running[pool.submit(self._answer, request)] = request
                    if not running:
                        return asked
                    if self.stop():
                        raise Stopped(f"{self.who}: stopped; the same command continues from there")
                    for future in wait(running, _LOOK_SECONDS, FIRST_COMPLETED).done:
                        del running[future]
                        try:
                            reply, line = future.result()
                        except Unanswered as problem:
                            asked.failed[str(problem)] += 1
                            silent += 1
                            self._lose_patience(silent, problem)
                            continue
                        silent = 0
                        keep(line)
                        asked.answered += 1
                        asked.prompt_tokens += reply.prompt_tokens
                        asked.completion_tokens += reply.completion_tokens
                        if asked.answered % max(10, len(requests) // 10) == 0:
                            self.say(f"{self.who}: {asked.answered:,} of {len(requests):,}")
            except Refused as problem:
                raise RunError(str(problem)) from problem
            finally:
                self.endpoint.stop()

    def _answer(self, request: Request) -> tuple[Reply, Line]:
        """A reply with its line. Raises Unanswered and Refused."""
        for _ in range(2):
            reply = self.endpoint.complete(request.body, request.route)
            line = self.read(request, reply)
            if line is not None:
                return reply, line
        cut = f" and was cut off; raise {self.who}.max_tokens" if reply.finish == "length" else ""
        raise Unanswered(self.unusable + cut)

    def _lose_patience(self, silent: int, problem: Unanswered) -> None:
        if silent >= PATIENCE:
            raise RunError(
                f"the {self.who} left {silent} requests in a row unanswered ({problem}); what it "
                "said is kept, and the same command continues from there"
            ) from problem

    def estimate(self, requests: Sequence[Request], most: int | None) -> str:
        """What is about to be asked, in a line: requests, tokens, and the price where it is given.

        `most` is how many tokens a reply may have; None is any number.
        """
        config = self.config
        tokens = round(sum(len(request.text) for request in requests) / CHARACTERS)
        line = (
            f"{self.who}: {len(requests):,} requests to {config.model}, about {tokens:,} tokens of prompts "
        )
        line += f"(characters ÷ {CHARACTERS})"
        if most is None:
            return line + f", {self.what} of any length"
        line += f", at most {len(requests) * most:,} of {self.what}"
        price = config.price(tokens, len(requests) * most)
        return line if price is None else f"{line}; at most {price:,.2f} at the prices given"

    def spent(self, asked: Asked, lacking: str) -> str:
        """What was asked and used, as the endpoint counted it; below, why something is `lacking`."""
        line = f"{self.who}: {asked.answered:,} answered"
        if asked.prompt_tokens:
            line += f", {asked.prompt_tokens:,} + {asked.completion_tokens:,} tokens"
            price = self.config.price(asked.prompt_tokens, asked.completion_tokens)
            line += "" if price is None else f", {price:,.2f} at the prices given"
        for reason, count in asked.failed.most_common(3):
            line += f"\n{self.who}: {count:,} without {lacking}: {reason}"
        return line
