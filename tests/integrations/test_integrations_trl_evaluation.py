"""`rcpo evaluate` beside TRL's own evaluation: the same model, reference and pairs, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from trainers import build, sums, sums_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOTrainer

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.evaluation.heldout import evaluate
from rcpo.system import distributed
from rcpo.training.session import Session

NAMES = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """A model like the policy, of other weights, so that no log-ratio is 0."""
    path = tmp_path / "reference"
    policy = tiny_llama(tmp_path / "model")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(policy)).save_pretrained(path)
    AutoTokenizer.from_pretrained(policy).save_pretrained(path)
    return str(path)


def ours(folder: Path, reference: str, objective: ObjectiveConfig) -> dict[str, Any]:
    config = RunConfig(objective=objective)
    config.model.name, config.model.path, config.reference.path = "local", sums_model(folder), reference
    config.data.name = "pairs"
    config.data.path = config.data.eval_path = str(folder / "pairs.jsonl")
    config.reference.cache = config.data.cache = "off"
    config.eval.batch_size, config.eval.kl_examples = 7, 0  # other batches than TRL's
    session = Session(config, folder / "ours", training=False)
    session.prepare_reference()
    return evaluate(session)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "loss", "compared"),
    [
        (ObjectiveConfig(hyperparameters={"beta": 0.3, "epsilon": 0.0}), {"loss_type": "sigmoid"}, NAMES),
        (
            ObjectiveConfig(name="robust", hyperparameters={"beta": 0.3, "epsilon": 0.1}),
            {"loss_type": "robust", "label_smoothing": 0.1},
            NAMES,
        ),
        # τ is TRL's β; its rewards and log-probs are sums where this loss goes by means
        (
            ObjectiveConfig(name="ipo", reduction="mean", hyperparameters={"tau": 0.3}),
            {"loss_type": "ipo"},
            ("loss",),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, ObjectiveConfig) else "",
)
def test_trls_own_evaluation(
    tmp_path: Path,
    reference: str,
    objective: ObjectiveConfig,
    loss: dict[str, Any],
    compared: tuple[str, ...],
) -> None:
    distributed.initialize()
    rows = sums(tmp_path, 24)
    other = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    trainer = build(
        tmp_path, rows, False, cls=DPOTrainer, ref_model=other, eval_rows=rows, beta=0.3,
        per_device_eval_batch_size=8, **loss,
    )  # fmt: skip
    theirs = trainer.evaluate()
    found = ours(tmp_path, reference, objective)
    assert found["eval/examples"] == 24
    expected = {f"eval/{name}": theirs[f"eval_{name}"] for name in compared}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(expected["eval/loss"]) > 0.01 and 0 < theirs["eval_rewards/accuracies"] < 1
