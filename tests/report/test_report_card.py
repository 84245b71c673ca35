"""The model card of final/: read back by huggingface_hub, renewed, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from report_folders import evaluation, rows, settings, write_run

from rcpo.report import card
from rcpo.report.card import is_own, renew_card

COMMAND = ["/opt/bin/rcpo", "train", "objective=simpo", "data.path=my pairs.jsonl"]


def trained(folder: Path, tree: dict[str, Any] | None = None, *, steps: int = 0, **environment: Any) -> Path:
    """A finished run with an empty final/ and a winner at −0.5 [−0.52, −0.48]; without steps, no curve."""
    tree = settings("simpo", rc=True) if tree is None else tree
    write_run(folder, tree, rows(steps, 1.1), evaluation(-0.5, -0.6))
    (folder / "data.json").write_text(json.dumps({"train": 6400, "evaluation": 814, "dropped": {"empty": 3}}))
    (folder / "environment.json").write_text(json.dumps({"command": COMMAND, **environment}))
    (folder / "final").mkdir()
    return folder


def written(run_dir: Path) -> ModelCard:
    said: list[str] = []
    renew_card(run_dir, said.append)
    assert said == []
    return ModelCard.load(run_dir / "final" / "README.md")


def with_model(path: Path | str) -> dict[str, Any]:
    return settings("simpo") | {"model": {"name": "local", "path": str(path)}}


def test_the_hub_reads_the_figures_of_the_evaluation(tmp_path: Path) -> None:
    found = written(trained(tmp_path / "run", steps=3))
    assert found.data.license == "apache-2.0" and found.data.library_name == "transformers"
    assert found.data.model_name == "tiny-simpo-rc" and "simpo" in found.data.tags
    results = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert results == {
        "accuracy": 0.8, "exact_match": 0.9, "logratios/chosen": -0.5, "logratios/rejected": -0.6
    }  # fmt: skip
    assert "| winner's mean log-ratio | −0.50 \\[−0.52, −0.48\\] |" in found.text
    assert "On average the winner fell with the loser" in found.text
    assert "6,400 to train on, 814 held out, 3 dropped as unusable" in found.text
    assert "rcpo train objective=simpo 'data.path=my pairs.jsonl'" in found.text
    assert "![Winner and loser over training](training.png)" in found.text and "@inproceedings" in found.text
    assert (tmp_path / "run/final/training.png").read_bytes()[:4] == b"\x89PNG"


def test_a_continued_run_lists_the_command_that_started_it(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", command=["rcpo", "train", "resume=outputs/x"], first_command=COMMAND)
    text = written(run_dir).text
    assert text.index("objective=simpo 'data") < text.index("rcpo train resume=outputs/x")


def test_a_card_names_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = with_model(tmp_path / "models" / "mine") | {
        "data": {
            "name": "pairs",
            "path": str(tmp_path / "secret" / "pairs.jsonl"),
            "sources": [{"path": f"{tmp_path}/secret/pairs.jsonl"}],
        },
        "mlflow": {"uri": "http://tracking.internal:5000"},
    }
    given = ["rcpo", "train", f"data.path={tmp_path}/secret/pairs.jsonl"]
    run_dir = trained(tmp_path / "run", tree, command=given)
    text = (run_dir / "final" / "README.md").read_text() if written(run_dir) else ""
    assert str(tmp_path) not in text and "tracking.internal" not in text
    assert "data.path=~/secret/pairs.jsonl" in text and "| data | pairs.jsonl |" in text


def test_the_licence_is_that_of_the_base_models_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert written(trained(tmp_path / "without", with_model(base))).data.license == "unknown"
    (base / "README.md").write_text("---\nlicense: llama3\nbase_model: owner/base\n---\n# Base\n")
    data = written(trained(tmp_path / "with", with_model(base))).data
    assert (data.license, data.base_model) == ("llama3", "owner/base")
    (base / "README.md").write_text("---\nlicense: [\n---\n")  # not YAML
    assert written(trained(tmp_path / "damaged", with_model(base))).data.license == "unknown"


def test_a_model_of_the_hub_is_named_with_the_licence_of_its_cached_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--owner--base"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    data = written(trained(tmp_path / "run", with_model("owner/base"))).data
    assert (data.license, data.base_model, data.model_name) == ("mit", "owner/base", "base-simpo")


def test_an_evaluation_renews_the_card_and_an_edited_one_stays(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run")
    before = written(run_dir).text
    values = evaluation(-0.1, -0.6)
    (run_dir / "evaluation.json").write_text(json.dumps(values))
    held_out = {"pairs": {"config": settings("simpo") | {"data": {"name": "pairs", "path": "other.jsonl"}}}}
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "settings.json").write_text(json.dumps(held_out))
    after = written(run_dir)
    assert after.text != before and "−0.10 \\[−0.12, −0.08\\]" in after.text
    assert after.data.eval_results[0].dataset_name == "10 % of the prompts of other.jsonl"
    path = run_dir / "final" / "README.md"
    path.write_text(path.read_text().replace("license: apache-2.0", "license: mit"))
    assert not is_own(path.read_text())
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation(-0.3, -0.6)))
    said: list[str] = []
    renew_card(run_dir, said.append)
    assert "was edited and stays" in said[0] and "license: mit" in path.read_text()


def test_a_card_that_cannot_be_written_costs_a_message_alone(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", steps=1)
    (run_dir / "final" / "model.safetensors").write_bytes(b"weights")
    (run_dir / "final" / card.CURVE).mkdir()  # in the way
    said: list[str] = []
    renew_card(run_dir, said.append)
    assert len(said) == 1 and "README.md was not written: IsADirectoryError" in said[0]
    assert (run_dir / "final" / "model.safetensors").read_bytes() == b"weights"
    assert not (run_dir / "final" / "README.md").exists()


def test_only_a_trained_run_has_a_card(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run")
    (run_dir / "finished.json").unlink()  # weights of a run before this one
    renew_card(run_dir, pytest.fail)
    assert list((run_dir / "final").iterdir()) == []


def test_settings_that_differ_are_listed_without_those_of_the_machine(tmp_path: Path) -> None:
    tree = settings("simpo") | {"wandb": {"mode": "disabled"}, "launch": {"processes": 2}}
    text = written(trained(tmp_path / "run", tree)).text
    assert "| `optim.name` | sgd |" in text and "wandb" not in text and "launch" not in text


def test_the_metadata_are_yaml_whatever_the_data_are_called(tmp_path: Path) -> None:
    tree = settings("simpo") | {"data": {"name": "pairs", "path": "odd: [name] | #1.jsonl"}}
    found = written(trained(tmp_path / "run", tree))
    block = found.content.split("---")[1]
    assert yaml.safe_load(block)["model-index"][0]["results"][0]["dataset"]["name"].endswith("#1.jsonl")
    assert "| data | odd: \\[name\\] \\| \\#1.jsonl |" in found.text
