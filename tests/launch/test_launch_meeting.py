"""The ranks' meeting, over real sockets: each rank is a thread here, with the node that it says it is on."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from test_launch_local import ranks_that

from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.launch import heartbeat, meeting
from rcpo.launch.heartbeat import Heartbeat
from rcpo.launch.meeting import Rank, meet
from rcpo.launch.ranks import Ranks
from rcpo.system import distributed

VERSIONS = {"torch": "2.13.0", "python": "3.11.2"}


@pytest.fixture(autouse=True)
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def rank(number: int, **more: Any) -> Rank:
    return Rank(number, f"n{number}", 0, versions=VERSIONS, settings={"seed": 1}, **more)


def met(ranks: list[Rank], world_size: int, seconds: float = 20.0) -> list[Exception | None]:
    """What each of the ranks that came was told; None where all was well."""
    stores = []

    def one(mine: Rank) -> Exception | None:
        try:
            stores.append(meet(Ranks(mine.rank, world_size, mine.local_rank, "srun"), mine, seconds))
        except (ConfigError, RunError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


def refusal(*ranks: Rank) -> str:
    """The one message that all ranks were refused with."""
    told = met(list(ranks), len(ranks))
    assert all(isinstance(error, ConfigError) for error in told)
    (message,) = {str(error) for error in told}
    return message


def test_equal_ranks_go_on() -> None:
    assert met([rank(0), rank(1), rank(2)], 3) == [None] * 3


def test_other_versions_are_named_with_the_node_on_all_ranks() -> None:
    other = replace(rank(1), versions={**VERSIONS, "torch": "2.12.1"})
    assert refusal(rank(0), other, rank(2)).startswith(
        "n1 (rank 1) has torch 2.12.1, n0 (rank 0) has 2.13.0: install the same"
    )


def test_nodes_with_another_number_of_gpus_are_named() -> None:
    assert "n1 (rank 1) sees 7 GPU(s), n0 (rank 0) sees 8" in refusal(rank(0, gpus=8), rank(1, gpus=7))


def test_more_processes_than_gpus_on_a_node_are_named() -> None:
    crowded = replace(rank(1, gpus=2), node="n0", local_rank=2)
    assert "n0 (rank 1) sees 2 GPUs and is its node's process 3" in refusal(rank(0, gpus=2), crowded)


def test_a_launcher_may_show_each_rank_its_own_gpu_alone() -> None:
    own = replace(rank(1, gpus=1), node="n0", local_rank=1)
    assert met([rank(0, gpus=1), own], 2) == [None, None]


def test_another_configuration_is_named_by_key() -> None:
    other = replace(rank(1), settings={"seed": 2})
    assert "n1 (rank 1) has seed=2, n0 (rank 0) has 1" in refusal(rank(0), other)


def test_a_rank_s_problem_is_everybody_s() -> None:
    assert refusal(rank(0), rank(1, problem="run/config.yaml does not exist")) == (
        "n1 (rank 1): run/config.yaml does not exist"
    )


def test_what_all_ranks_have_in_common_is_not_one_node_s_fault() -> None:
    assert refusal(rank(0, problem="seed=-1"), rank(1, problem="seed=-1")) == "seed=-1"


def test_ranks_that_do_not_come_are_counted_and_the_present_named() -> None:
    began = time.monotonic()
    told = met([rank(0), rank(2)], 4, seconds=1.0)
    assert time.monotonic() - began < 45  # the default of launch.meeting_seconds is 50
    (message,) = {str(error) for error in told}
    assert all(isinstance(error, RunError) for error in told)
    assert "2 of 4 ranks did not come within 1 s: 1, 3; here are n0 (rank 0), n2 (rank 2)" in message


def test_rank_0_that_is_not_there_is_named_by_its_address(meeting_point: int) -> None:
    (error,) = met([rank(1)], 2, seconds=1.0)
    assert isinstance(error, RunError)
    assert f"n1 (rank 1) cannot reach rank 0 at 127.0.0.1:{meeting_point}" in str(error)
    assert "launch.meeting_seconds" in str(error)  # its imports may take longer than this rank's


class Clock(dict[str, str]):
    """A store at which nobody else says anything, and the time that is waited for it, which is not spent."""

    now = 0.0

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        if not self.check(keys):
            self.sleep(timeout.total_seconds())
            raise RuntimeError("wait timeout")

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= set(self)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("number", "there", "message"),
    [
        (0, [], "1023 of 1024 ranks did not come"),
        (0, ["rank1", "rank7"], "1021 of 1024 ranks did not come"),
        (7, [], "rank 0 did not come"),
        (7, ["rank0"], "rank 0 was there and fell silent"),
    ],
)
def test_no_rank_waits_for_longer_than_a_minute(
    number: int, there: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock({name: json.dumps(asdict(rank(int(name[4:])))) for name in there})
    monkeypatch.setattr(meeting, "time", clock)
    monkeypatch.setattr(distributed, "meeting_store", lambda **_: clock)
    with pytest.raises(RunError, match=message):
        meet(Ranks(number, 1024, 0, "srun"), rank(number))
    assert 50 <= clock.now < 60


def test_a_folder_is_looked_for_in_less_than_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(meeting, "time", clock)
    assert not meeting._sees(tmp_path / "token", "text")
    assert clock.now < 60


def test_a_port_in_use_is_named(meeting_point: int) -> None:
    with socket.create_server(("127.0.0.1", meeting_point)):
        (error,) = met([rank(0)], 2, seconds=1.0)
    assert isinstance(error, RunError)
    assert f"n0 (rank 0) cannot serve 127.0.0.1:{meeting_point}" in str(error)
    assert "meeting_seconds" not in str(error)


def test_what_a_rank_says_of_itself() -> None:
    mine = meeting.this_rank(Ranks(3, 4, 1, "srun"), RunConfig(seed=7))
    assert (mine.rank, mine.local_rank, mine.problem) == (3, 1, None)
    assert mine.settings["seed"] == 7 and "reference.cache" not in mine.settings
    assert set(mine.versions) == {"python", "rcpo", "torch", "deepspeed", "transformers", "numpy"}


def test_a_node_is_called_what_slurm_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert meeting.node_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    assert meeting.node_name() == "gpu07"


def test_a_node_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    # the second rank has another working folder, and the name is relative: another node's file system
    elsewhere = "os.chdir(folder if os.environ['RANK'] == '0' else '/')\nfolder = Path('.')\n"
    program = ranks_that(tmp_path / "run", "return 0", before=elsewhere)
    _, err = program.communicate()
    assert program.returncode == 2
    assert "(rank 1) does not see what rank 0 writes in ." in err and err.count("rcpo: ") == 1


class Store(dict[str, str]):
    """What a heartbeat asks of torch's store."""

    def set(self, key: str, value: str) -> None:
        self[key] = value


