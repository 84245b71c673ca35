"""Any OpenAI-compatible endpoint of chat or text completions, over the standard library's HTTP.

What passes (limits, time-outs, broken connections and answers) is tried again with waits that double, less a
random half so that threads do not return together; a Retry-After is honoured by all threads. The key comes
from the environment, goes into one header, and is struck out of whatever the endpoint says.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import IO, Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, getproxies, proxy_bypass

from rcpo.config.judge import EndpointConfig
from rcpo.errors import ConfigError
from rcpo.system.text import visible

CHAT, TEXT = "chat/completions", "completions"  # routes: messages, or text as it stands
LONGEST_WAIT = 60.0  # seconds between tries, where the endpoint names no time
LONGEST_RETRY_AFTER = 600.0  # seconds that an endpoint may ask for; a longer wish is cut to this
_MOST_BYTES = 1 << 24  # of an answer
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_NO_KEY = (401, 403)
_PROXY = 407
_FOR_ALL = (*range(300, 400), *_NO_KEY, 404, 405, _PROXY)  # no other request would fare better


class Unanswered(Exception):
    """A request without a usable answer after all tries; the message says why."""


class Refused(Exception):
    """What no request to this endpoint can get past: a key, a model or an address that it does not know."""


class _Passing(Exception):
    """A failure that another try may not have; `wait` is how long the endpoint wants to be left alone."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What the model said, and the tokens that the endpoint counted (0 where it does not).

    `finish` is why it ended, in the endpoint's words: `stop`, or `length` and others where it was cut off.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str | None


class Endpoint:
    """Answers requests, from any thread; `node` holds its keys. Raises ConfigError for an unusable key."""

    def __init__(self, config: EndpointConfig, node: str = "judge") -> None:
        assert config.base_url is not None
        self._config = config
        self._node = node
        self._base = config.base_url.rstrip("/")
        self._key = read_key(config.api_key_env)
        self._opener = build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._stopped = threading.Event()

    def check(self) -> None:
        """Raise ConfigError where nothing listens there, or the key is not accepted, before work is done.

        Asks for the list of models; an endpoint that has none says so, and that is an answer.
        """
        try:
            self._try("models", None)
        except (Refused, Unanswered, _Passing) as problem:
            cause = problem.__cause__
            if not isinstance(cause, HTTPError):
                raise ConfigError(f"{self._node}.base_url={self._base}: {problem}") from None
            if cause.code in (*_NO_KEY, _PROXY):
                raise ConfigError(str(problem)) from None

    def complete(self, body: Mapping[str, Any], route: str = CHAT) -> Reply:
        """The model's reply to a request's body; raises Unanswered after all tries, and Refused."""
        for tried in range(self._config.retries + 1):
            self._wait_for_quiet()
            try:
                return self._reply(self._try(route, body))
            except _Passing as problem:
                reason = str(problem)
                if problem.wait is not None:
                    self._keep_quiet(problem.wait)
                if tried < self._config.retries:
                    self._sleep(min(LONGEST_WAIT, self._config.backoff * 2**tried) * random.uniform(0.5, 1))
        raise Unanswered(f"{reason}, in {self._config.retries + 1} tries")

    def stop(self) -> None:
        """End all waits: their requests are unanswered."""
        self._stopped.set()

    def _try(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rcpo"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._base}/{path}", data, headers)
        try:
            with self._opener.open(request, timeout=self._config.timeout) as response:
                return _read(response)
        except HTTPError as error:
            self._explain(error)
        except TimeoutError as error:
            raise _Passing(f"no answer within {self._config.timeout:g} s") from error
        except (OSError, HTTPException) as error:  # URLError, resets, an answer that breaks off
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer within {self._config.timeout:g} s") from error
            said = str(reason) or type(reason).__name__
            raise _Passing(f"the connection failed ({self._clean(said)}){self._by_proxy()}") from error

    def _explain(self, error: HTTPError) -> NoReturn:
        """Raise what an HTTP status other than 200 means."""
        code = error.code
        said = f"{code} {error.reason}"
        with contextlib.suppress(OSError, HTTPException):  # the status says enough
            said += f": {_message(_read(error))}"
        said = self._clean(said)
        if code in _PASSING:
            raise _Passing(said, _retry_after(error.headers.get("Retry-After"))) from error
        if code in _FOR_ALL:
            hint = ""
            if code in _NO_KEY:
                state = "is not set" if self._key is None else "is not accepted"
                hint = f"; the key in the environment variable {self._config.api_key_env} {state}"
            raise Refused(
                f"{self._node}.base_url={self._base} answered {said}{hint}{self._by_proxy()}"
            ) from error
        raise Unanswered(said) from error

    def _by_proxy(self) -> str:
        """Which proxy requests go through, without its password; nothing where they go straight."""
        parts = urlsplit(self._base)
        name = f"{parts.scheme}_proxy"
        proxy = getproxies().get(parts.scheme)
        if not proxy or proxy_bypass(parts.hostname or ""):
            return ""
        shown = self._clean(proxy.rpartition("@")[2])
        return (
            f"; requests go through the proxy {shown}, which the environment variable {name} names: "
            f"check it, or add {parts.hostname} to no_proxy"
        )

    def _reply(self, content: bytes) -> Reply:
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            text = choice["text"] if "message" not in choice else choice["message"].get("content")
            finish = choice.get("finish_reason")
            usage = answer.get("usage") or {}
            counts = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise _Passing("the answer is not a chat completion") from error
        if text is None and finish == "length":
            text = ""  # a model that thinks first was cut off before it answered
        if not isinstance(text, str):
            raise _Passing("the answer holds no text")
        reason = None if finish is None else str(finish)
        return Reply(self._struck(text), counts[0], counts[1], reason)

    def _struck(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")

    def _clean(self, text: str) -> str:
        """What the endpoint said, fit for a terminal."""
        return visible(self._struck(text), lines=False)[:300].rstrip(".")

    def _keep_quiet(self, seconds: float) -> None:
        with self._lock:
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)

    def _wait_for_quiet(self) -> None:
        """Until nobody has asked for silence; then after a moment of its own."""
        waited = False
        while (rest := self._quiet_until - time.monotonic()) > 0:
            self._sleep(rest)
            waited = True
        if waited:
            self._sleep(random.uniform(0, min(1.0, self._config.backoff)))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Unanswered("stopped")


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would carry the key to another host; it is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def read_key(name: str) -> str | None:
    """The key in an environment variable; None where it is not set. Raises ConfigError without its value."""
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {name} holds characters that no key has")
    return key or None


def _read(response: IO[bytes]) -> bytes:
    content = response.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise HTTPException("the answer is longer than 16 MiB")
    return content


def _message(content: bytes) -> str:
    """The message of an error's body: {"error": {"message": …}}, or the body."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return content.decode("utf-8", "replace").strip()


def _retry_after(value: str | None) -> float | None:
    """Seconds from now that a Retry-After header means, given in seconds or as a date; None without one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else None
