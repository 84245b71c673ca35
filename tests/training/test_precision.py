"""Training in bf16 and fp16: gradients are added up in fp32, clipped, split and skipped as in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from test_trainer import worst_difference
from tiny import held_out, sums_file, tiny_llama
from torch import Tensor
from workers.nonfinite import Poisoned

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.engine.settings import deepspeed_config
from rcpo.errors import ConfigError, RunError
from rcpo.method.logps import pair_logps, token_weights
from rcpo.models.policy import policy_inputs
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(autouse=True)
def half_precision_on_this_machine() -> Iterator[None]:
    """DeepSpeed refuses fp16 on CPUs because it is slow there; its results are right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_llama(folder / "model"), sums_file(folder / "pairs.jsonl", 16)


def configuration(inputs: tuple[str, str], dtype: str, stage: int, micro: int = 1) -> RunConfig:
    config = RunConfig()
    config.wandb.mode, config.reference.cache = "disabled", "off"
    config.model.name, config.model.path = "local", inputs[0]
    config.data.name, config.data.path, config.data.eval_path = "pairs", inputs[1], held_out(inputs[1])
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 16, micro, 20
    config.train.dtype, config.engine.stage, config.train.max_grad_norm = dtype, stage, None
    # DeepSpeed keeps engines of stage 3: many of its usual buckets take all addresses of a process
    config.engine.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    config.optim.name, config.optim.lr = "sgd", 1.0
    config.objective = ObjectiveConfig(name="dpo", reduction="sum", hyperparameters={"beta": 1.0})
    return config


