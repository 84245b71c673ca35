"""Loads a model as a session does on several ranks, and says what it took of this rank's memory."""

import ctypes
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch

from rcpo.config.schema import RunConfig
from rcpo.engine.load import read_model
from rcpo.engine.zero import Engine
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_model
from rcpo.models.policy import Policy
from rcpo.system import distributed

M_MMAP_THRESHOLD = -3  # of mallopt(3)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most anonymous memory while it runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous()
        self.done = False

    def run(self) -> None:
        while not self.done:
            self.most = max(self.most, anonymous())
            time.sleep(0.001)

    def end(self) -> int:
        self.done = True
        self.join()
        return self.most - self.before


def measure(folder: Path, stages: list[int], output: Path) -> None:
    """Rank R writes OUTPUT-R.json, for each of the stages, in bytes.

    `peak` is the most anonymous memory over that before (mapped files are the kernel's to drop), `whole` the
    model's own size, and `largest` its largest parameter. `logps` are the loaded policy's for eight tokens.
    """
    # an allocator that keeps what was freed would count it as taken
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) == 1
    load_model(folder.parent / "small", RunConfig().model)  # so that modules and code are in memory already
    records = [loaded(folder, stage) for stage in stages]
    Path(f"{output}-{distributed.rank()}.json").write_text(json.dumps(records))


def loaded(folder: Path, stage: int) -> dict[str, Any]:
    config = RunConfig()
    config.engine.stage = stage
    peak = Peak()
    peak.start()
    model = read_model(ModelSource(folder), config)
    took = peak.end()
    sizes = [getattr(p, "ds_numel", p.numel()) * 4 for p in model.parameters()]
    engine = Engine(Policy(model), config)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logps = engine.policy(ids, torch.arange(8)[None], predictors=torch.arange(7), labels=ids[0, 1:])[0]
    engine.close()
    return {"peak": took, "whole": sum(sizes), "largest": max(sizes), "logps": logps.tolist()}
