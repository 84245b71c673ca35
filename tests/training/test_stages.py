"""From a base model to an aligned one: supervised training, then preferences, each a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import rcpo, rows
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT = ["train.batch_size=8", "train.micro_batch_size=8", "train.epochs=2", "eval.kl_examples=0",
         "wandb.mode=disabled"]  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """A base model without a template; conversations to learn; pairs of whole conversations."""
    sums = [(a, 99 - a) for a in range(10, 90)]
    conversations, pairs = [], []
    for a, b in sums:
        asked = {"role": "user", "content": f"{a}+{b}?"}
        right, wrong = ({"role": "assistant", "content": text} for text in ("It is 99.", f"It is {a}."))
        conversations.append({"messages": [asked, right]})
        pairs.append({"chosen": [asked, right], "rejected": [asked, wrong]})
    for name, table in (("sft", conversations), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in table)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return ["model=local", f"model.path={tiny_llama(tmp_path / 'base')}"]


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    result = rcpo("train", *arguments, *SHORT, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    return rows(folder)


@pytest.mark.slow
def test_base_to_supervised_to_preferences(tmp_path: Path, inputs: list[str]) -> None:
    sft, aligned = tmp_path / "sft-run", tmp_path / "simpo-run"
    learned = train(
        sft, "objective=sft", *inputs, "data=pairs", f"data.path={tmp_path / 'sft.jsonl'}",
        "data.template=plain", "optim.lr=1e-2",
    )  # fmt: skip
    assert learned[-1]["loss"] < 0.5 * learned[0]["loss"]
    assert learned[0]["padded_share"] < 0.1  # several conversations in a row
    assert AutoTokenizer.from_pretrained(sft / "final").chat_template is not None
    # the template of the first stage came along with its tokenizer
    table = train(
        aligned, "objective=simpo", "rc=on", "reference.track=true", "model=local",
        f"model.path={sft / 'final'}", "data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}", "optim.lr=1e-3",
    )  # fmt: skip
    assert table[0]["logps/chosen"] > -0.75 * learned[0]["loss"]  # it starts where the first one ended
    assert table[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert table[-1]["rewards/margins"] > table[0]["rewards/margins"]
    assert AutoModelForCausalLM.from_pretrained(aligned / "final").config.model_type == "llama"


@pytest.mark.slow
def test_the_same_with_adapters(tmp_path: Path, inputs: list[str]) -> None:
    sft, aligned = tmp_path / "sft-run", tmp_path / "dpo-run"
    learned = train(
        sft, "objective=sft", *inputs, "adapter=lora", "data=pairs", f"data.path={tmp_path / 'sft.jsonl'}",
        "data.template=plain", "optim.lr=1e-1",
    )  # fmt: skip
    assert learned[-1]["loss"] < learned[0]["loss"]
    table = train(
        aligned, "objective=dpo", "rc=on", *inputs, "adapter=lora", f"adapter.path={sft / 'final'}",
        "data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}", "optim.lr=1e-2", "adapter.save_merged=true",
    )  # fmt: skip
    assert table[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-5)
    before = json.loads((aligned / "evaluation.json").read_text())
    result = rcpo("evaluate", f"run={aligned}")
    assert result.returncode == 0, result.stderr
    after = json.loads((aligned / "evaluation.json").read_text())
    for name in ("eval/logratios/chosen", "eval/logratios/rejected", "eval/rewards/accuracies"):
        assert after[name] == pytest.approx(before[name], abs=1e-4), name
    assert abs(after["eval/logratios/rejected"]) > 1e-2
    merged = aligned / "final" / "merged"
    result = rcpo(
        "evaluate", "objective=dpo", "model=local", f"model.path={merged}", "data=pairs",
        f"reference.path={sft / 'final'}", f"data.path={tmp_path / 'pairs.jsonl'}", "eval.kl_examples=0",
        f"hydra.run.dir={tmp_path / 'alone'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert alone["eval/logratios/chosen"] == pytest.approx(after["eval/logratios/chosen"], abs=1e-3)
