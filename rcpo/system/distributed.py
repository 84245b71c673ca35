"""Ranks, reductions and seeds: the only module that talks to torch.distributed.

A process alone is a group of one, so no caller asks whether it is distributed.
"""

from __future__ import annotations

import base64
import gc
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_BEAT = 2.0  # seconds between signs of life to ranks that wait
LOCAL = "RCPO_LOCAL_RANK"  # the launcher's LOCAL_RANK
BROADCAST_ELEMENTS = 1 << 22  # a piece of an array on the device


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", device_index(local_rank(), torch.cuda.device_count()))
    return torch.device("cpu")


def device_name(*, model: bool) -> str:
    """The kind of this rank's device; with `model` that of a GPU, as its driver names it."""
    where = device()
    return torch.cuda.get_device_name(where) if model and where.type == "cuda" else where.type


def local_rank() -> int:
    """This process's place among those of its node; 0 where no launcher gave it one."""
    return int(os.environ.get(LOCAL) or os.environ.get("LOCAL_RANK") or "0")


def device_index(local: int, visible: int) -> int:
    """The GPU of a node's process: the only one that it sees, or the one of its number."""
    return 0 if visible == 1 else local


def meeting_store(*, holds: bool, seconds: float) -> Any:
    """The key-value store at the launcher's address, for ranks that are not in a group yet.

    `holds`: this process serves it, unless the launcher's agent does. Raises RuntimeError where the address
    cannot be served, or reached within some seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=holds and not by_agent,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # an agent that starts its ranks again may keep its store
    return _prefixed(f"rcpo-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _prefixed(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def initialize(timeout_minutes: float = 30, store: Any = None) -> None:
    """Join the process group that the launcher's environment describes; alone where there is none.

    A collective operation that some rank does not join within the time fails on the others. `store` is where
    the ranks have met (None: they meet where the environment says).
    """
    alone = int(os.environ.get("WORLD_SIZE") or "1") == 1
    where = device()
    # DeepSpeed takes it for the number of the GPU, which is another one where each process sees its own alone
    os.environ.setdefault(LOCAL, str(local_rank()))
    os.environ["LOCAL_RANK"] = str(local_rank() if where.index is None else where.index)
    if dist.is_initialized():
        return
    if where.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    if alone:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    met: dict[str, Any] = {}
    if store is not None:
        met = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        met["store"] = _prefixed("group", store)
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **met)


def shutdown() -> None:
    """Leave the process group."""
    # DeepSpeed's engines refer to themselves; left to the interpreter's end, their threads at times abort it
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank speaks and writes."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line for the user, from the main rank."""
    if is_main():
        print(line, flush=True)


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on the device it came from."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, on the device it came from."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def _reduce(tensor: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return tensor
    total = tensor.to(device(), copy=True)
    dist.all_reduce(total, operation)
    return total.to(tensor.device)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_array(values: np.ndarray) -> np.ndarray:
    """Rank 0's values, on every rank; the others pass an array of that shape (T,) and type to fill."""
    if world_size() == 1:
        return values
    for start in range(0, len(values), BROADCAST_ELEMENTS):
        part = torch.from_numpy(np.array(values[start : start + BROADCAST_ELEMENTS])).to(device())
        dist.broadcast(part, src=0)
        if not is_main():
            values[start : start + len(part)] = part.cpu().numpy()
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_alone(task: Callable[[], None]) -> None:
    """Run a task on rank 0 while the others wait, for longer than a collective operation may take."""
    if world_size() == 1:
        task()
        return
    if not is_main():
        while not broadcast_object(None):
            pass
        return
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(task)
        done = False
        while not done:
            wait([running], timeout=_BEAT)
            done = broadcast_object(running.done())
    running.result()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch alike on all ranks; `deterministic` refuses kernels that are not."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when the first matrix is multiplied
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers asks for it
        torch.use_deterministic_algorithms(True)


def rng_state() -> dict[str, Any]:
    """This rank's random states (Python, NumPy, torch, CUDA), ready for JSON."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave; a CUDA state is ignored where there is no GPU."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