def heartbeats(lost: Callable[[str], None], seconds: float) -> tuple[Heartbeat, Heartbeat, Store]:
    store = Store()
    first, second = Heartbeat(seconds, lost), Heartbeat(seconds, lost)
    first.begin(Ranks(0, 2, 0, "srun"), store)
    return first, second, store


def test_ranks_that_hear_from_each_other_lose_nobody() -> None:
    lost: list[str] = []
    first, second, store = heartbeats(lost.append, 2)  # no machine is so loaded that a thread waits as long
    second.begin(Ranks(1, 2, 1, "srun"), store)
    time.sleep(3)
    second.stop()  # one that leaves costs nothing
    time.sleep(2.5)
    first.stop()
    assert lost == []


@pytest.mark.parametrize(
    ("name", "known_as", "listens_at"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("node-a", "127.0.0.1", "0.0.0.0"),  # others know it by another address
        ("node-a", "192.0.2.1", "0.0.0.0"),  # another machine's: forwarded to this one
        ("node-a", None, "0.0.0.0"),
    ],
)
def test_rank_0_listens_where_the_others_come_and_nowhere_else(
    name: str, known_as: str | None, listens_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(asked: str, port: int | None, **_: Any) -> list[Any]:
        if known_as is None:
            raise socket.gaierror(f"{asked} is unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known_as, port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with heartbeat.server(name, 2) as listening:
        assert listening.getsockname()[0] == listens_at


def test_a_silent_rank_is_lost_by_name() -> None:
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 0.5)
    with socket.create_connection(("127.0.0.1", int(store["heartbeat"]))) as silent:
        silent.sendall(store["heartbeat token"].encode() + b" n7\n.")
        end = time.monotonic() + 120
        while not lost and time.monotonic() < end:
            time.sleep(0.05)
    first.stop()
    assert lost == ["n7"]


def test_a_rank_that_ends_without_a_farewell_is_lost_to_rank_0() -> None:
    """A rank that raised has closed its connection; the others wait in a collective that does not notice."""
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 0.3)
    with socket.create_connection(("127.0.0.1", int(store["heartbeat"]))) as ended:
        ended.sendall(store["heartbeat token"].encode() + b" n7\n.")
        assert ended.recv(1) == b"."
    wait_until(lambda: lost)
    first.stop()
    assert lost == ["n7"]


