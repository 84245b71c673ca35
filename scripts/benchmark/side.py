"""One side of a measurement, processes that take a step when asked to; and what many steps come to."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from inputs import Size

from rcpo.system.machine import limit_waiting

ROOT = Path(__file__).resolve().parents[2]

Json = dict[str, Any]

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # a side's ranks are its own


class Side:
    """One side: its processes, asked together for each step.

    Several sides start at the same time, before the warm-up ends.
    """

    def __init__(
        self, folder: Path, size: Size, side: str = "rcpo", processes: int = 1, **settings: Any
    ) -> None:
        threads = settings.setdefault("threads", max(1, len(os.sched_getaffinity(0)) // processes))
        settings |= {"side": side, "folder": str(folder), "size": asdict(size), "processes": processes}
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        environment = inherited | {
            "OMP_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        limit_waiting(environment)  # as the command does; the other side soon has its turn
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= address | {"WORLD_SIZE": str(processes)}
        self._log = folder / f"{side}-{os.urandom(4).hex()}.log"
        self._processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / "scripts" / "benchmark/worker.py"), json.dumps(settings)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    env=environment | own,
                )  # fmt: skip
            self._processes.append(process)

    @cached_property
    def ready(self) -> Json:
        """What the first process says when it has started, which this waits for."""
        return self._answers()[0]

    def _answers(self) -> list[Json]:
        answers = []
        for process in self._processes:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                lines = "\n".join(self._log.read_text(errors="replace").split("\n")[-25:])
                self.close()
                raise SystemExit(f"bench: a side ended; its log {self._log} ends with\n{lines}")
            answers.append(json.loads(line))
        return answers

    def step(self, number: int, variant: str = "rc") -> Json:
        """Takes one step; the slowest process's time and phases, the largest one's memory."""
        _ = self.ready  # it may still be starting
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"step": number, "variant": variant}) + "\n")
            process.stdin.flush()
        answers = self._answers()
        slowest = max(answers, key=lambda answer: answer["seconds"])
        return slowest | {"peak": max(answer["peak"] for answer in answers)}

    def close(self) -> None:
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def summary(answers: list[Json], base: list[Json]) -> Json:
    """Medians of a side; a ratio is the median over steps of its time by the base's in the same step.

    The processor's seconds tell more than the clock's where other processes use the same cores.
    """

    def ratio(key: str) -> float:
        return median(own[key] / other[key] for own, other in zip(answers, base, strict=True))

    fastest = min(own["seconds"] for own in answers)
    return {
        "seconds": median(own["seconds"] for own in answers),
        "fastest": fastest,
        "ratio": ratio("seconds"),
        "cpu_seconds": median(own["cpu_seconds"] for own in answers),
        "cpu_ratio": ratio("cpu_seconds"),
        "fastest_ratio": fastest / min(other["seconds"] for other in base),
        "peak": max(own["peak"] for own in answers),
        "all_seconds": [own["seconds"] for own in answers],
    }


def machine() -> Json:
    """What the numbers depend on, and nothing that names the machine."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
