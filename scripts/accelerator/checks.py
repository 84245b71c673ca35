"""Whether the numbers of a GPU are right: against the CPU, against the exact ones, and against each other."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from made_up import Shape, make_pairs, make_policy, run_config, training
from safetensors.torch import load_file

from rcpo.data.collate import collate
from rcpo.method.geometry import ScoreGeometry, Sketch, head_scores
from rcpo.method.types import TokenBatch
from rcpo.models.policy import Policy, policy_inputs
from rcpo.runs.folder import FINAL, FINISHED_FILE

ROOT = Path(__file__).resolve().parents[2]
# what this process, a group of one, has set for itself
OF_RANKS = ("RANK", "LOCAL_RANK", "RCPO_LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = Shape("small", pairs=4, prompt=64, response=64, checkpointing=False, dtype="fp32")


def numbers(tiny: bool) -> Shape:
    return replace(NUMBERS, name="tiny", prompt=12, response=12) if tiny else NUMBERS


def precision(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Log-probs of the same weights: fp32 on the CPU, fp32 and bf16 on the device, both layouts of rows.

    In bf16 the device may err by as much as the CPU does in bf16, and half as much again.
    """
    shape, found = numbers(tiny), {}
    cpu = torch.device("cpu")
    policy = make_policy(shape, run_config(shape, Path()), cpu)
    with torch.no_grad():  # larger weights, so that tokens differ in probability
        for p in policy.parameters():
            p.mul_(3)
    for layout in ("shared", "separate"):
        batch = collate(make_pairs(shape, shape.pairs), 0, layout=layout)
        expected = _logps(policy, batch, cpu, torch.float32)
        on_cpu = (_logps(policy, batch, cpu, torch.bfloat16) - expected).abs().mean()
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 1.5 * float(on_cpu))):
            difference = (_logps(policy, batch, device, dtype) - expected).abs()
            name = f"{layout} rows, {str(dtype).rpartition('.')[2]}"
            mean, largest = float(difference.mean()), float(difference.max())
            found[name] = {"mean": mean, "largest": largest, "limit of the mean": limit}
            found[f"{name} close"] = mean < limit
    return found


@torch.no_grad()
def _logps(policy: Policy, batch: TokenBatch, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Of the batch's tokens, by a copy of the policy; buffers, such as positions' frequencies, stay fp32."""
    own = copy.deepcopy(policy).to(device)
    for p in own.parameters():
        p.data = p.data.to(dtype)
    return own(**policy_inputs(batch.to(device)))[0].double().cpu()


def sketch(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Norms and cosine of sketched scores against exact ones, and the device's sketch against the CPU's."""
    vocabulary, hidden, tokens = (600, 32, 40) if tiny else (32000, 512, 512)
    size = 256 if tiny else 2048
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    labels = torch.randint(0, vocabulary, (2, tokens), generator=generator)
    ones = torch.ones(tokens)

    def scores(where: torch.device, sketch: Sketch | None) -> torch.Tensor:
        head, each = weight.to(where), ones.to(where)
        sides = [
            head_scores(states[s].to(where), head, labels[s].to(where), each, sketch=sketch) for s in range(2)
        ]
        return torch.stack(sides).cpu()

    exact = ScoreGeometry.of(scores(device, None))
    sketched = scores(device, Sketch(vocabulary, size))
    own = ScoreGeometry.of(sketched)
    on_cpu = scores(torch.device("cpu"), Sketch(vocabulary, size))
    return {
        "norm, sketched by exact": own.norm_chosen / exact.norm_chosen,
        "cosine, sketched − exact": own.cosine - exact.cosine,
        "device − CPU, relative": float((sketched - on_cpu).norm() / on_cpu.norm()),
    }


def calibration(device: torch.device, folder: Path) -> dict[str, Any]:
    """The first step's loss is the same number with rc=off and rc=on: only gradients are scaled."""
    losses = {}
    for name in ("off", "on"):
        with training(numbers(tiny=True), folder, device) as trainer:
            trainer.config.rc.enabled = name == "on"
            trainer.dynamics = type(trainer.dynamics)(
                trainer.config, trainer.objective, trainer.engine, trainer.session.batches
            )
            losses[name] = trainer.train_step()["loss"]
    return {**losses, "equal": losses["on"] == losses["off"]}


def stages(device: torch.device, folder: Path) -> dict[str, Any]:
    """Losses of the third step at all ZeRO stages of one rank, from the same weights, in fp32."""
    losses = {}
    for stage in range(4):
        with training(replace(numbers(tiny=True), stage=stage), folder, device) as trainer:
            losses[f"stage {stage}"] = [trainer.train_step()["loss"] for _ in range(3)][-1]
    spread = max(losses.values()) - min(losses.values())
    return {**losses, "spread": spread, "close": spread < 1e-5}


def resume(device: torch.device, folder: Path) -> dict[str, Any]:
    """Four steps at once, and two and two from a checkpoint: the same bits with launch.deterministic."""
    keys = ["launch.deterministic=true", "train.batch_size=8", "eval.max_examples=8", "wandb.mode=disabled"]
    own = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    environment = {**own, "RCPO_CACHE": str(folder / "cache"), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""

    def train(name: str, *more: str) -> dict[str, torch.Tensor]:
        words = ["train", *keys, "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep=2", *more]
        command = [sys.executable, "-m", "rcpo", *words, f"hydra.run.dir={folder / name}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(folder / name / "final" / "model.safetensors")

    whole = train("run")
    run = folder / "run"
    for what in (run / FINAL, run / "checkpoints" / "step-4"):
        shutil.rmtree(what)
    (run / FINISHED_FILE).unlink()  # as if it had been killed after its third step
    resumed = train("run", "resume=auto")
    return {"equal": all(torch.equal(whole[name], resumed[name]) for name in whole)}