def test_a_rank_that_is_failing_itself_ends_with_its_own_message() -> None:
    """All raised alike; rank 0 still closes its trackers, which may take longer than the silence."""
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 0.5)
    try:
        raise RunError("the loss is not finite")
    except RunError:
        with socket.create_connection(("127.0.0.1", int(store["heartbeat"]))) as ended:
            ended.sendall(store["heartbeat token"].encode() + b" n7\n")
        time.sleep(1.2)
        assert lost == []
    wait_until(lambda: lost)  # it has caught its exception, and goes on
    first.stop()
    assert lost == ["n7"]


def test_a_rank_that_leaves_out_of_order_is_lost_to_rank_0() -> None:
    lost: list[str] = []
    first, second, store = heartbeats(lost.append, 2)
    second.begin(Ranks(1, 2, 1, "srun"), store)
    wait_until(lambda: first._followed)  # its greeting has come
    second.stop(in_order=False)
    wait_until(lambda: lost)
    first.stop()
    assert [name.partition(" on ")[0] for name in lost] == ["rank 1"]


@pytest.mark.parametrize(("farewell", "expected"), [(b"", ["rank 0"]), (b"!", [])])
def test_a_rank_0_that_ends_without_a_farewell_is_lost_to_the_others(
    farewell: bytes, expected: list[str]
) -> None:
    lost: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        beat = Heartbeat(0.3, lost.append)
        beat.begin(Ranks(1, 2, 0, "srun"), Store(heartbeat=str(server.getsockname()[1])))
        connection, _ = server.accept()
        with connection:
            connection.sendall(farewell)
    (thread,) = beat._threads
    thread.join(120)  # it follows rank 0 until it has lost it, or heard its farewell
    beat.stop()
    assert lost == expected


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize("words", [b"n7\n.", b"0" * 32 + b" n7\n.", b"\n.", b"x" * 100_000, b"\xff\n."])
def test_a_stranger_who_talks_ends_nothing(words: bytes) -> None:
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 0.3)
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", int(store["heartbeat"]))) as stranger,
    ):
        stranger.sendall(words)
        stranger.settimeout(120)
        assert stranger.recv(1) == b""  # turned away, however much was said
    time.sleep(0.5)
    first.stop()
    assert lost == []


def test_a_crowd_of_strangers_is_not_listened_to() -> None:
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 60)
    before = threading.active_count()
    crowd = [socket.create_connection(("127.0.0.1", int(store["heartbeat"]))) for _ in range(30)]
    time.sleep(1.0)
    assert threading.active_count() - before <= 20
    for stranger in crowd:
        stranger.close()
    first.stop()
    assert lost == []


def test_a_stranger_who_says_nothing_is_not_lost() -> None:
    lost: list[str] = []
    first, _, store = heartbeats(lost.append, 0.3)
    with socket.create_connection(("127.0.0.1", int(store["heartbeat"]))):
        time.sleep(1.0)
    first.stop()
    assert lost == []


def test_a_silent_rank_0_is_lost_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        beat = Heartbeat(0.5, lost.append)
        beat.begin(Ranks(1, 2, 0, "srun"), Store(heartbeat=str(deaf.getsockname()[1])))
        end = time.monotonic() + 120
        while not lost and time.monotonic() < end:
            time.sleep(0.05)
        beat.stop()
    assert lost == ["rank 0"]
