"""A run's ranks hear from each other every few seconds, and end the run where one falls silent.

A cut link closes no connection, and neither does a process that stands still; nor does every collective
notice that a rank has ended. Without this, the others wait in it for half an hour, and do not learn for whom.
Each has a socket and a thread for it. A rank that leaves in order sends a farewell; one that ends without it
counts as lost.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from rcpo.errors import RunError
from rcpo.launch.meeting import node_name
from rcpo.launch.outcomes import FAILED, report_failure
from rcpo.launch.ranks import Ranks

_BEATS = 6  # within the silence that is one too many
_BEAT, _FAREWELL = b".", b"!"
_GREETING_BYTES = 512  # the longest first line of a rank: its token and its name
_STRANGERS = 16  # connections beyond the ranks' own that are listened to at a time

log = logging.getLogger(__name__)
Lost = Callable[[str], None]


def end_run(rank: str) -> None:
    """Say which rank was lost and end this process, whose main thread would wait for it.

    A checkpoint that is being written is finished first: the lost rank's part may be on the disk.
    """
    error = RunError(
        f"{node_name()}: {rank} fell silent: it failed, it stands still, or its machine or the network to it "
        "is gone"
    )
    log.info("%s", error)
    report_failure(error, everywhere=True)
    if "rcpo.checkpoint.write" in sys.modules:
        sys.modules["rcpo.checkpoint.write"].rescue_all()
    logging.shutdown()
    os._exit(FAILED)


class Heartbeat:
    """The ranks' connections to rank 0. `seconds` without a word are a loss, which `lost` is told.

    They are counted in short waits of one's own, so that a job which is suspended as a whole loses nobody.
    """

    def __init__(self, seconds: float, lost: Lost = end_run) -> None:
        self._seconds, self._lost = seconds, lost
        self._leaving = threading.Event()
        self._sockets: list[socket.socket] = []
        self._token = ""
        self._places = threading.BoundedSemaphore(_STRANGERS)
        self._followed: list[socket.socket] = []  # rank 0's connections to the others
        self._threads: list[threading.Thread] = []

    def begin(self, ranks: Ranks, store: Any) -> None:
        """Connect this rank; the store says where rank 0 listens."""
        if ranks.rank == 0:
            listening = server(os.environ["MASTER_ADDR"], ranks.world_size)
            self._sockets.append(listening)
            self._token = secrets.token_hex(16)
            self._places = threading.BoundedSemaphore(ranks.world_size + _STRANGERS)
            store.set("heartbeat token", self._token)
            store.set("heartbeat", str(listening.getsockname()[1]))
            self._thread(self._accept, listening)
        else:
            address = os.environ["MASTER_ADDR"], int(store.get("heartbeat"))
            token = store.get("heartbeat token")
            self._token = token.decode() if isinstance(token, bytes) else str(token)
            try:
                connection = socket.create_connection(address, timeout=self._seconds)
            except OSError as error:
                log.warning("no heartbeat: rank 0 cannot be reached at %s:%s (%s)", *address, error)
                return
            self._sockets.append(connection)
            connection.settimeout(self._seconds / _BEATS)
            connection.sendall(f"{self._token} rank {ranks.rank} on {node_name()}\n".encode())
            self._thread(self._beat, connection)

    def stop(self, *, in_order: bool = True) -> None:
        """Leave; the others take it for a loss only where it is not `in_order`."""
        self._leaving.set()
        for each in [*self._sockets, *self._followed] if in_order else []:
            with suppress(OSError):  # it ended before, or is rank 0's, which only listens
                each.sendall(_FAREWELL)
        for thread in self._threads:
            thread.join(0.2)
        for each in self._sockets:
            each.close()

    def _thread(self, work: Callable[[socket.socket], None], connection: socket.socket) -> None:
        thread = threading.Thread(target=work, args=(connection,), daemon=True, name="heartbeat")
        self._threads.append(thread)
        thread.start()

    def _accept(self, server: socket.socket) -> None:
        server.settimeout(0.5)
        while not self._leaving.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            except OSError:  # closed by `stop`
                return
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            connection.settimeout(self._seconds / _BEATS)
            self._thread(self._listen, connection)

    def _listen(self, connection: socket.socket) -> None:
        """Rank 0's side of a rank."""
        try:
            self._follow(connection)
        finally:
            self._places.release()

    def _follow(self, connection: socket.socket) -> None:
        with connection:
            try:
                token, _, name = _line(connection, self._seconds).partition(" ")
            except OSError:
                return
            # who does not know the token is none of ours: a scanner of ports, or worse
            if not hmac.compare_digest(token.encode(), self._token.encode()):
                log.info("heartbeat: a stranger was turned away")
                return
            self._followed.append(connection)
            try:
                while (word := _heard(connection)) == _BEAT:
                    connection.sendall(_BEAT)
            except TimeoutError:
                self._tell(name)
                return
            except OSError as error:
                log.info("heartbeat of %s: %s", name, error)
                word = b""
            if word != _FAREWELL:
                self._miss(name)

    def _beat(self, connection: socket.socket) -> None:
        """The other rank's side."""
        word = _BEAT
        while word == _BEAT and not self._leaving.wait(self._seconds / _BEATS):
            try:
                connection.sendall(_BEAT)
                word = _heard(connection)
            except TimeoutError:
                self._tell("rank 0")
                return
            except OSError as error:
                log.info("heartbeat: %s", error)
                word = _last_word(connection)
        if word == b"":
            self._miss("rank 0")

    def _miss(self, rank: str) -> None:
        """Wait: a rank that ended may yet make this one fail by itself, with a better message.

        A rank that is failing, as all may alike, closes its trackers and checkpoints first, however long.
        """
        while not self._leaving.wait(self._seconds):
            if not _failing():
                self._tell(rank)

    def _tell(self, rank: str) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            self._lost(rank)


def server(name: str, backlog: int) -> socket.socket:
    """Listen where the other ranks come: at the address of that name, or at all of this machine's.

    All, where the address is forwarded to this machine, or is a loopback address, as a machine's own name
    often is to itself alone.
    """
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
        if address == name or name == "localhost" or not ip_address(address).is_loopback:
            return socket.create_server((address, 0), family=family, backlog=backlog)
    except OSError as error:
        log.info("heartbeat: not at %s alone (%s)", name, error)
    return socket.create_server(("", 0), backlog=backlog)


def _failing() -> bool:
    """Whether an exception is on its way through this process's main thread."""
    found = sys._current_exceptions().get(threading.main_thread().ident or 0)
    return found not in (None, (None, None, None))  # a tuple before Python 3.12


def _heard(connection: socket.socket) -> bytes:
    """The next byte, nothing where the connection was closed; TimeoutError after as many waits as beats."""
    for _ in range(_BEATS - 1):
        try:
            return connection.recv(1)
        except TimeoutError:
            continue
    return connection.recv(1)


def _last_word(connection: socket.socket) -> bytes:
    """What a connection that was reset still holds; nothing where it holds nothing."""
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _line(connection: socket.socket, seconds: float) -> str:
    """What a rank begins with, up to its line's end; raises OSError where that is long, or long in coming."""
    line, end = b"", time.monotonic() + seconds
    while (byte := _heard(connection)) not in (b"\n", b""):
        line += byte
        if len(line) > _GREETING_BYTES or time.monotonic() > end:
            raise OSError("a greeting without an end")
    return line.decode(errors="replace")
