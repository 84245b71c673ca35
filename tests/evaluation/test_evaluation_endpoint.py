"""The judge's HTTP against a real server on this machine: limits, time-outs, broken answers, refusals."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from judge_server import JudgeServer

from rcpo.config.judge import JudgeConfig
from rcpo.errors import ConfigError
from rcpo.evaluation.endpoint import Endpoint, Refused, Unanswered, _retry_after

KEY = "sk-plantedplantedplanted"
BODY: dict[str, Any] = {"model": "judge-1", "messages": [{"role": "user", "content": "which?"}]}


def endpoint(server: JudgeServer, **settings: Any) -> Endpoint:
    quick = {"timeout": 30.0, "retries": 3, "backoff": 0.01} | settings
    return Endpoint(JudgeConfig(base_url=server.url, model="judge-1", **quick))


def says(*_: str) -> str:
    return "[[A]]"


@pytest.fixture(autouse=True)
def own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(
    "fault",
    [
        *("limit", "limit 0", "status 500", "status 503", "sleep 30", "disconnect", "break"),
        *(
            "raw not json",
            "raw []",
            'raw {"choices": []}',
            'raw {"choices": [{"message": {"content": null}}]}',
            'raw {"choices": [{"message": null}]}',
            'raw {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}',
        ),
    ],
)
def test_what_passes_is_asked_again(fault: str) -> None:
    server = JudgeServer(says, key=KEY, faults={0: fault, 1: fault})
    with server.running():
        # a busy machine answers late too
        reply = endpoint(server, timeout=1.0 if fault.startswith("sleep") else 30.0).complete(BODY)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("[[A]]", 100, 5)
    assert len(server.requests) == 3


def test_an_answer_that_was_cut_off_before_its_first_word_is_one() -> None:
    for message in ('{"content": null}', "{}"):
        fault = f'raw {{"choices": [{{"message": {message}, "finish_reason": "length"}}]}}'
        server = JudgeServer(says, faults={0: fault})
        with server.running():
            reply = endpoint(server).complete(BODY)
        assert (reply.text, reply.finish, len(server.requests)) == ("", "length", 1)


def test_it_gives_up_and_says_why() -> None:
    for fault, reason in (
        ("status 502", r"502 .*planted .* in 3 tries"),
        ("sleep 30", r"no answer within 0\.3 s, in 3 tries"),
        ("raw {}", "not a chat completion, in 3 tries"),
    ):
        server = JudgeServer(says, faults={-1: fault})
        with server.running(), pytest.raises(Unanswered, match=reason) as caught:
            endpoint(server, timeout=0.3 if fault == "sleep 30" else 30.0, retries=2).complete(BODY)
        assert len(server.requests) == 3 and KEY not in str(caught.value)


def test_waits_double_and_a_retry_after_is_honoured() -> None:
    server = JudgeServer(says, faults={0: "status 500", 1: "status 500", 2: "status 500", 4: "limit 0.4"})
    with server.running():
        slow = endpoint(server, backoff=0.08)
        slow.complete(BODY)
        first = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
        # at least half of 0.08, 0.16, 0.32 s; a busy machine may take longer
        assert all(gap >= 0.5 * 0.08 * 2**tried for tried, gap in enumerate(first))
        slow.complete(BODY)
        assert server.times[5] - server.times[4] >= 0.4


def test_a_limit_holds_for_all_threads() -> None:
    server = JudgeServer(says, faults={0: "limit 0.5"})
    with server.running():
        shared = endpoint(server)
        shared._keep_quiet(0.3)
        before = time.monotonic()
        shared.complete(BODY)
        assert server.times[0] - before >= 0.3 and server.times[1] - server.times[0] >= 0.5


def test_stop_ends_the_waits() -> None:
    server = JudgeServer(says)
    with server.running():
        stopped = endpoint(server)
        stopped._keep_quiet(600)
        stopped.stop()
        with pytest.raises(Unanswered, match="stopped"):
            stopped.complete(BODY)


def test_a_request_of_its_own_fault_is_not_repeated() -> None:
    server = JudgeServer(says, faults={0: "status 400"})
    with server.running(), pytest.raises(Unanswered, match=r"400 .*planted Bearer \*\*\*"):
        endpoint(server).complete(BODY)
    assert len(server.requests) == 1


def test_a_wrong_key_is_refused_and_never_repeated() -> None:
    server = JudgeServer(says, key="another")
    with server.running():
        with pytest.raises(Refused) as caught:
            endpoint(server).complete(BODY)
        with pytest.raises(ConfigError) as early:
            endpoint(server).check()
    for message in (str(caught.value), str(early.value)):
        assert "401" in message and "OPENAI_API_KEY is not accepted" in message
        assert "Bearer ***" in message and KEY not in message


def test_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with JudgeServer(says, key=KEY).running() as server:
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
            endpoint(server).check()
        monkeypatch.setenv("OTHER_KEY", KEY)
        endpoint(server, api_key_env="OTHER_KEY").check()
    for bad in ("two words", "sk-\x1b[2J", "schlüssel", "line\nbreak"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ConfigError) as caught:
            endpoint(server)
        assert bad not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)


def test_a_redirect_does_not_carry_the_key_away() -> None:
    with JudgeServer(says).running() as elsewhere:
        server = JudgeServer(says, faults={-1: f"moved {elsewhere.url}/chat/completions"})
        with server.running(), pytest.raises(Refused, match="302"):
            endpoint(server).complete(BODY)
    assert elsewhere.requests == []


def test_nobody_there() -> None:
    with JudgeServer(says).running() as server:
        pass
    with pytest.raises(
        ConfigError, match=r"judge\.base_url=http://127\.0\.0\.1:\d+/v1: the connection failed"
    ):
        endpoint(server).check()
    with pytest.raises(Unanswered, match=r"the connection failed .* in 4 tries"):
        endpoint(server).complete(BODY)


def test_retry_after_in_seconds_and_as_a_date() -> None:
    assert _retry_after("7") == 7 and _retry_after(None) is None and _retry_after("soon") is None
    assert _retry_after("-3") == 0 and _retry_after("1e9") == 600 and _retry_after("nan") is None
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert _retry_after(date) == pytest.approx(90, abs=20)
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_proxy_in_the_way_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    server = JudgeServer(says, key=KEY, faults=dict.fromkeys(range(9), "status 407"))
    config = JudgeConfig(base_url="http://judge.example/v1", model="m", timeout=5.0, retries=0)
    with server.running():
        place = server.url.removeprefix("http://").removesuffix("/v1")
        for proxy in (place, "127.0.0.1:9"):  # one that asks for a password, and one that is not there
            monkeypatch.setenv("http_proxy", f"http://user:planted@{proxy}")
            with pytest.raises((Refused, Unanswered)) as refusal:
                Endpoint(config).complete(BODY)
            message = str(refusal.value)
            assert f"through the proxy {proxy}" in message and "http_proxy" in message
            assert "add judge.example to no_proxy" in message and "planted" not in message
        monkeypatch.setenv("no_proxy", "judge.example")
        with pytest.raises(ConfigError) as refusal:
            Endpoint(config).check()
    assert "proxy" not in str(refusal.value)
