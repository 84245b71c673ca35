"""Loads a model as a session does on several ranks, and says what it took of this rank's memory.

Usage: partitioned_loading.py MODEL STAGE OUTPUT; rank R writes OUTPUT-R.json, in bytes: `peak`, the most
anonymous memory over that before (mapped files are the kernel's to drop), `whole`, the model's own size, and
`largest`, its largest parameter. `logps` are the loaded policy's for eight tokens.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch

from rcpo.config.schema import RunConfig
from rcpo.engine.load import read_model
from rcpo.engine.zero import Engine
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_model
from rcpo.models.policy import Policy
from rcpo.system import distributed


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


def main() -> None:
    folder, stage, output = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    distributed.initialize()
    config = RunConfig()
    config.engine.stage = stage
    load_model(folder.parent / "small", config.model)  # so that modules and their code are in memory already
    peak = Peak()
    peak.start()
    model = read_model(ModelSource(folder), config)
    took = peak.end()
    sizes = [getattr(p, "ds_numel", p.numel()) * 4 for p in model.parameters()]
    engine = Engine(Policy(model), config)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logps = engine.policy(ids, torch.arange(8)[None], predictors=torch.arange(7), labels=ids[0, 1:])[0]
    record = {"peak": took, "whole": sum(sizes), "largest": max(sizes), "logps": logps.tolist()}
    Path(f"{output}-{distributed.rank()}.json").write_text(json.dumps(record))
    distributed.shutdown()


if __name__ == "__main__":
    main()
