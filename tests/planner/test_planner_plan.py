"""Whole plans: workloads against what a session deals, advice that fits, the command line."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import sums_file, tiny_llama

from rcpo.cli import main
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.planner.advice import nearest
from rcpo.planner.plan import Planner
from rcpo.planner.settings import GpuConfig, PlanConfig
from rcpo.planner.show import show
from rcpo.planner.trace import BatchShape
from rcpo.system import distributed
from rcpo.training.session import Session

GPU = GpuConfig(
    name="small", memory=1e8, bf16=1e13, fp16=1e13, fp32=1e12, bandwidth=1e12, link=1e11, network=1e10,
    host=1e10, host_bandwidth=1e10, host_memory=1e12, per_node=8,
)  # fmt: skip
MEANS = PlanConfig(pairs=1000, prompt_tokens=16, response_tokens=8)


def configuration(folder: Path) -> RunConfig:
    config = RunConfig()
    config.model.name, config.model.path = "local", tiny_llama(folder / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(folder / "pairs.jsonl", 30)
    config.train.batch_size, config.train.micro_batch_size, config.train.epochs = 16, 4, 2
    return config


def test_data_are_counted_as_a_session_deals_them(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    work = Planner(PlanConfig(), None).plan(config, 1).workload
    distributed.initialize()
    session = Session(config, tmp_path, training=True)
    assert (work.pairs, work.steps, work.microbatches) == (30, session.total_steps, 4)
    batches = [
        session.collate(session.datasets.train, positions)
        for step in range(2)
        for positions in session.rank_microbatches(step)
    ]
    sizes = [batch.input_ids.numel() for batch in batches]
    assert work.tokens == sum(sizes) // 2
    largest = batches[sizes.index(max(sizes))]
    assert work.largest == BatchShape(*largest.input_ids.shape, len(largest.labels), shared=True)
    scored = max(session.eval_batches(session.datasets.train), key=lambda batch: batch.input_ids.numel())
    assert work.scored == BatchShape(*scored.input_ids.shape, len(scored.labels), shared=True)


def test_means_stand_for_data_that_are_not_read(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.data.max_length, config.data.max_prompt_length = 64, 40
    work = Planner(MEANS, None).plan(config, 4).workload
    assert work.steps == 2 * 63  # 1000 pairs in batches of 16
    assert work.usual == BatchShape(4, 16 + 8 + 8, 4 * 2 * 8, shared=True)
    assert work.largest == BatchShape(4, 40 + 24 + 24, 4 * 2 * 24, shared=True)
    assert work.tokens == 4 * 4 * 32
    with pytest.raises(ConfigError, match="give both"):
        Planner(PlanConfig(prompt_tokens=16), None).plan(config, 4)
    with pytest.raises(ConfigError, match=r"plan\.pairs"):
        Planner(PlanConfig(prompt_tokens=16, response_tokens=8), None).plan(config, 4)
    with pytest.raises(ConfigError, match="not a multiple"):
        Planner(MEANS, None).plan(config, 3)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("max_prompt_length", r"plan\.prompt_tokens=40 is longer than data\.max_prompt_length=39"),
        ("max_length", r"plan\.prompt_tokens \+ plan\.response_tokens=50 is longer than data\.max_length=39"),
    ],
)
def test_means_above_the_limits_are_refused(limit: str, message: str) -> None:
    config = RunConfig()
    setattr(config.data, limit, 39)
    settings = PlanConfig(pairs=100, prompt_tokens=40, response_tokens=10)
    with pytest.raises(ConfigError, match=message):
        Planner(settings, None).plan(config, 1)


def test_the_nearest_plan_that_fits(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.eval.batch_size = 1
    whole = Planner(MEANS, GPU).plan(config, 1)
    assert whole.fits and whole.gpu_hours is not None and whole.worst.name == "backward"
    # a GPU on which nine tenths of that may be filled: one key is enough
    tight = Planner(MEANS, dataclasses.replace(GPU, memory=whole.worst.device_bytes))
    plan = tight.plan(config, 1)
    assert not plan.fits
    advice = nearest(tight, plan)
    assert advice is not None and advice.plan.fits and len(advice.changes) == 1
    assert advice.overrides in ("train.gradient_checkpointing=true", "train.micro_batch_size=2")
    # and one on which no engine holds the optimizer
    hopeless = Planner(MEANS, dataclasses.replace(GPU, memory=1.0))
    assert nearest(hopeless, hopeless.plan(config, 1)) is None


def test_what_is_on_the_host_is_not_on_the_gpu() -> None:
    config = RunConfig()
    config.data.name, config.train.dtype, config.train.gradient_checkpointing = "pairs", "bf16", True
    config.train.micro_batch_size = config.eval.batch_size = 1
    config.engine.stage = 3
    config.engine.offload_optimizer = config.engine.offload_parameters = True
    settings = PlanConfig(architecture="llama-3-8b", pairs=1000, prompt_tokens=64, response_tokens=64)
    gpu = dataclasses.replace(GPU, memory=16e9, host_memory=200e9)
    plan = Planner(settings, gpu).plan(config, 1)
    weights = 8_030_261_248
    # 2 bytes of weights; masters, two moments and a step count for each group of a thousand million (the last
    # is smaller); gradients as reduced and as the optimizer reads them
    host = {"weights": 2 * weights, "optimizer": 12 * weights + 4 * 8, "gradients": (4 + 4) * weights}
    assert {part: size for part, size in plan.worst.host.items() if size} == host
    assert plan.fits and plan.times is not None and plan.times.host > 0
    assert not Planner(settings, dataclasses.replace(gpu, host_memory=100e9)).plan(config, 1).fits


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("sys.argv", ["rcpo", "plan", *arguments])
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


SMALL = ["train.micro_batch_size=32", "eval.batch_size=1", "plan.start_seconds=0"]
BIG = [
    "model=llama-3-8b", "data=ultrafeedback", "train.dtype=bf16", "gpu=h100-80gb", "plan.gpus=8",
    "train.batch_size=64", "train.micro_batch_size=1", "eval.batch_size=1", "plan.pairs=60000",
    "plan.prompt_tokens=20", "plan.response_tokens=30", "data.max_length=80", "data.max_prompt_length=40",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*BIG, "engine=zero3") == 0
    shown = capsys.readouterr().out
    assert "8,030,261,248 parameters" in shown and "fits:" in shown and "bottleneck: " in shown
    assert "67,108,960" in shown  # the calibration's bytes
    assert (
        "while a checkpoint is written: 12.0 GB of the host's memory" in shown
    )  # 12 bytes a parameter, an eighth
    assert command("gpu=h100-80gb", "gpu.memory=6e7", *SMALL) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "train.micro_batch_size=16" in shown
    assert command("train.batch_sise=3") == 2
    assert "did you mean train.batch_size" in capsys.readouterr().err


@pytest.mark.slow
def test_planning_loads_nothing_and_asks_nobody(tmp_path: Path) -> None:
    path = Path(tiny_llama(tmp_path / "model"))
    (path / "model.safetensors").unlink()
    program = f"""
