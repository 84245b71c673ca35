"""One side of the benchmark in a process of its own, which takes a step whenever it is asked to.

So two sides alternate step by step on the same machine, and each one's peak memory is its own. Requests and
answers are lines of JSON; whatever the libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Json = dict[str, Any]


class Channel:
    """Requests from stdin, answers to the stdout that this process was started with."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def requests(self) -> Iterator[Json]:
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def memory() -> Json:
    """Bytes: the process's peak since it started or since `reset_peak`, and what it holds now."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, "now": peak}
    found = dict(line.split(":", 1) for line in status.read_text().split("\n") if line.startswith("Vm"))
    return {key: int(found[name].split()[0]) * 1024 for key, name in (("peak", "VmHWM"), ("now", "VmRSS"))}


def reset_peak() -> None:
    """Forgets the peak that Linux keeps; elsewhere it stays that of the whole process."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


class Phases:
    """Exclusive seconds by phase: what runs inside another phase is not counted there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Charges calls of owner.name to a phase."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                result = inner(*args, **kwargs)
                if phase == "communication" and hasattr(result, "wait"):
                    result.wait()  # else its time would be charged to whoever waits
                return result

        static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
        setattr(owner, name, staticmethod(timed) if static else timed)


def serve_rcpo(settings: Json, channel: Channel) -> None:
    """rcpo's own trainer; a request names the variant and the step (whose batch is then the same for all)."""
    from inputs import SEED, Size, data_config
    from published import PublishedCalibration

    import rcpo.training.session
    from rcpo.config.schema import RunConfig
    from rcpo.system import distributed
    from rcpo.training.control import ControlPairs
    from rcpo.training.dynamics import StepDynamics
    from rcpo.training.session import Session
    from rcpo.training.trainer import Trainer

    folder, size = Path(settings["folder"]), Size(**settings["size"])
    config = RunConfig(seed=SEED)
    config.wandb.mode, config.reference.cache = "disabled", str(folder / "cache")
    config.model.name, config.model.path = "local", str(folder / "model")
    config.data = data_config(folder / "pairs.jsonl", size)
    config.data.layout = settings.get("layout", "auto")
    config.eval.batch_size = size.pairs
    config.train.batch_size = size.pairs
    config.train.micro_batch_size = settings.get("micro") or size.pairs // settings.get("processes", 1)
    config.engine.stage, config.optim.lr = settings.get("stage", 0), 1e-6
    if settings.get("frozen_head"):
        load = rcpo.engine.load.read_model

        def frozen(*args: Any) -> Any:
            model = load(*args)
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                embeddings.requires_grad_(False)
            return model

        rcpo.engine.load.read_model = frozen
    distributed.initialize()
    session = Session(config, folder, training=True)
    began = time.perf_counter()
    session.prepare_reference(lambda line: None)
    passed = time.perf_counter() - began
    trainer = Trainer(session)
    phases = Phases()
    if settings.get("phases"):
        watch_phases(phases, trainer)
    variants: dict[str, StepDynamics] = {}
    for name in settings.get("variants", ["rc"]):
        config.rc.enabled = name in ("rc", "loop", "control", "published")
        config.rc.rule = "loop" if name in ("loop", "control") else "center"
        config.dynamics.every = int(name == "dynamics")
        kind, signals = StepDynamics, {"fresh_signals": True}
        if name == "published":
            kind = PublishedCalibration
        if name == "control":  # read at each step here
            config.rc.control.every = 1
            pairs = session.datasets.train
            control = ControlPairs(config, session.engine, pairs, session.batches_at)
            signals = {"fresh_signals": False, "control": control}
        variants[name] = kind(config, session.objective, session.engine, session.batches, **signals)
    parameters = sum(p.numel() for p in session.engine.policy.parameters())
    channel.answer(ready=True, parameters=parameters, layout=session.layout,
                   reference_seconds=passed, **memory())  # fmt: skip
    reset_peak()
    engine: Any = session.engine
    forward = engine._forward
    for request in channel.requests():
        name = request.get("variant", "rc")
        trainer.dynamics, trainer.step = variants[name], request["step"]
        # as rc.geometry=parameters does: DeepSpeed's own forward forbids plain autograd
        engine._forward = engine._engine.module if name == "published" else forward
        phases.seconds.clear()
        began, used = time.perf_counter(), time.process_time()
        with phases("other"):
            row = trainer.train_step()
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        rates = {}
        if settings.get("products"):
            counted = products_of_a_step(trainer, request["step"])
            rates = {"machine_rate": matrix_rate(), "rate": counted / seconds}
        tokens = round(row["tokens_per_second"] * row["step_seconds"])
        channel.answer(seconds=seconds, cpu_seconds=cpu, tokens=tokens, loss=row["loss"],
                       alpha=row.get("rc/alpha"), phases=phases.seconds, **rates, **memory())  # fmt: skip


