"""Prepares a run's reference on several ranks in four ways, and compares it with a held model's log-probs.

Usage: reference_ranks.py MODEL REFERENCE PAIRS FOLDER STAGES; writes FOLDER/result.json.
"first" computes and "second" reads; "apart" gives each rank a folder of its own, as two machines that share
no disk have; "off" keeps nothing.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from rcpo.config.schema import RunConfig
from rcpo.reference.rows import StoredReference
from rcpo.system import distributed
from rcpo.training.session import Session


def configuration(model: str, reference: str, pairs: str, stage: int) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path, config.reference.path = "local", model, reference
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.train.batch_size, config.train.micro_batch_size = 8, 4
    config.eval.batch_size = 5
    config.data.layout = "separate"
    config.engine.stage = stage
    return config


def record(config: RunConfig, cache: str, folder: Path) -> dict[str, object]:
    config.reference.cache, config.reference.mode = cache, "precompute"
    said: list[str] = []
    session = Session(config, folder, training=True)
    session.prepare_reference(said.append)
    config.reference.mode = "model"
    held = Session(config, folder, training=True)
    held.prepare_reference()
    stored, model = session.forward.reference, held.forward.reference
    assert isinstance(stored, StoredReference) and model is not None
    worst, total = torch.zeros(1), torch.zeros(1)
    for batch in session.eval_batches(session.datasets.train):
        real = batch.weights[batch.sequences % batch.num_pairs]
        worst = torch.maximum(worst, ((stored(batch) - model(batch)) * real).abs().max())
        total += stored(batch).sum()
    mapped = distributed.gather_objects(isinstance(stored._logps, np.memmap))
    return {
        "said": " | ".join(said),
        "difference": float(distributed.reduce_max(worst)),
        "total": float(distributed.reduce_sum(total)),
        "mapped": sum(mapped),
    }


def main() -> None:
    model, reference, pairs, folder, stages = sys.argv[1:]
    distributed.initialize()
    configurations = {
        stage: configuration(model, reference, pairs, int(stage)) for stage in stages.split(",")
    }
    caches = {
        "first": f"{folder}/shared",
        "second": f"{folder}/shared",
        "apart": f"{folder}/rank-{distributed.rank()}",
        "off": "off",
    }
    results = {
        f"{name} {stage}": record(config, cache, Path(folder))
        for stage, config in configurations.items()
        for name, cache in caches.items()
    }
    if distributed.is_main():
        Path(folder, "result.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
