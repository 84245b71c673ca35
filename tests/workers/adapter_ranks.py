"""Trains adapters some steps on however many ranks there are, once for each case.

Usage: adapter_ranks.py MODEL PAIRS ADAPTER OUTPUT CASES; CASES is a JSON list of objects with the keys of
`configuration`. Rank 0 writes, by case, its rows and the adapter in final/ to OUTPUT/result.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rcpo.config.schema import AdapterConfig, RunConfig
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

STEPS = 3
NAMES = ("loss", "grad_norm", "logratios/chosen", "logratios/rejected", "rc/alpha", "dynamics/score_cosine")


def configuration(
    model: str,
    pairs: str,
    adapter: str,
    *,
    stage: int = 0,
    mode: str = "precompute",
    tuned: bool = False,
    quantization: str | None = None,
    checkpointing: bool = False,
    offload: bool = False,
    dtype: str = "fp32",
) -> RunConfig:
    config = RunConfig(adapter=AdapterConfig(name="lora", path=adapter if tuned else None))
    config.wandb.mode, config.adapter.quantization, config.train.dtype = "disabled", quantization, dtype
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.train.batch_size, config.train.micro_batch_size, config.optim.lr = 8, 4, 1e-2
    config.train.gradient_checkpointing, config.engine.stage = checkpointing, stage
    config.engine.offload_parameters = config.engine.offload_optimizer = offload
    config.reference.mode, config.reference.cache = mode, "off"
    config.rc.enabled = True
    return config


def run(config: RunConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    rows = [trainer.train_step() for _ in range(STEPS)]
    trainer.save_final()
    weights = load_file(folder / "final" / "adapter_model.safetensors")
    return {
        "rows": [{name: row[name] for name in NAMES} for row in rows],
        "adapter": {name: float(value.double().norm()) for name, value in sorted(weights.items())},
        "shapes": sorted(str(tuple(value.shape)) for value in weights.values()),
    }


def main() -> None:
    model, pairs, adapter, output, cases = sys.argv[1:]
    distributed.initialize()
    results = {}
    for case in json.loads(cases):
        name = " ".join(f"{key}={value}" for key, value in case.items())
        results[name] = run(configuration(model, pairs, adapter, **case), Path(output) / name)
    if distributed.is_main():
        Path(output, "result.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
