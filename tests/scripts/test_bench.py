"""`scripts/bench`: a tiny size, so that what it measures is known to run and its answers to make sense."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny import tiny_llama
from transformers import AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = ["--vocabulary", "300", "--hidden", "16", "--layers", "1", "--heads", "2", "--length", "48"]


def bench(out: Path, only: str, imports: Sequence[str] = ()) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / "benchmark/main.py"), "--steps", "2", "--warmup", "1", *TINY]
    result = forked.run([*command, "--only", only, "--out", str(out)], imports=imports)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "###" in (out / "results.md").read_text()
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_five_variants_see_the_same_batches(tmp_path: Path) -> None:
    results = bench(tmp_path, "calibration,control")
    found, control = results["calibration"], results["control"]
    assert control["every"] == 4 and control["fresh"]["ratio"] == 1
    assert control["shares"][0] == pytest.approx((control["control"]["ratio"] - 1) / 4)
    assert set(found) == {
        "rc=off dynamics.every=0",
        "rc=off",
        "rc=on",
        "rc=loop",
        "the published way",
        "rc=on, by rc=off",
    }
    for row in found.values():
        assert len(row["all_seconds"]) == 2 and min(row["all_seconds"]) > 0
        assert row["peak"] > 50e6  # a Python process with torch has more


@pytest.mark.slow
@pytest.mark.serial
def test_phases_fill_the_step_and_epochs_repeat_their_pairs(tmp_path: Path) -> None:
    found = bench(tmp_path, "phases,epochs,products")
    assert 0 < found["products"]["share"] < 1.2 and found["products"]["rate"] > 1e6
    for row in found["phases"]:
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.15)  # medians, of each phase its own
        assert row["shares"]["head"] > 0 and row["shares"]["geometry"] > 0 and row["shares"]["optimizer"] > 0
        assert (row["shares"]["communication"] > 0) == (row["processes"] > 1)
    assert [row["pairs"] for row in found["epochs"]] == [64, 512]
    assert found["epochs"][0]["ratio"] == 1 and found["epochs"][1]["milliseconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'rcpo[bench]'"
)
def test_both_sides_compute_the_same_losses(tmp_path: Path) -> None:
    """DPO from the same weights on the same tokens: log 2 at first, then nearly so at a tiny rate."""
    results = bench(tmp_path, "peers,trl", imports=["trl"])
    ours, theirs = (results["peers"][name]["losses"] for name in ("rcpo rc=on", "TRL"))
    assert ours == pytest.approx(theirs, abs=2e-3)
    assert results["trl"]["DPOTrainer"]["ratio"] == 1 and results["trl"]["CalibratedDPOTrainer"]["ratio"] > 0


def test_a_real_model_is_fed_by_its_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmark"))
    inputs = importlib.import_module("inputs")
    model = Path(tiny_llama(tmp_path / "tiny"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}={% else %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    rows = [
        {"instruction": f"{n}+1", "input": "", "output": str(n + 1), "chosen": str(n + 1), "rejected": str(n)}
        for n in range(10, 30)
    ]
    pairs = tmp_path / "alpaca.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = inputs.Size.of(model, 2, 48)
    folder = inputs.prepare(tmp_path / "inputs", size, 3, pairs)
    assert (folder / "model").resolve() == model.resolve() and size.vocabulary == len(tokenizer)
    read = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in read]
    assert len(prompts) == 6 and all(re.fullmatch(r"\d\d\+1=", prompt) for prompt in prompts)
