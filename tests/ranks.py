"""Ranks of one group, forked from a process that has everything imported: starting one takes no time."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked


def on_ranks(
    ranks: int, work: Callable[..., None], *arguments: Any, imports: Sequence[str] = (), timeout: float = 600
) -> None:
    """Calls `work` on so many ranks and waits; raises RuntimeError with the output of one that failed.

    `work` is a module's function and its arguments can be pickled.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as name:
        call = Path(name) / "call"
        call.write_bytes(pickle.dumps((sys.path, pickle.dumps((work, arguments)))))
        outputs = [Path(name) / f"output{rank}" for rank in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting}
            with output.open("w") as file:
                words = [sys.executable, str(Path(__file__).resolve()), str(call)]
                environment = {**os.environ, **own}
                processes.append(
                    forked.Popen(words, imports=imports, env=environment, stdout=file, stderr=file)
                )
        failed = _first_failure(processes, timeout)
        if failed is not None:
            code, text = processes[failed].returncode, outputs[failed].read_text(errors="replace")
            raise RuntimeError(f"rank {failed} of {ranks} ended with {code}:\n{text}")


def _first_failure(processes: Sequence[forked.Popen], timeout: float) -> int | None:
    """Waits for all, or for the first that fails, whose place it returns; then ends the others."""
    end = time.monotonic() + timeout
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = [place for place, code in enumerate(codes) if code]
            if failed or None not in codes:
                return failed[0] if failed else None
            if time.monotonic() > end:
                raise TimeoutError(f"ranks {[place for place, code in enumerate(codes) if code is None]}")
            time.sleep(0.01)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _rank(call: Path) -> None:
    sys.path[:], inner = pickle.loads(call.read_bytes())
    work, arguments = pickle.loads(inner)
    from rcpo.system import distributed

    distributed.initialize()
    work(*arguments)
    distributed.shutdown()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
