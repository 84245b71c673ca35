"""The scripts of the study: what they choose, judge and prepare, on numbers made by hand and on tiny runs."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rcpo.runs.comparison import RunSummary

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "study"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(lr: float, right: float, loser: float) -> RunSummary:
    settings = {
        "objective.name": "ipo", "objective.reduction": "mean", "objective.tau": 1.0, "optim.lr": lr,
    }  # fmt: skip
    values = {"eval/exact_match": right, "eval/token_logratios/rejected": loser}
    return RunSummary(str(lr), settings, values)


def test_the_best_of_those_whose_loser_fell_is_chosen() -> None:
    choose = script("choose")
    idle, mild, strong = run(1e-6, 0.99, -0.05), run(3e-5, 0.9, -0.1), run(1e-4, 0.8, -2.0)
    assert choose.choose([idle, strong, mild], "eval/exact_match", 0.1) is mild
    assert choose.choose([idle, strong], "eval/exact_match", 0.1) is strong
    assert choose.choose([idle, mild], "eval/exact_match", 0.5) is mild
    line = choose.line([idle, mild], "eval/exact_match", 0.1)
    assert line == "ipo_mean: {lr: 3.0e-5}  # of 2: 90.0 %, loser -0.10"


def step(ratio: float, winner: float, loser: float, **more: float) -> dict[str, Any]:
    """A Step's values: ρ = ½, r* = 2, so the band goes from 1 to 4."""
    band = {"lower": 1.0, "upper": 4.0, "center": 2.0, "cosine": 0.5}
    scales = {"scale_winner": 2.0, "scale_loser": 8.0}
    return {"ratio": ratio, "winner": winner, "loser": loser, **band, **scales, **more}


def test_verdicts_are_judged_by_what_happened() -> None:
    verdicts = script("verdicts")
    steps = [
        verdicts.Step(**values)
        for values in (
            step(2.0, winner=0.1, loser=-0.1),  # inside: right about both
            step(0.5, winner=-0.1, loser=-0.2),  # below: right about both
            step(0.5, winner=0.1, loser=-0.1),  # below, and the winner rose
            step(5.0, winner=0.2, loser=-0.1),  # above, and the loser fell
        )
    ]
    found = verdicts.judged(steps)
    assert (found["winner_right"], found["winner_rose"], found["winner_said_to_rise"]) == (0.75, 0.75, 0.5)
    assert (found["loser_right"], found["loser_fell"], found["steps"]) == (0.75, 1.0, 4)
    # 2 (2 − ½ · 2) and −8 (1 − ½ · 2 / 2)
    assert (steps[0].winner_rate, steps[0].loser_rate) == (2.0, -4.0)


def test_a_calibrated_step_is_judged_by_the_ratio_it_used() -> None:
    verdicts = script("verdicts")
    row = {
        "rc/alpha": 2.0,
        "logps/chosen": -1.0,
        "logps/rejected": -2.0,
        "dynamics/incentive_ratio": 1.0,
        "dynamics/incentive_rejected": 0.5,
        "dynamics/score_norm_chosen": 1.0,
        "dynamics/score_norm_rejected": 4.0,
        "dynamics/score_cosine": -0.1,
        "dynamics/band_lower": -0.4,
        "dynamics/band_upper": None,
        "dynamics/band_center": 4.0,
    }
    found = verdicts.step_of(row, (-0.5, -2.5))
    assert (found.ratio, found.upper, found.winner, found.loser) == (4.0, math.inf, 0.5, -0.5)
    assert (found.scale_winner, found.scale_loser) == (0.25, 4.0)  # d_l / α times the squared norms


@pytest.mark.slow
def test_by_the_true_gradient_a_small_sgd_step_on_a_pair_does_what_the_band_says() -> None:
    verdicts = script("verdicts")
    overrides = [
        "objective=simpo", "rc.geometry=parameters", "optim=sgd", "optim.lr=1e-4", "data.train_examples=64",
        "train.batch_size=1", "train.micro_batch_size=1", "reference.cache=off",
    ]  # fmt: skip
    found = verdicts.judged(list(verdicts.steps_of(overrides, 12)))
    assert found["winner_right"] == found["loser_right"] == 1.0 and found["steps"] == 12