import sys
sys.addaudithook(lambda event, _: sys.exit(event) if event == "socket.connect" else None)
from rcpo.commands.plan import plan
ended = plan(["model=local", "model.path={path}", "engine=zero3", "launch.processes=2"])
sys.exit(ended or "deepspeed" in sys.modules)"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_checkpoint_is_copied_to_the_host_while_it_is_written(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    plan = Planner(MEANS, None).plan(config, 1)
    shown = Console(file=io.StringIO(), width=200)
    show(plan, None, shown)
    assert isinstance(shown.file, io.StringIO)
    printed = shown.file.getvalue()
    assert " and 0.7 GB for Python and its libraries; choose a GPU" in printed
    step = plan.step
    assert (
        f"while a checkpoint is written: {step.checkpoint_copy / 1e3:.0f} kB beyond the peak; none" in printed
    )
    numel, tensors = sum(p.numel for p in step.parameters), len(step.parameters)

    def copied(ranks: int) -> int:
        return dataclasses.replace(step, ranks=ranks).checkpoint_copy

    # weights, two moments, and AdamW's count for each tensor
    assert copied(1) == (4 + 8) * numel + 4 * tensors
    assert copied(2) == copied(1) // 2  # all ranks hold everything, and each writes half
    config.engine.stage = 1
    assert copied(2) == (4 + 8) * -(-numel // 4) * 2 + 4  # half of one flat buffer, padded to quarters
    config.engine.offload_optimizer = True  # already in the host's memory
    assert copied(2) == 0
    config.checkpoint.background = True
    assert copied(2) > 0
    config.engine.offload_optimizer, config.checkpoint.background = False, False
    assert copied(2) == 0


def test_many_plans_are_lines_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("-m", *BIG, "engine=zero1,zero3") == 0
    header, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| engine | changed") and first.startswith("| zero1 |") and "| zero3 |" in second
    long = [word.replace("pairs=60000", "pairs=6000000") for word in BIG]
    assert command("-m", *long, "engine=zero3", "train.epochs=1,2") == 0
    hours = [float(line.split("|")[-2]) for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert 1.1 * hours[0] < hours[1] < 2 * hours[0]  # the reference's pass is the same
