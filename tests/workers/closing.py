"""Train a step at each ZeRO stage and in each precision, close the engine, and print which weights are left.

    python closing.py MODEL
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

import torch

from rcpo.config.schema import RunConfig
from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.engine.zero import Engine
from rcpo.models.loading import DTYPES, load_model
from rcpo.models.policy import Policy
from rcpo.system import distributed


def trained_and_closed(model: Path, stage: int, dtype: str) -> list[weakref.ref[torch.Tensor]]:
    config = RunConfig()
    config.engine.stage, config.train.dtype = stage, dtype
    policy = Policy(load_model(model, config.model).to(DTYPES[dtype]))
    policy.recompute_activations()
    engine = Engine(policy, config, total_steps=1)
    batch = collate([Example("a pair", [5, 6], [7, 8], [9])], 0, layout="separate")
    engine.train()
    engine.backward(engine.forward(batch)[0].sum(), last=True)
    engine.step()
    weights = [weakref.ref(p) for p in engine.policy.parameters()]
    engine.close()
    return weights


def main() -> None:
    distributed.initialize()
    left = {}
    for stage in range(4):
        for dtype in ("fp32", "bf16"):
            weights = trained_and_closed(Path(sys.argv[1]), stage, dtype)
            gc.collect()
            left[f"{stage} {dtype}"] = sum(weight() is not None for weight in weights)
    print(json.dumps(left))


if __name__ == "__main__":
    main()