def test_inputs_hold_usable_pairs_and_a_model_that_reads_them(tmp_path: Path) -> None:
    inputs = script("hh_inputs")
    inputs.HELD_OUT = 3
    rows = [
        {side: f"\n\nHuman: what is {n}?\n\nAssistant: {answer} {n}" for side, answer in sides}
        for n in range(8)
        for sides in [(("chosen", "it is"), ("rejected", "no"))]
    ]
    rows.insert(2, {"chosen": "\n\nHuman: hm\n\nAssistant: ", "rejected": "\n\nHuman: hm\n\nAssistant: a"})
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    inputs.main(tmp_path / "pairs.jsonl.gz", tmp_path / "out")
    lines = {
        name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        for name in ("pairs", "held_out", "chosen", "swapped")
    }
    counts = {"pairs": 5, "held_out": 3, "chosen": 5, "swapped": 5}
    assert {name: len(found) for name, found in lines.items()} == counts
    sides = [[json.loads(line)["chosen"] for line in lines[name]] for name in ("pairs", "swapped")]
    kept = [one == other for one, other in zip(*sides, strict=True)]
    assert any(kept) and not all(kept)
    assert {*json.loads(lines["swapped"][kept.index(False)]).values()} == {
        *json.loads(lines["pairs"][kept.index(False)]).values()
    }
    assert json.loads(lines["held_out"][-1]) == rows[-1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    text = json.loads(lines["chosen"][0])["text"]
    assert text == rows[0]["chosen"] and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_edges_across_samples_leave_each_batch_s_own_products_out() -> None:
    unseen = script("unseen")
    products = unseen.Products()
    first, second = [[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]
    products.add(torch.tensor(first))
    products.add(torch.tensor(second))
    # across: W = 1·2, L = 0 + 1, X = ½(1·0 + 1·2); own: W = 1 + 4, L = 2 + 1, X = 1 + 0
    assert products.across() == unseen.Edges(lower=0.5, upper=1.0)
    assert products.own() == unseen.Edges(lower=0.2, upper=3.0)


def test_verdicts_on_unseen_text_are_judged_by_what_followed() -> None:
    unseen = script("unseen")
    inside, below = unseen.Edges(0.5, 2.0), unseen.Edges(1.5, 2.0)
    moments = [unseen.Moment(10, 1.0, {"a": inside, "b": below}), unseen.Moment(20, 1.0, {"a": inside})]
    means = {10: (0.0, 0.0), 11: (-0.1, -0.1), 15: (0.1, 0.1), 20: (0.0, 0.0)}
    assert unseen.verdicts(moments, means, 1) == {  # both fell; nothing is known of step 21
        unseen.OUTCOME: [(False, True)], "a": [(False, True)], "b": [(True, True)],
    }  # fmt: skip
    assert unseen.verdicts(moments, means, 5)["b"] == [(False, False)]
    assert unseen.shares([(True, True), (False, True)]) == [0.5, 1.0]


def test_published_task_files_take_the_layout_of_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'rcpo[eval]'")
    tasks = script("tasks")
    choices = [{"text": "ice", "label": "A"}, {"text": "steam", "label": "B"}]
    asked = [
        {"id": str(n), "question": {"stem": f"What {n}?", "choices": choices}, "answerKey": "B"}
        for n in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in asked)
    (tmp_path / "arc_challenge_test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    truth = [{"question": "Is it?", "mc1_targets": {}, "mc2_targets": {"Yes": 1, "No": 0, "Perhaps": 1}}]
    (tmp_path / "truthfulqa_mc_task.json").write_text(json.dumps(truth))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "one two"}\n')
    (tmp_path / "bbh").mkdir()
    whole = {"canary": "…", "examples": [{"input": "not True is", "target": "False"}]}
    for name in ("boolean_expressions", "sports_understanding"):
        (tmp_path / "bbh" / f"{name}.json").write_text(json.dumps(whole))
    counts = {name: tasks.write_task(name, tmp_path, tmp_path, 2) for name in tasks.TASKS}
    assert counts == {
        "arc_challenge": 2, "truthfulqa_mc2": 1, "lambada_openai": 1,
        "bbh_boolean_expressions": 1, "bbh_sports_understanding": 1,
    }  # fmt: skip
    assert json.loads((tmp_path / "bbh_boolean_expressions.jsonl").read_text()) == whole["examples"][0]
    documents = [json.loads(line) for line in (tmp_path / "arc_challenge.jsonl").read_text().splitlines()]
    assert [row["question"] for row in documents] == ["What 0?", "What 2?"]  # evenly through the five
    assert documents[0]["choices"] == {"text": ["ice", "steam"], "label": ["A", "B"]}
    assert json.loads((tmp_path / "truthfulqa_mc2.jsonl").read_text()) == {
        "question": "Is it?", "mc2_targets": {"choices": ["Yes", "No", "Perhaps"], "labels": [1, 0, 1]},
    }  # fmt: skip
    for name, (inside, _, _, split) in tasks.TASKS.items():
        definition = json.loads((tmp_path / f"{name}.yaml").read_text())
        assert definition["include"].endswith(inside) and Path(definition["include"]).is_file()
        assert definition["dataset_kwargs"]["data_files"] == {split: str(tmp_path / f"{name}.jsonl")}


def test_differences_are_taken_document_by_document(tmp_path: Path) -> None:
    downstream = script("downstream")

    def answered(name: str, right: list[float]) -> Path:
        folder = tmp_path / name / "evaluation" / "harness"
        folder.mkdir(parents=True)
        lines = [json.dumps({"doc_hash": f"d{n}", "acc": value, "doc": {}}) for n, value in enumerate(right)]
        (folder / "arc.jsonl").write_text("\n".join(reversed(lines) if name == "run" else lines) + "\n")
        return tmp_path / name

    start, run = answered("start", [1, 0, 0, 1]), answered("run", [1, 1, 0, 1])
    # the start: deviation √(1/3), error √(1/12); the differences 0, 1, 0, 0: mean ¼, deviation ½, error ¼
    expected = ["arc", "accuracy", "4", f"0.500 ± {1.96 / math.sqrt(12):.3f}", "+0.250 ± 0.490"]
    assert downstream.rows(start, [run]) == [expected]
    with pytest.raises(SystemExit, match="other documents"):
        downstream.rows(start, [answered("short", [1, 0])])
