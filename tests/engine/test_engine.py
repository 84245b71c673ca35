"""The engine's start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import forked
import pytest
import torch
from tiny import sums_file, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from rcpo.config.schema import RunConfig
from rcpo.engine import zero
from rcpo.engine.load import read_model
from rcpo.engine.pieces import longest_vector
from rcpo.engine.zero import (
    build_optimizer,
    deepspeed_config,
    exact_ranges,
    parameter_groups,
    refuse_deepspeed_settings,
    refuse_older_deepspeed,
    schedule,
)
from rcpo.errors import ConfigError
from rcpo.models.hub import ModelSource
from rcpo.system import distributed

PROGRAM = """
import sys
from pathlib import Path
from typing import Any
from rcpo.system import distributed
from rcpo.config.schema import RunConfig
from rcpo.engine.zero import Engine
from rcpo.models.policy import Policy; from rcpo.models.loading import load_model

distributed.initialize()
Engine(Policy(load_model(Path(sys.argv[1]), RunConfig().model)), RunConfig(), total_steps=1)
"""


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(name: str, ratio: float, tmp_path: Path) -> None:
    config, steps = RunConfig(), 8  # their trainer warms up for ceil(0.03 · 8) = 1 and ceil(0.3 · 8) = 3
    config.optim.schedule, config.optim.warmup_ratio = name, ratio
    theirs = "constant_with_warmup" if name == "constant" else name
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio)  # below 1: a share
    warmup = arguments.get_warmup_steps(steps) if ratio < 1 else steps
    makers = schedule(config, steps), lambda o: get_scheduler(theirs, o, warmup, steps)
    rates: list[list[float]] = []
    for make in makers:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make(optimizer)
        rates.append([])
        for _ in range(steps + 1):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(
    ("schedule_name", "warmup"),
    [("cosine_with_min_lr", 0), ("cosine_with_min_lr", 3), ("wsd", 0), ("wsd", 3)],
)
def test_schedules_with_a_lowest_rate_are_those_of_transformers(
    schedule_name: str, warmup: int, shape: str
) -> None:
    config, steps = RunConfig(), 20
    optim = config.optim
    optim.schedule, optim.warmup_steps, optim.min_lr_ratio = schedule_name, warmup, 0.2
    optim.decay_ratio, optim.decay_shape = 0.34, shape  # ceil(6.8) = 7 steps
    if schedule_name == "wsd":
        name, special = (
            "warmup_stable_decay",
            {"num_decay_steps": 7, "decay_type": shape, "min_lr_ratio": 0.2},
        )
    else:
        name, special = schedule_name, {"min_lr_rate": 0.2}
    makers = schedule(config, steps), lambda o: get_scheduler(name, o, warmup, steps, special)
    factors = [
        maker(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)).lr_lambdas[0] for maker in makers
    ]
    for step in range(steps + 1):
        assert factors[0](step) == pytest.approx(factors[1](step), abs=1e-15), step
    assert factors[0](steps) == pytest.approx(0.2) and factors[0](warmup) == 1.0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"warmup_steps": 9}, "optim.warmup_steps=9 do not fit a run of 8 steps"),
        (
            {"schedule": "wsd", "warmup_steps": 5, "decay_ratio": 0.5},
            "and the decay of 4 .optim.decay_ratio=0.5.",
        ),
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused(settings: dict[str, Any], part: str) -> None:
    config = RunConfig()
    for name, value in settings.items():
        setattr(config.optim, name, value)
    with pytest.raises(ConfigError, match=part):
        schedule(config, 8)


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        Qwen3Config(**SIZES, head_dim=8),  # norms of queries and keys
        Gemma2Config(**SIZES, head_dim=8),
        PhiConfig(**(SIZES | {"num_key_value_heads": 4})),
        GPTNeoXConfig(**(SIZES | {"num_key_value_heads": 4})),
        GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4),  # norms that are called ln_1
    ],
    ids=lambda config: config.model_type,
)
def test_weights_decay_where_they_do_in_transformers(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, rest = (
        group | {"names": {names[p] for p in group["params"]}} for group in parameter_groups(model, 0.1)
    )
    wanted = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decaying["names"] == wanted & set(names.values()) and decaying["weight_decay"] == 0.1
    assert rest["names"] == set(names.values()) - wanted and rest["weight_decay"] == 0.0
    (single,) = parameter_groups(model, 0.0)
    assert len(single["params"]) == len(names)


def test_named_weights_are_exempt_from_decay() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    names = {parameter: name for name, parameter in model.named_parameters()}
    patterns = ["embed_tokens", r"layers\.0\.mlp\."]
    decaying, rest = ({names[p] for p in group["params"]} for group in parameter_groups(model, 0.1, patterns))
    before = {names[p] for p in parameter_groups(model, 0.1)[0]["params"]}
    named = {name for name in before if "embed_tokens" in name or "layers.0.mlp" in name}
    assert named and decaying == before - named and named <= rest
    assert len(parameter_groups(model, 0.0, patterns)) == 1
    with pytest.raises(
        ConfigError, match=r"optim.no_decay: 'lora_' matches no trained parameter; one is model"
    ):
        parameter_groups(model, 0.1, ["lora_"])


def test_a_norm_by_another_name_does_not_decay_either() -> None:
    config = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert "backbone.norm_f.weight" in Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert not any(p is model.backbone.norm_f.weight for p in parameter_groups(model, 0.1)[0]["params"])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_shrinks_matrices_and_leaves_norms_and_biases(name: str) -> None:
    config = RunConfig()
    config.optim.name, config.optim.lr, config.optim.weight_decay = name, 0.5, 0.2
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(model, config)
    assert {p for group in optimizer.param_groups for p in group["params"]} == {
        *model[0].parameters(),
        model[1].bias,
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.state_dict().items():
        factor = 1 - 0.5 * 0.2 if key == "0.weight" else 1.0
        torch.testing.assert_close(value, factor * before[key])


@pytest.mark.slow
def test_starting_compiles_nothing(tmp_path: Path) -> None:
    model, extensions = tiny_llama(tmp_path / "model"), tmp_path / "extensions"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    command = [sys.executable, "-c", PROGRAM, model]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    assert not extensions.exists() or not any(extensions.iterdir())


@pytest.mark.parametrize("stage", ["0", "1"])
def test_gradients_are_clipped_at_the_given_norm_or_not_at_all(tmp_path: Path, stage: str) -> None:
    worker = str(Path(__file__).parents[1] / "workers" / "clipping.py")
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 16)
    command = [sys.executable, worker, model, pairs, stage]
    result = forked.run(command, check=True)
    rows = json.loads(result.stdout.splitlines()[-1])
    norm = rows["null"]["grad_norm"]
    assert norm > 2.0
    # plain SGD: the weights move by the learning rate times the gradient that was left of it
    assert rows["null"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["1000.0"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["2.0"]["moved"] == pytest.approx(2.0, rel=1e-4)
    assert rows["0.5"]["moved"] == pytest.approx(0.5, rel=1e-4)
    assert {row["grad_norm"] for row in rows.values()} == {norm}  # what is logged is the norm before


def test_a_closed_engine_keeps_no_weights(tmp_path: Path) -> None:
    worker = str(Path(__file__).parents[1] / "workers" / "closing.py")
    result = forked.run([sys.executable, worker, tiny_llama(tmp_path / "model")], check=True)
    left = json.loads(result.stdout.splitlines()[-1])
    assert left == {f"{stage} {dtype}": 0 for stage in range(4) for dtype in ("fp32", "bf16")}


def test_a_restored_loss_scaler_goes_on_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.fp16 import loss_scaler

    from rcpo.engine.zero import scaler_state, set_scaler_state

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 says more

    def new() -> loss_scaler.DynamicLossScaler:
        return loss_scaler.DynamicLossScaler(
            init_scale=2**16, scale_window=3, min_scale=1, delayed_shift=2,
            consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.half,
        )  # fmt: skip

    first, other = new(), new()
    for overflow in (True, True, False, False):
        first.update_scale(overflow)
    set_scaler_state(other, json.loads(json.dumps(scaler_state(first))))
    scales = []
    for overflow in (False, False, True, False, True, False, False, False, False):
        first.update_scale(overflow)
        other.update_scale(overflow)
        scales.append((first.cur_scale, other.cur_scale))
    assert all(a == b for a, b in scales) and len({a for a, _ in scales}) > 1


@pytest.mark.parametrize(("gpus", "local", "place"), [(4, "0", 0), (4, "2", 2), (1, "2", 0)])
def test_each_rank_of_a_node_has_the_gpu_of_its_number(
    gpus: int, local: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv(distributed.LOCAL, raising=False)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert distributed.device() == torch.device("cuda", place)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"train_batch_size": 8}, r"engine.deepspeed.train_batch_size is set by rcpo; use train.batch_size"),
        ({"bf16": {"enabled": True}}, "use train.dtype"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is set by rcpo; use engine=zero0"),
        ({"zero_optimization": {"offload_param": {}}}, "use engine.offload_parameters"),
        ({"zero_optimization": 3}, "it holds keys, not a value"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size"),
    ],
)
def test_deepspeed_settings_that_rcpo_owns_or_deepspeed_refuses_are_refused(
    given: dict[str, Any], reason: str
) -> None:
    config = RunConfig()
    config.engine.deepspeed = given
    with pytest.raises(ConfigError, match=reason) as error:
        refuse_deepspeed_settings(config)
    assert "\n" not in str(error.value)


def test_other_deepspeed_settings_pass_through_beside_those_of_rcpo() -> None:
    config = RunConfig()
    config.engine.stage = 3
    config.engine.deepspeed = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000},
        "comms_logger": {"enabled": True},
    }
    refuse_deepspeed_settings(config)
    settings = deepspeed_config(config, training=True)
    assert settings["comms_logger"] == {"enabled": True}
    assert settings["zero_optimization"].items() >= {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000
    }.items()  # fmt: skip


def test_under_zero_3_norms_and_biases_stay_whole_and_matrices_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    assert longest_vector(model) == 6  # below 8 · 6 and 6 · 2


def test_ranges_keep_their_dtype_while_zero_3_splits_a_model() -> None:
    distributed.initialize()
    with (
        exact_ranges(),
        deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1}, dtype=torch.bfloat16),
    ):
        frequencies, weights = torch.arange(3, dtype=torch.float32) / 3, torch.ones(3)
    assert frequencies.tolist() == pytest.approx([0.0, 1 / 3, 2 / 3], rel=1e-7)  # 0.334 in bf16
    assert weights.dtype == torch.bfloat16


def test_rotary_frequencies_are_the_same_with_and_without_zero_3(tmp_path: Path) -> None:
    distributed.initialize()
    config = RunConfig()
    config.train.dtype, source = "bf16", ModelSource(Path(tiny_llama(tmp_path / "model")))
    found = []
    for stage in (0, 3):
        config.engine.stage = stage
        found.append(dict(read_model(source, config).named_buffers())["model.rotary_emb.inv_freq"])
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("version", "refused"), [("0.19.7", True), ("0.19.8", False), ("0.19.8+cu130", False)]
)
def test_a_deepspeed_that_adds_up_gradients_in_bf16_is_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    remedy = r"DeepSpeed 0\.19\.7 .*pip install deepspeed==0\.19\.8"
    with pytest.raises(ConfigError, match=remedy) if refused else nullcontext():
        refuse_older_deepspeed()


def test_another_version_of_deepspeed_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(zero.PartitionedParameterCoordinator, "_clear_trace_structures")
    lacking = "has no PartitionedParameterCoordinator._clear_trace_structures"
    with pytest.raises(ConfigError, match=f"{lacking}.*pip install deepspeed=="):
        zero._forget_releases_with_order()

    class Stage3:
        optimizer = object()
        zero_optimization_partition_weights = staticmethod(lambda: True)
        fp16_enabled = staticmethod(lambda: False)
        _zero3_consolidated_16bit_state_dict = None

    with pytest.raises(ConfigError, match=r"has no object.grad_position, which rcpo needs for checkpoints"):
        zero._check_internals(Stage3(), training=True)
