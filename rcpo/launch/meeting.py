"""The start of a run on several ranks: they meet, compare what they are, and all see the run's folder.

Whatever is wrong is found before a weight is read, and every rank says the same, with the node's name. The
ranks meet at a key-value store, so that a rank that cannot talk to the others yet, or has failed already, can
still be named.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from rcpo import __version__
from rcpo.config.changes import flatten
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.launch.outcomes import FAILED, report_failure
from rcpo.launch.ranks import Ranks
from rcpo.system.text import first_line

SECONDS = 50.0  # that the others have to come; with what follows, less than a minute
_WORD_SECONDS = 5.0  # that it takes until all have read why they cannot go on
_VISIBLE_SECONDS = 10.0  # that a network file system may take to show a new file elsewhere
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
# what may differ between ranks: each node has its own caches
_OWN = ("reference.cache", "data.cache", "launch.processes")
_TOKEN = ".seen"
_MORE_TIME = "launch.meeting_seconds gives slow starts, as from a busy file system, more time"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rank:
    """What a rank tells the others of itself; `problem` is why it cannot go on."""

    rank: int
    node: str
    local_rank: int
    gpus: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.node} (rank {self.rank})"


def node_name() -> str:
    """This node, as SLURM calls it or by its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_rank(ranks: Ranks, config: RunConfig) -> Rank:
    """What there is to say of this process."""
    import torch

    versions = {"python": platform.python_version(), "rcpo": __version__}
    versions |= {package: metadata.version(package) for package in _PACKAGES}
    settings = {key: value for key, value in flatten(to_container(config)).items() if key not in _OWN}
    return Rank(ranks.rank, node_name(), ranks.local_rank, torch.cuda.device_count(), versions, settings)


def meet(ranks: Ranks, mine: Rank, seconds: float = SECONDS) -> Any:
    """Wait for all ranks and compare them; return the store that they met at.

    Raises, with the same message on all of them, ConfigError for what the user has to change and RunError
    where ranks did not come within some seconds of rank 0, or it of the others.
    """
    store = _store(ranks, mine, seconds)
    store.set(f"rank{ranks.rank}", json.dumps(asdict(mine)))
    if ranks.rank == 0:
        found, missing = _gather(store, ranks.world_size, seconds)
        store.set("verdict", json.dumps(_verdict(found, missing, seconds)))
    try:
        store.wait(["rank0"], timedelta(seconds=seconds))  # a launcher's store is there before rank 0 is
    except RuntimeError as error:
        raise RunError(
            f"{mine}: rank 0 did not come ({first_line(error)}); look for its error; {_MORE_TIME}"
        ) from error
    try:
        # rank 0 waits for the last to come
        store.wait(["verdict"], timedelta(seconds=seconds + _WORD_SECONDS))
        refused, failed = json.loads(store.get("verdict"))
    except RuntimeError as error:
        raise RunError(f"{mine}: rank 0 was there and fell silent ({first_line(error)})") from error
    if refused is None and failed is None:
        return store
    store.set(f"read{ranks.rank}", "")
    if ranks.rank == 0:  # it may hold the store: it goes last
        _gather(store, ranks.world_size, _WORD_SECONDS, "read")
    raise RunError(failed) if refused is None else ConfigError(refused)


def _store(ranks: Ranks, mine: Rank, seconds: float) -> Any:
    """The store at the address that the launcher gave; rank 0 holds it, unless the launcher's agent does."""
    from rcpo.system import distributed

    try:
        return distributed.meeting_store(holds=ranks.rank == 0, seconds=seconds)
    except RuntimeError as error:
        what = "serve" if ranks.rank == 0 else "reach rank 0 at"
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"{mine} cannot {what} {place} ({first_line(error)}); look for an error of rank 0, a wrong "
            "address (MASTER_ADDR, MASTER_PORT), or a firewall between the nodes"
            + ("" if ranks.rank == 0 else f"; {_MORE_TIME}")
        ) from error


def _gather(store: Any, count: int, seconds: float, name: str = "rank") -> tuple[list[Rank], list[int]]:
    """The ranks that said something within some seconds, and the numbers of the others."""
    end = time.monotonic() + seconds
    found, missing = [], []
    for number in range(count):
        key, left = f"{name}{number}", end - time.monotonic()
        with suppress(RuntimeError):
            if left > 0:
                store.wait([key], timedelta(seconds=max(0.01, left)))
        if not store.check([key]):
            missing.append(number)
            continue
        text = store.get(key)
        if text:
            found.append(Rank(**json.loads(text)))
    return found, missing


