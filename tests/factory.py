"""A stand-in for LLaMA-Factory: its modules, and trainers with the interface that rcpo calibrates."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer


def logps_of(model: Any, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and lengths of each row's labels."""
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    labels = labels[:, 1:]
    mask = labels != -100
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (tokens * mask).sum(1), mask.sum(1)


class _Trainer(Trainer):
    beta, ftx, loss_type, ld_alpha, ref_model = 0.1, 0.0, "sigmoid", None, None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss, _ = self.get_batch_loss_metrics(model, inputs)
        return loss


class CustomDPOTrainer(_Trainer):
    """Pairs: all chosen rows, then all rejected; the batch loses its labels on the way."""

    def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]:
        batch = dict(batch)
        logps, lengths = logps_of(model, batch, batch.pop("labels"))
        average = logps / lengths
        if self.loss_type in ("ipo", "orpo", "simpo"):
            logps = average
        (chosen, rejected), half = logps.chunk(2), len(logps) // 2
        return {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_logps_avg": average[:half]}

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        output = self.concatenated_forward(model, batch)
        losses = -F.logsigmoid(self.beta * (output["chosen_logps"] - output["rejected_logps"]))
        losses = losses - self.ftx * output["chosen_logps_avg"]
        return losses.mean(), {}


class CustomKTOTrainer(_Trainer):
    """Single answers, with a second pass for the divergence."""

    def forward(self, model: Any, batch: Any, prefix: str = "") -> Any:
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        logps, lengths = logps_of(model, batch, batch.pop("labels"))
        return None, logps, logps / lengths

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        _, logps, average = self.forward(model, batch)
        with torch.no_grad():
            _, kl, _ = self.forward(model, batch, prefix="kl_")
        tags = batch["kto_tags"]
        return logps[tags], logps[~tags], None, None, kl, average[tags]

    def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
        chosen, rejected, _, _, _, average = self.concatenated_forward(model, batch)
        losses = torch.cat([-(self.beta * chosen).sigmoid(), (self.beta * rejected).sigmoid()])
        return losses.mean() - self.ftx * average.mean(), {}


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules that the plug-in imports, and the `runs` of its tuner.

    As in LLaMA-Factory 0.9.5, the workflow of KTO holds its trainer; that of DPO imports it when it runs.
    """
    runs: list[Any] = []
    stages = [f".train.{stage}{part}" for stage in ("dpo", "kto") for part in ("", ".trainer", ".workflow")]
    names = ("", ".train", ".train.tuner", *stages)
    modules = {name: ModuleType(f"llamafactory{name}") for name in names}
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"llamafactory{name}", module)
        above, _, last = name.rpartition(".")
        if name:
            setattr(modules[above], last, module)
    tuner, dpo, kto = (modules[f".train.{name}"] for name in ("tuner", "dpo.trainer", "kto.trainer"))
    dpo.CustomDPOTrainer, kto.CustomKTOTrainer = CustomDPOTrainer, CustomKTOTrainer  # type: ignore[attr-defined]
    modules[".train.kto.workflow"].CustomKTOTrainer = CustomKTOTrainer  # type: ignore[attr-defined]
    tuner.run_exp = runs.append  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "rcpo.integrations.llamafactory", raising=False)
    return SimpleNamespace(dpo=dpo, kto=kto, workflow=modules[".train.kto.workflow"], runs=runs)
