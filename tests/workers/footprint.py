"""What training takes in truth: bytes of the engine's tensors, DeepSpeed's communication log, peak memory.

Usage: footprint.py MODEL PAIRS OUTPUT GROUPS [SMALL]
SMALL is a model of next to no size: a run of it comes first, so that no program text counts as the model's.
GROUPS is a JSON list of [RANKS, CONFIGURATIONS], one after the other; CONFIGURATIONS are objects with keys of
the run ("train.dtype") and their values; keys of node "zero" go to DeepSpeed. Each rank writes
OUTPUT.RANKS.RANK: a JSON list with an object for each. Ranks are forks of this process, so that libraries are
imported once.
"""

import ctypes
import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.multiprocessing
from deepspeed.comm.comm import comms_logger

from rcpo.config.schema import RunConfig
from rcpo.config.validation import validate
from rcpo.engine.pieces import PERSISTS
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
STEPS = 3  # under ZeRO-3 the first two record the order of the modules


def configuration(model: str, pairs: str, changes: dict[str, Any]) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.reference.cache = "off"
    config.train.max_steps = STEPS
    limits = {}
    for key, value in changes.items():
        node, _, leaf = key.rpartition(".")
        if node == "zero":
            limits[leaf] = value
        else:
            setattr(getattr(config, node), leaf, value)
    # what is planned is each weight's gathering; DeepSpeed's own tests are about those that stay whole
    config.engine.deepspeed = {"zero_optimization": {PERSISTS: 0, **limits}}
    validate(config)
    return config


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def storages(value: Any) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors, wherever they are nested."""
    found = (tensor.untyped_storage() for tensor in tensors(value))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def engine_bytes(running: Any) -> dict[str, int]:
    """Bytes of what lives between steps (weights, optimizer) and of gradients, as they are now."""
    optimizer = running.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(running.module.parameters())
    partitioned = hasattr(parameters[0], "ds_tensor")
    weights = storages([p.ds_tensor if partitioned else p.data for p in parameters])
    masters = [[g["params"] for g in inner.param_groups]]
    masters += [getattr(optimizer, name, []) for name in ("fp32_groups", "fp32_partitioned_groups_flat")]
    state = storages(masters) | storages(list(inner.state.values()))
    gradients: list[Any] = [p.grad for p in [*parameters, *tensors(masters)]]
    for name in ("averaged_gradients", "grad_partitions_flat_buffer"):
        gradients.append(getattr(optimizer, name, None))
    return {
        "weights": sum(weights.values()),
        "optimizer": sum(size for key, size in state.items() if key not in weights),
        "gradients": sum(storages(gradients).values()),
    }


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(method: Any, name: str, peaks: dict[str, int], baseline: int) -> Any:
    """The method, which then notes the most memory during any of its calls."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        reset_peak()
        result = method(*args, **kwargs)
        peaks[name] = max(peaks.get(name, 0), memory("VmHWM") - baseline)
        return result

    return watched


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    baseline = memory("VmRSS")
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    running = session.engine._engine
    deepspeed.comm.configure(enabled=True, prof_all=True)
    before: dict[str, int] = {}
    peaks: dict[str, int] = {}
    step = session.engine.step

    def watched() -> Any:
        before.update(engine_bytes(running))
        return step()

    session.engine.step = watched  # type: ignore[method-assign]
    for name in ("forward", "backward", "step"):
        setattr(session.engine, name, peak_of(getattr(session.engine, name), name, peaks, baseline))
    shapes: list[Any] = []
    own: list[int] = []
    reduce = distributed._reduce
    distributed._reduce = lambda tensor, operation: own.append(tensor.nbytes) or reduce(tensor, operation)
    for _ in range(STEPS):
        comms_logger.comms_dict.clear()
        own.clear()
        peaks.clear()
        trainer.train_step()
    distributed._reduce = reduce
    for positions in session.rank_microbatches(STEPS - 1):
        batch = session.collate(session.datasets.train, positions)
        shapes.append([*batch.input_ids.shape, len(batch.labels), batch.segments is not None])
    result = {
        "between": engine_bytes(running),
        "before_step": before,
        "communication": sent(),
        "own": sorted(own),
        "peaks": peaks,
        "baseline": baseline,
        "shapes": shapes,
    }
    session.engine.close()
    return result


def sent() -> list[list[Any]]:
    """The last step's collectives as DeepSpeed logged them: name, bytes of a message, count."""
    log = comms_logger.comms_dict
    return sorted([name, size, entry[0]] for name, sizes in log.items() for size, entry in sizes.items())


def run(
    rank: int,
    port: int,
    ranks: int,
    wanted: list[dict[str, Any]],
    model: str,
    pairs: str,
    output: str,
    small: list[str],
) -> None:
    """One rank of a group."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.initialize()
    folder, results = Path(output).parent, []
    for changes in wanted:
        for first in small:
            measure(configuration(first, pairs, changes), folder)
            gc.collect()
        results.append(measure(configuration(model, pairs, changes), folder))
    Path(f"{output}.{ranks}.{rank}").write_text(json.dumps(results))
    distributed.shutdown()


def main() -> None:
    model, pairs, output, groups, *small = sys.argv[1:]
    # freed memory goes back at once, so that a process's size is that of its tensors
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(threshold, 65536) == 1
    for ranks, wanted in json.loads(groups):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (port, ranks, wanted, model, pairs, output, small)
        torch.multiprocessing.start_processes(run, arguments, nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main()
