"""How fast a step is, where its time goes, and what calibration adds to it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from made_up import BATCHES, Pairs, Shape, architecture, make_pairs, rows_of, run_config, training

from rcpo.method.geometry import passes_on
from rcpo.planner.memory import StepMemory
from rcpo.planner.model import depth, few_layers, parameters
from rcpo.planner.trace import BatchShape, Live, trace
from rcpo.training.dynamics import StepDynamics
from rcpo.training.trainer import Trainer

VARIANTS = {"rc=off": (False, "center", 0), "rc=on": (True, "center", 1), "rc=loop": (True, "loop", 1)}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
GPUS = Path(__file__).resolve().parents[2] / "conf" / "gpu"
ROUNDS_SECONDS = 10.0  # of steps in turn, for each model
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


def nominal_rate(device: torch.device) -> float | None:
    """FLOP/s of dense bf16 products that the GPU's maker states, from conf/gpu; None for a GPU not in it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_properties(device).name.lower()
    files = sorted(GPUS.glob("*.yaml"))
    known = {path.stem.removeprefix("rtx-").partition("-")[0]: path for path in files}
    words = name.replace("-", " ").split()
    return next((float(yaml.safe_load(known[w].read_text())["bf16"]) for w in words if w in known), None)


def steps(shape: Shape, folder: Path, device: torch.device, peak: float | None, tiny: bool) -> dict[str, Any]:
    """A step with rc=off, on and loop in turn on the same batches; phases and operations with rc=on."""
    with training(shape, folder, device) as trainer:
        return _steps(trainer, shape, folder, device, peak, tiny)


def _steps(
    trainer: Trainer, shape: Shape, folder: Path, device: torch.device, peak: float | None, tiny: bool
) -> dict[str, Any]:
    variants = {name: dynamics(trainer, *settings) for name, settings in VARIANTS.items()}
    least, most = (2, 2) if tiny else (3, 40)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1 if tiny else BATCHES):  # each shape is new to the allocator, and to a compiler
        trainer.step = number
        trainer.train_step()
    began = time.perf_counter()
    for number in range(1 + most):
        if number > least and time.perf_counter() - began > ROUNDS_SECONDS:
            break
        names = list(variants)
        for name in names[number % 3 :] + names[: number % 3]:  # each first in turn
            trainer.dynamics, trainer.step = variants[name], number
            taken = clocked(device, trainer.train_step)
            if number:  # in the first round each variant is new
                times[name].append(taken)
    base, flops = median(times["rc=off"]), model_flops(shape, folder, trainer)
    found: dict[str, Any] = {
        "step, s": base,
        "steps": len(times["rc=off"]),
        "tokens/s": shape.tokens / base,
        "layout": trainer.session.layout,
        "model FLOP": flops,
    }
    if device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["planned GiB"] = planned(shape, Pairs(shape, trainer.config).largest(), device) / 2**30
    if stated := nominal_rate(device):
        found["MFU"] = flops / base / stated
    if peak:
        found["share of the matrix rate"] = flops / base / peak
    for name in ("rc=on", "rc=loop"):
        ratios = [own / other for own, other in zip(times[name], times["rc=off"], strict=True)]
        found[f"{name} adds, %"] = 100 * (median(ratios) - 1)
    trainer.dynamics = variants["rc=on"]
    found["phases"] = attempted(lambda: phases(trainer, device))
    found["operations"] = attempted(lambda: operations(trainer, device))
    if device.type == "cuda":
        found["device"] = attempted(lambda: longest(trainer, device))
    return found


def attempted(task: Callable[[], Any]) -> Any:
    """A task's result, or how it failed: what was measured before it is kept."""
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - a part that a machine does not allow is a result
        return f"{type(error).__name__}: {error}"


def dynamics(trainer: Trainer, enabled: bool, rule: str, every: int) -> StepDynamics:
    config = copy.deepcopy(trainer.config)
    config.rc.enabled, config.rc.rule, config.dynamics.every = enabled, rule, every
    return StepDynamics(
        config, trainer.objective, trainer.engine, trainer.session.batches, fresh_signals=True
    )


def model_flops(shape: Shape, folder: Path, trainer: Trainer) -> float:
    """What a step computes on average, without what checkpointing computes again."""
    config = run_config(replace(shape, checkpointing=False), folder)
    settings = architecture(shape.name)
    policy = few_layers(settings, config)
    policy.passes = passes_on(trainer.engine.device)
    total = 0.0
    for step in range(BATCHES):
        for positions in trainer.session.rank_microbatches(step):
            rows = rows_of(trainer.session.collate(None, positions))
            traced = trace(policy, rows, None, training=True, depth=depth(settings))
            total += traced.forward_work.flops + traced.backward_work.flops
    return total / BATCHES


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
    rows = profiled(trainer.train_step, device)
    if device.type != "cuda":
        return {"operators": sum(count for name, count in rows.items() if name.startswith("aten::"))}
    nothing = profiled(lambda: None, device)  # the profiler and the end of each task wait, too
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    found = {
        "kernels": _counted(rows, *LAUNCHES),
        "waits": _counted(rows, *waits) - _counted(nothing, *waits),
        "copies to the host": sum(count for name, count in rows.items() if "Memcpy DtoH" in name),
    }
    if not found["kernels"]:
        raise RuntimeError("the profiler saw no kernel; counting needs CUPTI, and the right to use it")
    return found


