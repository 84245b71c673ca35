"""A chat-completions endpoint on this machine: the real protocol, planted preferences and faults."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Prefer = Callable[[str, str, str], str]
"""(instruction, first answer, second answer) → what the judge says."""


def longer(instruction: str, first: str, second: str) -> str:
    """Prefers the longer answer."""
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


@dataclass
class JudgeServer:
    """What a test sets and sees; `faults` are by the number of the completion request, from 0."""

    prefer: Prefer = longer
    key: str | None = None
    faults: Mapping[int, str] = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    most_at_once: int = 0
    _now: int = 0

    def enter(self, body: dict[str, Any]) -> int:
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self.lock:
            self._now -= 1

    @contextmanager
    def running(self, kind: type[_Handler] | None = None) -> Iterator[JudgeServer]:
        """Listens on a free port of the loopback interface; `kind` answers in another way."""
        owner = self

        class Handler(kind or _Handler):  # type: ignore[misc]
            judge = owner

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer

    def log_message(self, *_: Any) -> None:
        """Nothing on the tests' terminal."""

    def do_GET(self) -> None:
        if self._authorised():
            self._send(200, {"object": "list", "data": [{"id": "judge-1", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorised():
            return
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "no such route"}})
            return
        number = self.judge.enter(body)
        try:
            self._complete(self.judge.faults.get(number, self.judge.faults.get(-1, "")), body)
        finally:
            self.judge.leave()

    def _authorised(self) -> bool:
        if self.judge.key is None or self.headers.get("Authorization") == f"Bearer {self.judge.key}":
            return True
        given = self.headers.get("Authorization", "")
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given}."}})  # as providers do
        return False

    def _complete(self, fault: str, body: dict[str, Any]) -> None:
        kind, _, value = fault.partition(" ")
        if kind == "limit":
            headers = {"Retry-After": value} if value else {}
            self._send(429, {"error": {"message": "Rate limit reached"}}, headers)
        elif kind == "status":
            self._send(int(value), {"error": {"message": f"planted {self.headers.get('Authorization')}"}})
        elif kind == "moved":
            self._send(302, {}, {"Location": value})
        elif kind == "sleep":
            time.sleep(float(value))
        elif kind == "disconnect":
            # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif kind == "break":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif kind == "raw":
            self._send_bytes(200, value.encode(), {})
        else:
            self._send(200, completion(self._verdict(body) if kind != "says" else value))

    def _verdict(self, body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"]
        parts = [
            re.search(rf"<{name}>\n(.*?)\n</{name}>", text, re.DOTALL)
            for name in ("instruction", "answer_A", "answer_B")
        ]
        return self.judge.prefer(*(part[1] for part in parts if part))

    def _send(self, code: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send_bytes(code, json.dumps(content).encode(), headers or {})

    def _send_bytes(self, code: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def completion(text: str) -> dict[str, Any]:
    """A chat completion as the protocol has it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "judge-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
    }