def _verdict(found: Sequence[Rank], missing: Sequence[int], seconds: float) -> tuple[str | None, str | None]:
    """What is refused, and what failed; None where all is well."""
    refused = _problems(found)
    if refused is None and missing:
        here = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        numbers = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        return None, (
            f"{len(missing)} of {len(found) + len(missing)} ranks did not come within {seconds:.0f} s: "
            f"{numbers}; here are {here}. Look for their errors, a wrong address, or a firewall; {_MORE_TIME}"
        )
    return refused or _versions(found) or _gpus(found) or _settings(found), None


def _problems(found: Sequence[Rank]) -> str | None:
    """The first problem of a rank, with its node unless all have the same."""
    having = [rank for rank in found if rank.problem is not None]
    if not having:
        return None
    same = len({rank.problem for rank in found}) == 1
    return having[0].problem if same else f"{having[0]}: {having[0].problem}"


def _versions(found: Sequence[Rank]) -> str | None:
    first = found[0]
    for rank in found:
        for package, version in rank.versions.items():
            if version != first.versions[package]:
                return (
                    f"{rank} has {package} {version}, {first} has {first.versions[package]}: install the "
                    "same versions on all nodes"
                )
    return None


def _gpus(found: Sequence[Rank]) -> str | None:
    first = found[0]
    for rank in found:
        if rank.gpus != first.gpus:
            return f"{rank} sees {rank.gpus} GPU(s), {first} sees {first.gpus}: all nodes need as many"
        # a launcher may show each rank its own GPU alone
        if 1 < rank.gpus <= rank.local_rank:
            return f"{rank} sees {rank.gpus} GPUs and is its node's process {rank.local_rank + 1}"
    return None


def _settings(found: Sequence[Rank]) -> str | None:
    first = found[0]
    for rank in found:
        for key in sorted({*first.settings, *rank.settings}):
            own, other = rank.settings.get(key), first.settings.get(key)
            if own != other:
                return f"{rank} has {key}={own}, {first} has {other}: give all ranks the same configuration"
    return None


def refuse(ranks: Ranks, problem: str) -> ConfigError:
    """Tell the other ranks why this one cannot start; what all of them are going to say."""
    mine = Rank(ranks.rank, node_name(), ranks.local_rank, problem=problem)
    try:
        meet(ranks, mine)
    except ConfigError as shared:
        return shared
    except RunError as error:  # nobody to tell: the launcher takes the others along
        log.info("the other ranks were not told: %s", error)
    return ConfigError(f"{mine}: {problem}")


@contextmanager
def connecting(seconds: float = SECONDS) -> Iterator[None]:
    """End this process where the ranks, which have met, do not get connected to each other in time.

    The library would try for half an hour.
    """

    def give_up() -> None:
        error = RunError(
            f"{node_name()}: the ranks met, but could not be connected within {seconds:.0f} s: set "
            "GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME, to the network interface between the nodes"
        )
        report_failure(error, everywhere=True)
        os._exit(FAILED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def share_folder(run_dir: Path | None) -> Path:
    """Rank 0's folder, on every rank, which all have seen. Collective.

    Raises ConfigError on all ranks, naming the node, where one does not see what rank 0 writes there.
    """
    from rcpo.system import distributed

    token = secrets.token_hex(8)
    if distributed.is_main() and distributed.world_size() > 1:
        assert run_dir is not None
        (run_dir / _TOKEN).write_text(token, encoding="ascii")
    name, token = distributed.broadcast_object((str(run_dir), token))
    folder = Path(name)
    blind = None
    if not distributed.is_main() and not _sees(folder / _TOKEN, token):
        blind = f"{node_name()} (rank {distributed.rank()})"
    found = [node for node in distributed.gather_objects(blind) if node is not None]
    if distributed.is_main():
        (folder / _TOKEN).unlink(missing_ok=True)
    if found:
        raise ConfigError(
            f"{found[0]} does not see what rank 0 writes in {folder}: choose a hydra.run.dir on a file "
            "system that all nodes share"
        )
    return folder


def _sees(path: Path, token: str) -> bool:
    end = time.monotonic() + _VISIBLE_SECONDS
    while time.monotonic() < end:
        try:
            if path.read_text(encoding="ascii") == token:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False
