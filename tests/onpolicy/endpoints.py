"""A completions endpoint on this machine whose answers a test knows, with the faults of `judge_server`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import judge_server
from judge_server import JudgeServer, completion


class AnswerServer(JudgeServer):
    """Answers "12+34=" with its sum, or with the sum and one, as the request's seed says; text and chat."""


class _Handler(judge_server._Handler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorised():
            return
        number = self.judge.enter({**body, "route": self.path})
        try:
            fault = self.judge.faults.get(number, self.judge.faults.get(-1, ""))
            if fault:
                self._complete(fault, body)
            else:
                self._send(200, answer(body))
        finally:
            self.judge.leave()


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A text or chat completion with the answer that belongs to the request."""
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    numbers = re.findall(r"\d+", asked)
    text = str(sum(map(int, numbers)) + body["seed"] % 2)
    if body["seed"] % 7 == 0:
        text = text[:1]  # cut off
    reply = completion(text)
    [choice] = reply["choices"]
    choice["finish_reason"] = "length" if body["seed"] % 7 == 0 else "stop"
    if "prompt" in body:
        choice["text"] = choice.pop("message")["content"]
    return reply


@contextmanager
def answering(**settings: Any) -> Iterator[AnswerServer]:
    """Such a server, while it listens."""
    server = AnswerServer(**settings)
    with server.running(_Handler):
        yield server
