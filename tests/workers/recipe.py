"""Reward calibration in a training loop of one's own.

The same 8 pairs a step on every number of ranks; rank 0 writes α and the loss of each step.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rcpo import PairLogps, RewardCalibrator, Sketch, StepCalibration, get_objective, score_sides
from rcpo.method.incentives import incentives

STEPS, PAIRS, LENGTH = 4, 8, 12


class Scored(nn.Module):
    """A language model and its head in one forward pass, which is what DDP, FSDP and ZeRO wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.sketch = Sketch(model.config.vocab_size, 32)

    def forward(self, ids: Tensor, weights: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(ids).last_hidden_state[:, :-1]
        head = self.model.get_output_embeddings().weight
        return score_sides(hidden, head, ids[:, 1:], weights, winners, sketch=self.sketch)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids (2·PAIRS, LENGTH), chosen first, and weights of means over responses of several lengths."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, 90, (2 * PAIRS, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH - 3, (2 * PAIRS, 1), generator=generator)
    return ids, (torch.arange(LENGTH - 1) >= LENGTH - 1 - lengths) / lengths


def wrap(model: nn.Module, kind: str) -> tuple[Any, Any]:
    """The model and its optimizer; the latter None where DeepSpeed's engine steps."""
    if kind.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": PAIRS // dist.get_world_size(),
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(kind[4:])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], None
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def train_all(path: str, kinds: list[str], output: Path) -> None:
    """Trains from the same weights in each of the ways: plain, ddp, fsdp2, zero2, zero3."""
    found = {kind: train(path, kind) for kind in kinds}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")


def train(path: str, kind: str) -> list[list[float]]:
    """α that was used, the next one and the loss, of each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = wrap(Scored(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)), kind)

    def over_ranks(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    objective = get_objective("simpo", beta=2.0, gamma=1.0)
    calibrator = RewardCalibrator()
    statistics = StepCalibration(calibrator, reduce=over_ranks)
    mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    rows = []
    for step in range(STEPS):
        ids, weights = (torch.cat([side[mine] for side in part.chunk(2)]) for part in batch(step))
        winners = torch.arange(len(ids)) < len(ids) // 2
        z, scores = model(ids, weights, winners)
        pairs = PairLogps(*z.chunk(2))

        statistics.observe(incentives(objective, pairs), scores)
        loss = objective(calibrator.calibrate(pairs)).mean()
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rows.append(
            [statistics.end()["rc/alpha"], calibrator.alpha, float(over_ranks(loss.detach())) / world]
        )
    return rows
