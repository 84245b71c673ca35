"""Ranks of one group, forked from a process that has everything imported: starting one takes no time."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

START = "forkserver"


def on_ranks(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work` on so many ranks and waits; raises what one of them raised, and ends the others.

    `work` is a module's function and its arguments can be pickled.
    """
    multiprocessing.get_context(START).set_forkserver_preload(["rcpo.training.trainer", "rcpo.launch.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank, (ranks, port, work, arguments), nprocs=ranks, start_method=START)


def _rank(rank: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from rcpo.system import distributed

    distributed.initialize()
    work(*arguments)
    distributed.shutdown()