def matrix_rate(size: int = 1536, repeats: int = 5) -> float:
    """FLOP/s of a large product in fp32: the best of some, as a step's products follow each other."""
    left, right = torch.randn(2, size, size).unbind()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def products_of_a_step(trainer: Any, step: int) -> int:
    """The floating-point operations of the products of a step, which is taken once more."""
    from rcpo.planner.trace import UNCOUNTED

    trainer.step = step
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        trainer.train_step()
    return counter.get_total_flops()


def watch_phases(phases: Phases, trainer: Any) -> None:
    """The phases of a step of rcpo; collectives are waited for where they are started."""
    import rcpo.models.policy
    from rcpo.method.geometry import Sketch
    from rcpo.method.logps import _FusedLogps
    from rcpo.training.dynamics import StepDynamics

    phases.wrap(trainer.session, "collate", "data")
    phases.wrap(trainer.session, "rank_microbatches", "data")
    phases.wrap(trainer.engine, "forward", "forward")
    phases.wrap(trainer.engine, "backward", "backward")
    phases.wrap(trainer.engine, "step", "optimizer")
    phases.wrap(rcpo.models.policy, "token_logps", "head")
    phases.wrap(_FusedLogps, "backward", "head")
    phases.wrap(Sketch, "scores", "geometry")
    phases.wrap(StepDynamics, "__call__", "geometry")
    phases.wrap(StepDynamics, "end", "geometry")
    collectives = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "barrier",
                   "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single")  # fmt: skip
    for name in collectives:
        phases.wrap(torch.distributed, name, "communication")


def serve_trl(settings: Json, channel: Channel) -> None:
    """TRL's DPOTrainer on the same tokens in the same order, fp32, reference precomputed.

    With the setting `rc` it is CalibratedDPOTrainer. TRL's defaults are kept but for what costs time on a
    CPU: checkpointing of activations (on by default) and bf16 autocast (on by default, which rcpo's fp32 is
    not to be compared with). The fused, chunked head is TRL's own default; padding_free falls back by itself
    to padding in this version.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rcpo.integrations.trl import CalibratedDPOTrainer, RewardCalibrationConfig

    folder, size = Path(settings["folder"]), settings["size"]
    kind, calibration = DPOTrainer, {}
    if settings.get("rc"):
        kind, calibration = CalibratedDPOTrainer, {"rc": RewardCalibrationConfig()}
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").open(encoding="utf-8")]
    micro = settings.get("micro") or size["pairs"]
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=size["pairs"] // micro, max_length=size["length"],
        precompute_ref_log_probs=True, bf16=False,
        gradient_checkpointing=settings.get("checkpointing", False),
        optim=settings.get("optim", "adamw_torch"), learning_rate=1e-6, lr_scheduler_type="constant",
        num_train_epochs=1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_num_workers=0, use_cpu=True,
    )  # fmt: skip

    class InOrder(kind):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # already tokens, rcpo's

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class OnRequest(TrainerCallback):
        def __init__(self) -> None:
            self.requests = channel.requests()
            self.began, self.used = 0.0, 0.0

        def wait(self) -> None:
            next(self.requests, None)
            self.began, self.used = time.perf_counter(), time.process_time()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            parameters = sum(p.numel() for p in trainer.model.parameters())
            channel.answer(ready=True, parameters=parameters, **memory())
            reset_peak()
            self.wait()

        def on_log(self, *_: Any, logs: Json, **__: Any) -> None:
            if "loss" not in logs:
                return
            seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.used
            channel.answer(seconds=seconds, cpu_seconds=cpu, loss=logs["loss"], phases={}, **memory())
            self.wait()

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = InOrder(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[OnRequest()],
        **calibration,
    )  # fmt: skip
    trainer.train()


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = Channel()
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    {"rcpo": serve_rcpo, "trl": serve_trl}[settings["side"]](settings, channel)


if __name__ == "__main__":
    main()
