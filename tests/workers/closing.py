"""Train a step at each ZeRO stage and in each precision, and close the engine; print how many weights are
left, and how many modules DeepSpeed believed to be running before.

    python closing.py MODEL
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

from rcpo.config.schema import RunConfig
from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.engine.zero import Engine
from rcpo.models.loading import DTYPES, load_model
from rcpo.models.policy import Policy
from rcpo.system import distributed


def trained_and_closed(model: Path, stage: int, dtype: str) -> tuple[list[weakref.ref[torch.Tensor]], int]:
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
    running = len(FWD_MODULE_STACK)
    engine.close()
    return weights, running


def main() -> None:
    distributed.initialize()
    left = {}
    for stage in range(4):
        for dtype in ("fp32", "bf16"):
            weights, running = trained_and_closed(Path(sys.argv[1]), stage, dtype)
            gc.collect()
            left[f"{stage} {dtype}"] = [sum(weight() is not None for weight in weights), running]
    print(json.dumps(left))


if __name__ == "__main__":
    main()
