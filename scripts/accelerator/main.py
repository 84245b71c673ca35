"""Checks and measures rcpo on one GPU; prints tables and writes outputs/gpu/results.json.

    scripts/gpu [--seconds 450] [--only correctness,speed,memory,trl,attention]
    scripts/gpu --device cpu --tiny       # the same in miniature, without a GPU

correctness  bf16 against fp32 on the CPU, the sketch against exact scores, a step with rc=on against rc=off,
             the ZeRO stages against each other, the bits of a resumed run
speed        for each model that fits: tokens/s, share of the measured matrix-product rate, phases of a step,
             what rc=on and rc=loop add, kernels and waits of a step, the peak of memory and the plan's
memory       the peak of a step against the plan, from an empty device
trl          TRL's DPOTrainer on pairs of the same lengths
attention    a step with each kind; last, because FlexAttention is compiled

Weights are random, so nothing is downloaded. What is left out, and why, is printed and recorded too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import checks
import speed
from made_up import Pairs, Shape, run_config

from rcpo.engine.backend import refuse_older_deepspeed
from rcpo.errors import ConfigError
from rcpo.system import distributed

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds between the reminders that a measurement's time is up
GIB = 2**30

REAL = [
    Shape("0.5B", pairs=8, prompt=256, response=256),
    Shape("8B", pairs=8, prompt=256, response=256, optimizer="sgd"),
    Shape("8B", pairs=32, micro=8, prompt=256, response=256, optimizer="sgd", compiled=True),
    Shape("0.5B", pairs=8, prompt=256, response=256, compiled=True),
    Shape("8B", pairs=8, prompt=256, response=256, lora=True),
    Shape("1.5B", pairs=8, prompt=256, response=256),
    Shape("8B, 8 layers", pairs=8, prompt=256, response=256),
]
ROOM = 0.94  # of the GPU's memory: the rest is CUDA's, NCCL's, and what lies between tensors
SMALLEST = Shape("tiny", pairs=4, prompt=12, response=12)
TINY = [SMALLEST, replace(SMALLEST, lora=True, checkpointing=False)]


class Run:
    """The measurements that were asked for, as far as time and memory go."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.began = time.monotonic()
        self.device = torch.device(arguments.device)
        self.found: dict[str, Any] = {"machine": machine(self.device), "tiny": arguments.tiny}
        self.skipped: list[str] = []
        self.out = Path(arguments.out) / "results.json"

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.arguments.seconds - (time.monotonic() - self.began)

    def measure(self, name: str, task: Callable[[], Any], *, takes: float) -> Any:
        """The task's result, recorded under its name; None where it failed or there was no time."""
        if self.left < takes and not self.arguments.tiny:
            self.skip(name, f"{self.left:.0f} s are left, and it takes about {takes:.0f}")
            return None
        began = time.monotonic()
        try:
            with limited(None if self.arguments.tiny else max(2 * takes, 60)):
                result = task()
        except Exception as error:  # noqa: BLE001 - one measurement's failure is a result, and the others go on
            traceback.print_exc()
            self.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None
        finally:
            self._free(name)
        self.found[name] = result
        self.write()
        print(f"{name} ({time.monotonic() - began:.0f} s)\n{show(result)}\n", flush=True)
        return result

    def _free(self, name: str) -> None:
        """Give back what a measurement held; what it did not let go of counts against those that follow."""
        try:
            left = free()
        except Exception as error:  # noqa: BLE001 - after some errors CUDA answers nothing but errors
            self.skip(f"memory after {name}", f"{type(error).__name__}: {error}")
            return
        if left > GIB:
            self.skip(f"memory after {name}", f"{left / GIB:.1f} GiB are still allocated")

    def write(self) -> None:
        """The results so far: an error or a time limit may end everything."""
        record = {**self.found, "skipped": self.skipped, "seconds": time.monotonic() - self.began}
        self.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        self.write()
        print(f"{name}: left out ({reason})\n", flush=True)

    def correctness(self) -> None:
        tiny, folder = self.arguments.tiny, self.folder
        self.measure("bf16 against fp32 on the CPU", lambda: checks.precision(self.device, tiny), takes=20)
        self.measure("sketch against exact", lambda: checks.sketch(self.device, tiny), takes=10)
        self.measure("rc=on against rc=off", lambda: checks.calibration(self.device, folder), takes=15)
        self.measure("ZeRO stages", lambda: checks.stages(self.device, folder), takes=40)
        self.measure("resume", lambda: checks.resume(self.device, folder), takes=60)

    def speed(self) -> None:
        tiny, device, folder = self.arguments.tiny, self.device, self.folder
        rate = self.measure("matrix products", lambda: speed.matrix_rate(device, tiny), takes=5)
        peak = None if rate is None else rate["FLOP/s"]
        for shape in TINY if tiny else REAL:
            if self._too_large(shape):
                continue
            self.measure(
                shape.title,
                partial(speed.steps, shape, folder, device, peak, tiny),
                takes=40 + 2.5 * shape.pairs,
            )

    def _too_large(self, shape: Shape) -> bool:
        if self.device.type != "cuda":
            return False
        there = torch.cuda.get_device_properties(self.device).total_memory
        rows = Pairs(shape, run_config(shape, self.folder)).largest()
        needed = speed.planned(shape, rows, self.device)
        if needed > ROOM * there:
            self.skip(shape.title, f"planned are {needed / GIB:.0f} GiB, and the GPU has {there / GIB:.0f}")
        return needed > ROOM * there

    def memory(self) -> None:
        for shape in [SMALLEST] if self.arguments.tiny else [REAL[0]]:
            if not self._too_large(shape):
                task = partial(speed.memory, shape, self.folder, self.device)
                self.measure(f"memory of {shape.title}", task, takes=25)

    def trl(self) -> None:
        tiny = self.arguments.tiny
        task = partial(speed.trl, (TINY if tiny else REAL)[0], self.folder, self.device, tiny)
        self.measure("TRL's DPOTrainer", task, takes=60)

    def attention(self) -> None:
        tiny = self.arguments.tiny
        task = partial(speed.attention, (TINY if tiny else REAL)[0], self.folder, self.device, tiny)
        self.measure("kinds of attention", task, takes=60)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    import deepspeed
    import transformers

    found = {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "deepspeed": deepspeed.__version__, "device": "cpu",
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / GIB, 1)
        found |= {"device": properties.name, "GiB": memory, "cuda": torch.version.cuda}
    return found


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer, so that it cannot take the time of all others.

    And again in what the block goes on to do: a part whose error is recorded must not free those that follow.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds or 0.0, GRACE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def free() -> int:
    """Give back what a measurement held, DeepSpeed's engines refer to themselves; the bytes that are left."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def show(result: Any) -> str:
    """A result as lines of a table."""
    if not isinstance(result, dict):
        return f"  {result}"
    width = max(map(len, result))
    return "\n".join(f"  {name:<{width}}  {number(value)}" for name, value in result.items())


def number(value: Any) -> str:
    """A value in a table, without lists, which are for the file."""
    if isinstance(value, float):
        return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:,.3f}"
    if isinstance(value, dict):
        short = {name: each for name, each in value.items() if not isinstance(each, list)}
        return ", ".join(f"{name} {number(each)}" for name, each in short.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


PARTS = ("correctness", "speed", "memory", "trl", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="models and steps in miniature")
    parser.add_argument("--seconds", type=float, default=450.0, help="nothing begins that would take longer")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", default=str(ROOT / "outputs" / "gpu"))
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs a miniature on the CPU")
    try:
        refuse_older_deepspeed()
    except ConfigError as error:
        parser.error(str(error))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    distributed.initialize()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, Path(folder))
        for name in wanted:
            try:
                getattr(run, name)()
            except Exception as error:  # noqa: BLE001 - the other parts go on
                traceback.print_exc()
                run.skip(name, f"{type(error).__name__}: {error}")
    run.write()
    print(f"{len(run.found) - 2} measurements, {len(run.skipped)} left out; {run.out}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
