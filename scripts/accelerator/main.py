"""Checks and measures rcpo on one GPU; prints tables and writes outputs/gpu/results.json.

    scripts/gpu [--seconds 420] [--only correctness,speed,memory,trl]
    scripts/gpu --device cpu --tiny       # the same in miniature, without a GPU

correctness  bf16 against fp32 on the CPU, the sketch against exact scores, a step with rc=on against rc=off,
             the ZeRO stages against each other, the bits of a resumed run
speed        for each model that fits: tokens/s, share of the measured matrix-product rate, phases of a step,
             what rc=on and rc=loop add, kernels and waits of a step, the kinds of attention
memory       the peak of a step against the plan
trl          TRL's DPOTrainer on pairs of the same lengths

Weights are random, so nothing is downloaded. What is left out, and why, is printed and recorded too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import checks
import speed
from made_up import Shape

from rcpo.system import distributed

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30

REAL = [
    Shape("0.5B", pairs=8, prompt=256, response=256),
    Shape("1.5B", pairs=8, prompt=256, response=256),
    Shape("8B", pairs=8, prompt=256, response=256, lora=True),
    Shape("8B", pairs=8, prompt=256, response=256),
]
# GiB that a run takes at least
NEEDED = {("0.5B", False): 16, ("1.5B", False): 40, ("8B", True): 30, ("8B", False): 135}
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
            result = task()
        except Exception as error:  # noqa: BLE001 - one measurement's failure is a result, and the others go on
            traceback.print_exc()
            self.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None
        finally:
            free()
        self.found[name] = result
        print(f"{name} ({time.monotonic() - began:.0f} s)\n{show(result)}\n", flush=True)
        return result

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
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
            name = f"{shape.name}{' LoRA' if shape.lora else ''}"
            if self._too_large(name, shape):
                continue
            self.measure(
                f"{name}, {shape.pairs} pairs",
                lambda shape=shape: speed.steps(shape, folder, device, peak, tiny),
                takes=60,
            )
        first = (TINY if tiny else REAL)[0]
        self.measure("kinds of attention", lambda: speed.attention(first, folder, device, tiny), takes=60)

    def _too_large(self, name: str, shape: Shape) -> bool:
        needed = NEEDED.get((shape.name, shape.lora))
        if needed is None or self.device.type != "cuda":
            return False
        there = torch.cuda.get_device_properties(self.device).total_memory / GIB
        if there < needed:
            self.skip(name, f"it takes about {needed} GiB, and the GPU has {there:.0f}")
        return there < needed

    def memory(self) -> None:
        if self.device.type != "cuda":
            self.skip("memory", "a process's peak is compared with its plan by tests/footprints.py")
            return
        for shape in REAL[:2]:
            task = partial(speed.memory, shape, self.folder, self.device)
            self.measure(f"memory of {shape.name}", task, takes=30)

    def trl(self) -> None:
        tiny = self.arguments.tiny
        task = partial(speed.trl, (TINY if tiny else REAL)[0], self.folder, self.device, tiny)
        self.measure("TRL's DPOTrainer", task, takes=60)


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


def free() -> None:
    """Give back what a measurement held: DeepSpeed's engines refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def show(result: Any) -> str:
    """A result as lines of a table."""
    if not isinstance(result, dict):
        return f"  {result}"
    width = max(map(len, result))
    return "\n".join(f"  {name:<{width}}  {number(value)}" for name, value in result.items())


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:,.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


PARTS = ("correctness", "speed", "memory", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="models and steps in miniature")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing begins that would take longer")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", default=str(ROOT / "outputs" / "gpu"))
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs a miniature on the CPU")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    distributed.initialize()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, Path(folder))
        for name in wanted:
            getattr(run, name)()
    record = {**run.found, "skipped": run.skipped, "seconds": time.monotonic() - run.began}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(run.found) - 2} measurements, {len(run.skipped)} left out; {out / 'results.json'}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