def start(config: RunConfig, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    session = Session(config, folder, training=True)
    session.prepare_reference()
    return Trainer(session)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer updates, each flattened and whole."""
    found = trainer.engine.tensors()
    names = sorted(label for label in found if "|fp32@" in label)
    return {name.partition("|")[0]: found[name].clone().double() for name in names}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    return torch.cat([before[name] - after[name] for name in before])


def true_gradient(trainer: Trainer) -> Tensor:
    """Each micro-batch's gradient by autograd, in the model's precision; their sum in fp64."""
    session, total = trainer.session, None
    assert session.forward.reference is not None
    trainer.engine.train()
    parameters = dict(trainer.engine.policy.named_parameters())
    for positions in session.rank_microbatches(0):
        batch = session.collate(session.datasets.train, positions)
        logps = trainer.engine.policy(**policy_inputs(batch))[0]
        each = token_weights(logps, batch.sequences, batch.lengths, "sum")
        pairs = pair_logps(batch, logps, each, session.forward.reference(batch))
        loss = trainer.objective(pairs).sum() / 16
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        flat = torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])
        total = flat if total is None else total + flat
    assert total is not None
    return total


@pytest.fixture(scope="module")
def expected(inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return true_gradient(start(configuration(inputs, "bf16", 0), tmp_path_factory.mktemp("expected")))


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_of_many_micro_batches_are_added_up_in_fp32(
    inputs: tuple[str, str], tmp_path: Path, expected: Tensor, stage: int
) -> None:
    trainer = start(configuration(inputs, "bf16", stage), tmp_path / "run")
    before = weights(trainer)
    row = trainer.train_step()
    # plain SGD with a rate of 1: the fp32 weights move by the gradient. Added up in bf16 it is off by 0.4 %
    change = moved(before, weights(trainer))
    assert float((change - expected).norm() / expected.norm()) < 1e-5
    assert row["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_half_precision_sends_gradients_in_fp32() -> None:
    for dtype in ("bf16", "fp16"):
        config = RunConfig()
        config.train.dtype = dtype
        settings = deepspeed_config(config, training=True)
        assert settings["communication_data_type"] == "fp32"
        assert settings["zero_optimization"]["stage"] == 1  # its stage 0 applies no loss scale
        assert deepspeed_config(config, training=False)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_trains_as_fp32_does(inputs: tuple[str, str], tmp_path: Path, stage: int) -> None:
    changes = []
    for dtype in ("fp32", "fp16"):
        config = configuration(inputs, dtype, stage, micro=8)
        config.optim.name, config.optim.lr, config.objective.hyperparameters["beta"] = "adamw", 1e-3, 1e-3
        trainer = start(config, tmp_path / dtype)
        before = weights(trainer)
        rows = [trainer.train_step() for _ in range(10)]
        assert all(row["grad_norm"] is not None for row in rows)
        changes.append(moved(before, weights(trainer)))
    assert float(changes[1].norm() / changes[0].norm()) == pytest.approx(1.0, rel=0.02)
    assert float(torch.nn.functional.cosine_similarity(*changes, dim=0)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "stage"), [("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 3)]
)
def test_half_precision_clips_at_the_given_norm(
    inputs: tuple[str, str], tmp_path: Path, dtype: str, stage: int
) -> None:
    norms, changes = [], []
    for limit in (None, 1e6, 2.0):
        config = configuration(inputs, dtype, stage, micro=16)
        config.train.max_grad_norm = limit
        trainer = start(config, tmp_path / str(limit))
        if dtype == "fp16":
            trainer.engine._scaler.cur_scale = 2.0**8
        before = weights(trainer)
        norms.append(trainer.train_step()["grad_norm"])
        changes.append(float(moved(before, weights(trainer)).norm()))
    assert norms[0] > 4 and norms == pytest.approx([norms[0]] * 3, rel=1e-6)
    assert changes == pytest.approx([norms[0], norms[0], 2.0], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_steps_are_the_same_for_any_split(inputs: tuple[str, str], tmp_path: Path, stage: int) -> None:
    rows = []
    for micro in (2, 16):
        config = configuration(inputs, "bf16", stage, micro)
        config.optim.lr, config.objective.hyperparameters["beta"], config.rc.enabled = 1e-3, 0.1, True
        trainer = start(config, tmp_path / str(micro))
        keep = ("loss", "grad_norm", "logps/chosen", "rc/alpha")
        rows.append([{key: row[key] for key in keep} for row in (trainer.train_step() for _ in range(2))])
    worst, where = worst_difference(rows[0], rows[1])
    assert worst < 4e-3, where  # a bf16 number has 8 bits, and kernels differ between sizes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bf16_step_that_is_not_finite_is_left_out_then_ends_the_run(
    inputs: tuple[str, str], tmp_path: Path, stage: int, kind: str
) -> None:
    config = configuration(inputs, "bf16", stage, micro=8)
    config.train.on_nonfinite, config.train.max_nonfinite, config.optim.lr = "skip", 1, 1e-3
    trainer, poisoned = poison(config, tmp_path / "run")
    trainer.train_step()
    before = weights(trainer)
    poisoned.armed = kind
    row = trainer.train_step()
    assert row["nonfinite_steps"] == 1 and row["grad_norm"] is None
    assert not moved(before, weights(trainer)).any()
    poisoned.armed = ""
    assert trainer.train_step()["nonfinite_steps"] == 1
    assert moved(before, weights(trainer)).isfinite().all() and moved(before, weights(trainer)).any()
    poisoned.armed = kind
    trainer.train_step()
    with pytest.raises(RunError, match=r"train\.max_nonfinite=1"):
        trainer.train_step()


def poison(config: RunConfig, folder: Path) -> tuple[Trainer, Poisoned]:
    trainer = start(config, folder)
    plain = trainer.session.objective
    poisoned = Poisoned(plain.spec, plain.reduction, plain.nll_coef, plain.hyperparameters)
    trainer.objective = trainer.session.objective = trainer.session.forward.objective = poisoned
    return trainer, poisoned


@pytest.mark.parametrize("stage", STAGES)
def test_an_fp16_overflow_lowers_the_loss_scale_and_the_run_goes_on(
    inputs: tuple[str, str], tmp_path: Path, stage: int
) -> None:
    trainer = start(configuration(inputs, "fp16", stage, micro=8), tmp_path / "run")
    scaler = trainer.engine._scaler
    scaler.cur_scale, scaler.cur_hysteresis = 2.0**40, 1
    before = weights(trainer)
    row = trainer.train_step()
    assert row["grad_norm"] is None and math.isfinite(row["loss"])
    assert scaler.cur_scale == 2.0**39 and not moved(before, weights(trainer)).any()
    scaler.cur_scale = 2.0**10
    assert trainer.train_step()["grad_norm"] > 0
    assert moved(before, weights(trainer)).any()


@pytest.mark.parametrize("stage", [0, 3])
def test_an_fp16_overflow_at_the_smallest_loss_scale_ends_the_run(
    inputs: tuple[str, str], tmp_path: Path, stage: int
) -> None:
    trainer, poisoned = poison(configuration(inputs, "fp16", stage, micro=8), tmp_path / "run")
    trainer.train_step()
    poisoned.armed = "gradient"
    trainer.engine._scaler.cur_scale = 4.0
    with pytest.raises(RunError, match="the loss or gradient of step"):
        for _ in range(8):
            trainer.train_step()
    assert 3 <= trainer.step <= 6


def test_fp16_is_refused_where_deepspeed_refuses_it(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(ConfigError, match=r"train\.dtype=fp16"):
        start(configuration(inputs, "fp16", 0), tmp_path / "run")
