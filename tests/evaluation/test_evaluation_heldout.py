"""Held-out evaluation of three pairs, with every number worked out again by transformers and autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rcpo.config.parsing import to_container
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.evaluation.heldout import evaluate, evaluate_in_training, merge_record
from rcpo.system import distributed
from rcpo.training.session import Session

BETA = 0.5


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Policy and reference: the same architecture, other weights."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny_llama(folder / "policy")
    reference = str(folder / "reference")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(policy)).save_pretrained(reference)
    AutoTokenizer.from_pretrained(policy).save_pretrained(reference)
    return policy, reference


@pytest.fixture
def config(models: tuple[str, str], tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.objective = ObjectiveConfig(name="dpo", reduction="sum", hyperparameters={"beta": BETA})
    config.model.name, (config.model.path, config.reference.path) = "local", models
    config.reference.cache = "off"
    config.data.name = "pairs"
    config.data.path = sums_file(tmp_path / "train.jsonl", 3)
    config.data.eval_path = sums_file(tmp_path / "pairs.jsonl", 3)
    config.train.batch_size = config.train.micro_batch_size = 3
    config.eval.parameters_geometry = True
    return config


def evaluated(config: RunConfig, folder: Path) -> dict[str, Any]:
    session = Session(config, folder, training=False)
    session.prepare_reference()
    return evaluate(session, parameters_geometry=True)


def examples(folder: Path) -> list[dict[str, Any]]:
    file = folder / "evaluation" / "examples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def sequence_logp(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Σ log p of the response's tokens, one unpadded row."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(response)[:, None]).sum()


def by_hand(config: RunConfig) -> tuple[list[list[torch.Tensor]], Any]:
    """[z_w, z_l, r_w, r_l] of each pair, and the policy that z_w and z_l have gradients to."""
    assert config.model.path and config.reference.path and config.data.path
    policy = AutoModelForCausalLM.from_pretrained(config.model.path)
    reference = AutoModelForCausalLM.from_pretrained(config.reference.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    values = []
    for line in Path(config.data.path).read_text().splitlines():
        row = json.loads(line)
        prompt = [tokenizer.bos_token_id, *ids(row["prompt"])]
        answers = [[*ids(row[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected")]
        values.append([sequence_logp(model, prompt, a) for model in (policy, reference) for a in answers])
    return values, policy


def test_three_pairs_by_transformers_and_autograd(config: RunConfig, tmp_path: Path) -> None:
    record = evaluated(config, tmp_path)
    values, policy = by_hand(config)
    z_w, z_l, r_w, r_l = (torch.stack(list(column)).tolist() for column in zip(*values, strict=True))
    u_w = [z - r for z, r in zip(z_w, r_w, strict=True)]
    u_l = [z - r for z, r in zip(z_l, r_l, strict=True)]
    margins = [BETA * (w - lost) for w, lost in zip(u_w, u_l, strict=True)]
    pulls = [BETA / (1 + math.exp(m)) for m in margins]  # DPO: d_w = d_l = β σ(−βm)
    expected = {
        "examples": 3,
        "loss": sum(math.log(1 + math.exp(-m)) for m in margins) / 3,
        "logps/chosen": sum(z_w) / 3,
        "logps/rejected": sum(z_l) / 3,
        "logps/accuracies": sum(w > lost for w, lost in zip(z_w, z_l, strict=True)) / 3,
        "rewards/chosen": BETA * sum(u_w) / 3,
        "rewards/margins": sum(margins) / 3,
        "rewards/accuracies": sum(m > 0 for m in margins) / 3,
        "logratios/chosen": sum(u_w) / 3,
        "logratios/rejected": sum(u_l) / 3,
        "winner_fell": sum(u < 0 for u in u_w) / 3,
        "dynamics/incentive_chosen": sum(pulls) / 3,
        "dynamics/incentive_rejected": sum(pulls) / 3,
        "dynamics/incentive_ratio": 1.0,
    }
    sides = [torch.stack([pair[side] for pair in values]).mean() for side in (0, 1)]
    for name, parameters in (
        ("dynamics", [policy.lm_head.weight]),
        ("dynamics_parameters", list(policy.parameters())),
    ):
        scores = [
            torch.cat([g.flatten() for g in torch.autograd.grad(side, parameters, retain_graph=True)])
            for side in sides
        ]
        norms = [float(score.norm()) for score in scores]
        expected |= {
            f"{name}/score_norm_chosen": norms[0],
            f"{name}/score_norm_rejected": norms[1],
            f"{name}/score_cosine": float(scores[0] @ scores[1]) / (norms[0] * norms[1]),
            f"{name}/band_center": norms[1] / norms[0],
        }
    assert {name: record[f"eval/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    head, whole = (record[f"eval/{name}/score_norm_chosen"] for name in ("dynamics", "dynamics_parameters"))
    assert 0 < head < whole

    rows = examples(tmp_path)
    assert [row["source"] for row in rows] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]
    assert [row["dynamics/incentive_chosen"] for row in rows] == pytest.approx(pulls, rel=1e-4)
    assert [row["logratios/chosen"] for row in rows] == pytest.approx(u_w, rel=1e-4)


def test_buckets_of_length_split_the_means(config: RunConfig, tmp_path: Path) -> None:
    """Chosen "= 109", "it is 109", "it is 109" with the end token: 6, 10 and 10 tokens."""
    record = evaluated(config, tmp_path)
    rows = examples(tmp_path)
    assert [row["lengths/chosen"] for row in rows] == [6, 10, 10]
    assert record["eval/by_length/4-7/examples"] == 1 and record["eval/by_length/8-15/examples"] == 2
    for name in ("logratios/chosen", "rewards/accuracies", "winner_fell"):
        first, second, third = (row[name] for row in rows)
        assert record[f"eval/by_length/4-7/{name}"] == pytest.approx(first)
        assert record[f"eval/by_length/8-15/{name}"] == pytest.approx((second + third) / 2)


def test_an_example_is_known_by_its_content(config: RunConfig, tmp_path: Path) -> None:
    """The same pairs in another order, in a file of another name: the same ids, the same numbers."""
    rows = {}
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        lines = Path(str(config.data.path)).read_text().splitlines()
        other = tmp_path / f"{name}.jsonl"
        other.write_text("".join(lines[place] + "\n" for place in order))
        config.data.eval_path = str(other)
        evaluated(config, tmp_path / name)
        rows[name] = {row["id"]: row["logps/chosen"] for row in examples(tmp_path / name)}
        assert len(rows[name]) == 3 and all(len(identity) == 16 for identity in rows[name])
    assert rows["a"] == pytest.approx(rows["b"], rel=1e-6)
    assert list(rows["a"]) == [list(rows["b"])[place] for place in (1, 2, 0)]


def test_intervals_draw_the_pairs_of_a_prompt_together(config: RunConfig, tmp_path: Path) -> None:
    """With one prompt there is one thing to draw: the interval is the mean, and honest about it."""
    record = evaluated(config, tmp_path / "apart")
    assert record["eval/logps/chosen/low"] < record["eval/logps/chosen/high"]
    rows = [json.loads(line) for line in Path(str(config.data.path)).read_text().splitlines()]
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps({**row, "prompt": rows[0]["prompt"]}) + "\n" for row in rows))
    config.data.eval_path = str(one)
    record = evaluated(config, tmp_path / "together")
    assert record["eval/examples"] == 3
    assert record["eval/logps/chosen/low"] == pytest.approx(record["eval/logps/chosen"])
    assert record["eval/logps/chosen/high"] == pytest.approx(record["eval/logps/chosen"])


def test_no_dynamics_where_pairs_are_coupled_or_nothing_is_measured(
    config: RunConfig, tmp_path: Path
) -> None:
    config.dynamics.every = 0
    assert not any("dynamics" in name for name in evaluated(config, tmp_path))
    config.dynamics.every = 1
    config.objective = ObjectiveConfig(name="aot", reduction="sum", hyperparameters={"beta": BETA})
    record = evaluated(config, tmp_path)
    assert not any("dynamics" in name for name in record) and "eval/loss" not in record


def test_in_training_a_row_gets_all_but_the_buckets(config: RunConfig, tmp_path: Path) -> None:
    session = Session(config, tmp_path, training=False)
    session.prepare_reference()
    session.training = True
    (tmp_path / "evaluation.json").write_text('{"eval/judge/win_rate": 0.5}')
    row = evaluate_in_training(session)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert (
        {name for name in written if name not in row}
        == {name for name in written if "by_length" in name}
        != set()
    )
    assert "eval/dynamics/band_center" in row and "eval/judge/win_rate" not in written


def test_trained_weights_evaluated_again_keep_what_other_tools_measured(
    config: RunConfig, tmp_path: Path
) -> None:
    session = Session(config, tmp_path, training=False)
    session.prepare_reference()
    (tmp_path / "evaluation.json").write_text('{"eval/judge/win_rate": 0.5, "eval/stale": 1.0}')
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "settings.json").write_text('{"judge": {"config": {}}}')
    evaluate_in_training(session)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["eval/judge/win_rate"] == 0.5 and "eval/stale" not in written and "eval/loss" in written
    made = json.loads((tmp_path / "evaluation" / "settings.json").read_text())
    assert made["judge"] == {"config": {}} and made["pairs"]["config"] == to_container(config)


def test_a_record_keeps_other_tools_keys(tmp_path: Path) -> None:
    before = '{"eval/harness/a/acc": 0.25, "eval/loss": 1.0, "eval/kl": 2.0}'
    (tmp_path / "evaluation.json").write_text(before)
    merge_record(tmp_path, {"eval/loss": 0.5}, kept=("eval/harness/",))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == {"eval/harness/a/acc": 0.25, "eval/loss": 0.5}


def test_weights_of_another_model_are_refused(config: RunConfig, tmp_path: Path) -> None:
    session = Session(config, tmp_path, training=False)
    weights = {name: value * 2 for name, value in session.engine.policy.state_dict().items()}
    session.engine.load_weights(weights)
    for name, value in session.engine.policy.state_dict().items():
        assert torch.equal(value, weights[name])
    head = weights.pop("model.lm_head.weight")
    with pytest.raises(ConfigError, match=r"model\.lm_head\.weight does not fit"):
        session.engine.load_weights(weights)
    with pytest.raises(ConfigError, match="another does not fit"):
        session.engine.load_weights({**weights, "model.lm_head.weight": head, "another": head})
