"""How fast a step is, where its time goes, and what calibration adds to it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from made_up import Shape, architecture, make_pairs, make_trainer, run_config

from rcpo.method.geometry import passes_on
from rcpo.planner.memory import StepMemory
from rcpo.planner.model import depth, few_layers, parameters
from rcpo.planner.trace import BatchShape, trace
from rcpo.training.dynamics import StepDynamics
from rcpo.training.trainer import Trainer

VARIANTS = {"rc=off": (False, "center", 0), "rc=on": (True, "center", 1), "rc=loop": (True, "loop", 1)}
PHASES = {"data": "collate", "forward": "forward", "backward": "backward", "optimizer": "step"}


def matrix_rate(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The rate of a large product of random matrices: what a step's is compared with."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 256 if tiny else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [clocked(device, lambda: left @ right) for _ in range(3 if tiny else 20)]
    return {"size": size, "dtype": str(dtype), "FLOP/s": 2 * size**3 / median(times[1:])}


def clocked(device: torch.device, task: Callable[[], Any]) -> float:
    """Seconds of a task, with the device's work before and after it done."""
    wait(device)
    began = time.perf_counter()
    task()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps(shape: Shape, folder: Path, device: torch.device, peak: float | None, tiny: bool) -> dict[str, Any]:
    """A step with rc=off, on and loop in turn on the same batches; phases and operations with rc=on."""
    trainer = make_trainer(shape, folder, device)
    variants = {name: dynamics(trainer, *settings) for name, settings in VARIANTS.items()}
    rounds, warm = (2, 1) if tiny else (6, 2)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm + rounds):
        for name, variant in variants.items():
            trainer.dynamics, trainer.step = variant, number
            taken = clocked(device, trainer.train_step)
            if number >= warm:
                times[name].append(taken)
    base, flops = median(times["rc=off"]), model_flops(shape, folder, trainer)
    found: dict[str, Any] = {
        "step, s": base,
        "tokens/s": shape.tokens / base,
        "layout": trainer.session.layout,
        "model FLOP": flops,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if peak:
        found["share of the matrix rate"] = flops / base / peak
    for name in ("rc=on", "rc=loop"):
        ratios = [own / other for own, other in zip(times[name], times["rc=off"], strict=True)]
        found[f"{name} adds, %"] = 100 * (median(ratios) - 1)
    trainer.dynamics = variants["rc=on"]
    found["phases"] = phases(trainer, device)
    found["operations"] = operations(trainer, device)
    trainer.engine.close()
    return found


def dynamics(trainer: Trainer, enabled: bool, rule: str, every: int) -> StepDynamics:
    config = copy.deepcopy(trainer.config)
    config.rc.enabled, config.rc.rule, config.dynamics.every = enabled, rule, every
    return StepDynamics(
        config, trainer.objective, trainer.engine, trainer.session.batches, fresh_signals=True
    )


def model_flops(shape: Shape, folder: Path, trainer: Trainer) -> float:
    """What a step's batch computes, without what checkpointing computes again."""
    config = run_config(replace(shape, checkpointing=False), folder)
    settings = architecture(shape.name)
    policy = few_layers(settings, config)
    policy.passes = passes_on(trainer.engine.device)
    total = 0.0
    for positions in trainer.session.rank_microbatches(trainer.step):
        batch = trainer.session.collate(None, positions)
        rows = BatchShape(*batch.input_ids.shape, len(batch.labels), batch.segments is not None)
        traced = trace(policy, rows, None, training=True, depth=depth(settings))
        total += traced.forward_work.flops + traced.backward_work.flops
    return total


def phases(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Shares of a step's time; the device is waited for around each phase, so that they do not overlap."""
    seconds = dict.fromkeys(PHASES, 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            seconds[name] += clocked(device, lambda: result.append(function(*args, **kwargs)))
            return result[0]

        return call

    session, engine = trainer.session, trainer.engine
    owners: dict[str, Any] = {name: session if name == "data" else engine for name in PHASES}
    kept = {name: getattr(owner, PHASES[name]) for name, owner in owners.items()}
    for name, owner in owners.items():
        setattr(owner, PHASES[name], timed(name, kept[name]))
    whole = clocked(device, trainer.train_step)
    session.collate = kept["data"]
    for name in ("forward", "backward", "optimizer"):
        delattr(engine, PHASES[name])
    shares = {name: value / whole for name, value in seconds.items()}
    return {**shares, "other": 1 - sum(shares.values())}


def operations(trainer: Trainer, device: torch.device) -> dict[str, int]:
    """Kernels of a step, and the calls that wait for the device, from the profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        trainer.train_step()
        wait(device)
    rows = profiler.key_averages()
    if device.type != "cuda":
        return {"operators": sum(row.count for row in rows if row.key.startswith("aten::"))}
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return {
        "kernels": sum(
            row.count for row in rows if row.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
        ),
        "waits": sum(row.count for row in rows if row.key in waits) - 1,  # the last one is made here
        "copies to the host": sum(row.count for row in rows if "Memcpy DtoH" in row.key),
    }


def attention(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of a step by the layout of rows and the kind of attention."""
    found: dict[str, Any] = {}
    kinds = [("shared", "sdpa"), ("separate", "sdpa")]
    if device.type == "cuda":
        kinds.append(("shared", "flex_attention"))
    for layout, kind in kinds:
        try:
            trainer = make_trainer(replace(shape, layout=layout, attention=kind), folder, device)
            times = [clocked(device, trainer.train_step) for _ in range(3 if tiny else 6)]
            found[f"{layout} rows, {kind}"] = median(times[2:])
            trainer.engine.close()
        except Exception as error:  # noqa: BLE001 - a kind that a version does not have is a result
            found[f"{layout} rows, {kind}"] = f"{type(error).__name__}: {error}"
    return found


def memory(shape: Shape, folder: Path, device: torch.device) -> dict[str, Any]:
    """The peak of a step against the plan of it."""
    torch.cuda.reset_peak_memory_stats(device)
    trainer = make_trainer(shape, folder, device)
    for _ in range(2):
        trainer.train_step()
    measured = torch.cuda.max_memory_allocated(device)
    config, settings = trainer.config, architecture(shape.name)
    batches = [
        trainer.session.collate(None, positions)
        for step in range(2)
        for positions in trainer.session.rank_microbatches(step)
    ]
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    rows = BatchShape(*largest.input_ids.shape, len(largest.labels), largest.segments is not None)
    policy = few_layers(settings, config)
    policy.passes = passes_on(device)
    sketch = config.rc.sketch
    training = trace(policy, rows, sketch, training=True, depth=depth(settings))
    scoring = trace(policy, rows, None, training=False, depth=depth(settings))
    scores = 2 * (sketch or settings.vocab_size) * settings.hidden_size
    weights, micro = parameters(settings, config), len(batches) // 2
    step = StepMemory(config, weights, 1, micro, training, scoring, None, scores, on_gpu=True)
    planned = step.worst.device_bytes
    trainer.engine.close()
    more = 100 * (planned / measured - 1)
    return {"measured GB": measured / 1e9, "planned GB": planned / 1e9, "planned − measured, %": more}


def trl(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of a step of TRL's DPOTrainer: same model and lengths, reference log-probs made before."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rcpo.config.schema import ModelConfig
    from rcpo.models.loading import DTYPES, model_folder

    count = 3 if tiny else 6
    rows = [
        {"prompt_ids": e.prompt, "chosen_ids": e.chosen, "rejected_ids": e.rejected}
        for e in make_pairs(shape, count * shape.pairs)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            times.append(time.perf_counter() - self.began)

    class AsTheyAre(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # already tokens

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(architecture(shape.name), dtype=DTYPES[shape.dtype])
    half = device.type == "cuda"
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=shape.pairs, max_length=None,
        precompute_ref_log_probs=True, bf16=half, gradient_checkpointing=shape.checkpointing, max_steps=count,
        learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=not half,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder(ModelConfig()))
    AsTheyAre(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()  # fmt: skip
    return {"step, s": median(times[1:]), "tokens/s": shape.tokens / median(times[1:])}