def longest(trainer: Trainer, device: torch.device, many: int = 40) -> dict[str, Any]:
    """Seconds of a step's kernels, which is less than the step's where the host is slower than the device;
    those that take most, with their shares.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.train_step()
        wait(device)
    rows = sorted(profiler.key_averages(), key=lambda row: row.self_device_time_total, reverse=True)
    whole = sum(row.self_device_time_total for row in rows)
    kernels = [
        {"kernel": row.key[:120], "times": row.count, "share": row.self_device_time_total / whole}
        for row in rows[:many]
    ]
    return {"kernels, s": whole / 1e6, "longest kernels": kernels}


def _counted(rows: dict[str, int], *starts: str) -> int:
    return sum(count for name, count in rows.items() if name.startswith(starts))


def profiled(task: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """How often each event occurs while a task runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        task()
        wait(device)
    return {row.key: row.count for row in profiler.key_averages()}


def attention(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of a step by the layout of rows and the kind of attention."""
    found: dict[str, Any] = {}
    kinds = [("shared", "sdpa"), ("separate", "sdpa")]
    if device.type == "cuda":
        kinds.append(("shared", "flex_attention"))
    for layout, kind in kinds:
        own = replace(shape, layout=layout, attention=kind)
        found[f"{layout} rows, {kind}"] = attempted(lambda own=own: seconds(own, folder, device, tiny))
    return found


def seconds(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> float:
    """Of a step, once each batch has been seen, and compiled for."""
    with training(shape, folder, device) as trainer:
        times = []
        for number in range(3 if tiny else BATCHES + 4):
            trainer.step = number
            times.append(clocked(device, trainer.train_step))
    return median(times[2 if tiny else BATCHES :])


@cache
def planned(shape: Shape, rows: BatchShape, device: torch.device) -> int:
    """Bytes at the peak of a step whose largest micro-batch has these rows."""
    config, settings = run_config(shape, Path()), architecture(shape.name)
    policy = few_layers(settings, config)
    policy.passes = passes_on(device)
    sketch = min(config.rc.sketch or settings.vocab_size, settings.vocab_size)
    passes = trace(policy, rows, sketch, training=True, depth=depth(settings))
    scoring = trace(policy, rows, None, training=False, depth=depth(settings))
    weights = parameters(settings, config)
    step = StepMemory(
        config,
        weights,
        ranks=1,
        microbatches=config.train.accumulation(1),
        training=passes,
        scoring=scoring,
        gathered=None,
        scores=2 * sketch * settings.hidden_size,
        on_gpu=device.type == "cuda",
    )
    return step.worst.device_bytes


def memory(shape: Shape, folder: Path, device: torch.device) -> dict[str, Any]:
    """The peak of a step against the plan of it; on a CPU that of the tensors that operators make."""
    plan = planned(shape, Pairs(shape, run_config(shape, folder)).largest(), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _few_steps(shape, folder, device)
        measured = torch.cuda.max_memory_allocated(device) - before
    else:
        with (live := Live(iter(()))):
            _few_steps(shape, folder, device)
        measured = live.peak
    more = 100 * (plan / measured - 1)
    return {"measured GB": measured / 1e9, "planned GB": plan / 1e9, "planned − measured, %": more}


def _few_steps(shape: Shape, folder: Path, device: torch.device) -> None:
    """Each batch once, with new moments in the first."""
    with training(shape, folder, device) as trainer:
        for number in range(BATCHES):
            trainer.step = number
            trainer.train_step()


def trl(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of a step of TRL's DPOTrainer on pairs of the same lengths, and of rcpo's.

    TRL trains weights in bf16 as they are, or weights in fp32 under autocast; with bf16, rcpo keeps them in
    fp32, too.
    """
    found: dict[str, Any] = {}
    for dtype in dict.fromkeys((shape.dtype, "fp32")):
        found[f"weights in {dtype}"] = attempted(
            lambda dtype=dtype: trl_step(replace(shape, dtype=dtype), folder, device, tiny)
        )
    found["rcpo"] = seconds(shape, folder, device, tiny)
    return found


def trl_step(shape: Shape, folder: Path, device: torch.device, tiny: bool) -> float:
    """Seconds of a step of TRL's DPOTrainer, reference log-probs made before."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rcpo.config.schema import ModelConfig
    from rcpo.models.loading import DTYPES, model_folder

    count = 3 if tiny else 8
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
    return median(times[count // 2 :])
