"""Encoding on all cores: processes that get an `Encoder` once, then pieces, and give token arrays back.

They are started as `python -m rcpo.data.workers`, not forked: a fork of a process with threads (of torch, a
collective library, CUDA) may hang, and a spawned one would run the user's main module again. Results come in
the order of the pieces, and no more than a few pieces are under way, so memory stays small.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO, Any

from rcpo.data.encode import Encoded, Encoder
from rcpo.data.readers import RowBlock
from rcpo.errors import ConfigError
from rcpo.system.machine import cores

ALONE = 6  # pieces that this process encodes by itself: as long as the workers would take to start
AHEAD = 2  # pieces for each worker that are read before they are asked for
_LENGTH = struct.Struct("<Q")


def encode_all(
    encoder: Encoder, pieces: Iterable[RowBlock], workers: int | None
) -> Generator[tuple[RowBlock, Encoded], None, None]:
    """The pieces, each encoded, in their order; `workers` None is one a core, below 2 this process alone.

    A few pieces are encoded here in any case. Raises ConfigError as `Encoder` does.
    """
    remaining = iter(pieces)
    if workers is None:
        workers = cores()
    if workers < 2 or not encoder.portable:
        yield from ((piece, encoder(piece)) for piece in remaining)
        return
    head = list(islice(remaining, ALONE + 1))
    if len(head) <= ALONE:
        yield from ((piece, encoder(piece)) for piece in head)
        return
    pool = _Pool(encoder, workers)
    try:
        yield from pool.map(chain(head, remaining))
    finally:
        pool.close()


class _Pool:
    """A thread for each worker process, which hands it a piece and waits for the result."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder = pickle.dumps(encoder)
        self._workers = workers
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, initializer=self._start)

    def map(self, pieces: Iterable[RowBlock]) -> Iterator[tuple[RowBlock, Encoded]]:
        waiting: deque[tuple[RowBlock, Future[Encoded]]] = deque()
        for piece in pieces:
            waiting.append((piece, self._threads.submit(self._encode, piece)))
            if len(waiting) >= AHEAD * self._workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()
        self._threads.shutdown()

    def _start(self) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "rcpo.data.workers"]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._processes.append(process)
        self._local.process = process
        _send(process.stdin, self._encoder)

    def _encode(self, piece: RowBlock) -> Encoded:
        process: subprocess.Popen[bytes] = self._local.process
        try:
            _send(process.stdin, pickle.dumps(piece, protocol=5))
            answer = pickle.loads(_receive(process.stdout))
        except (EOFError, BrokenPipeError) as error:
            code = process.wait()
            raise RuntimeError(
                f"a process that tokenizes the data ended with exit code {code}{_hint(code)}"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Encoded)
        return answer


def _hint(code: int) -> str:
    """What may have ended a process with this code."""
    if code < 0:
        return "; the machine may have run out of memory: data.workers=1 takes less"
    return ", after the error above; data.workers=1 raises it in this process"


def _send(stream: IO[bytes] | None, content: bytes) -> None:
    assert stream is not None
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def main() -> None:
    """A worker: an encoder and then pieces on standard input, what they become on standard output."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not part of the answer
    encoder: Encoder = pickle.loads(_receive(source))
    while True:
        try:
            piece: Any = pickle.loads(_receive(source))
        except EOFError:
            return
        try:
            answer: Encoded | Exception = encoder(piece)
        except ConfigError as error:
            answer = error
        _send(target, pickle.dumps(answer, protocol=5))


if __name__ == "__main__":
    main()
