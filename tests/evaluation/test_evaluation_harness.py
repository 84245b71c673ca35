"""lm-evaluation-harness as a library, on local tasks: its own command line's numbers, whatever the ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import forked
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tasks import write_tasks
from tiny import TOKENIZER, tiny_llama
from transformers import AutoModelForCausalLM

from rcpo.config.paths import conf_dir
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.evaluation import harness
from rcpo.evaluation.harness import Harness, TaskSpec, _task_manager, flat_record, write_results
from rcpo.evaluation.heldout import merge_record
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_model, load_tokenizer, load_whole
from rcpo.system import distributed

LM_EVAL = [f"lm_eval.{name}" for name in ("__main__", "evaluator", "tasks", "models.huggingface")]
LM_EVAL.append(str(Path(__file__).with_name("indexed.py")))
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'rcpo[eval]'")


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The datasets that `datasets` makes of the files are kept here."""
    distributed.initialize()
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("hf"))
        patch.setenv("HF_HOME", home)
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(home) / "datasets")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def config(tasks: tuple[str, str], tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.eval.tasks = [f"{tasks[0]}@2", tasks[1]]
    config.reference.cache = str(tmp_path / "cache")
    return config


def results(config: RunConfig, load: Callable[[], Any] | None = None, folder: str = TOKENIZER) -> Any:
    tokenizer = load_tokenizer(Path(folder), config.model)
    found = Harness.prepare(config)
    load = load or partial(load_model, Path(folder), config.model)
    return found.run(ModelSource(Path(folder)), tokenizer, load)


def never() -> NoReturn:
    raise AssertionError("the results are known, yet the model was loaded")


def command_line(task: str, shots: int, folder: Path) -> dict[str, Any]:
    """What `lm-eval run` itself writes."""
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={TOKENIZER}",
        "--tasks", task, "--num_fewshot", str(shots), "--batch_size", "8", "--device", "cpu",
        "--output_path", str(folder / "out.json"),
    ]  # fmt: skip
    # this process has a group of one, which the other is not to join
    alone = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    done = forked.run(command, imports=LM_EVAL, env=alone)
    assert done.returncode == 0, done.stderr
    (file,) = folder.rglob("out*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
def test_the_harness_own_command_line_to_the_last_digit(
    config: RunConfig, tasks: tuple[str, str], tmp_path: Path
) -> None:
    ours = results(config)
    for spec, task, shots in zip(ours, tasks, (2, 0), strict=True):
        folder = tmp_path / str(shots)
        folder.mkdir()
        (theirs,) = command_line(task, shots, folder).values()
        (own,) = ours[spec]["results"].values()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert len(numbers) >= 2 and {name: own[name] for name in numbers} == numbers
    record = flat_record(ours)
    # the packaged model answers nearly all sums; examples in the prompt are new to it
    assert record["eval/harness/sums_answer/exact_match,number"] > 0.9
    assert 0 < record["eval/harness/sums_choice/acc/stderr"] < 0.2


@pytest.mark.slow
def test_results_are_kept_by_content(config: RunConfig, tasks: tuple[str, str], tmp_path: Path) -> None:
    first = results(config)
    assert results(config, never) == first
    for change in (
        lambda: setattr(config.eval, "limit", 3),
        lambda: config.eval.tasks.__setitem__(0, f"{tasks[0]}@1"),
        lambda: Path(tasks[0]).parent.joinpath("sums.jsonl").write_text(reversed_lines(tasks)),
    ):
        change()
        with pytest.raises(AssertionError, match="was loaded"):
            results(config, never)
    model = tiny_llama(tmp_path / "other")
    with pytest.raises(AssertionError, match="was loaded"):
        results(config, never, model)
    config.reference.cache = "off"
    with pytest.raises(AssertionError, match="was loaded"):
        results(config, never)
    write_results(tmp_path, first)
    kept = json.loads((tmp_path / "harness.json").read_text())
    assert kept[tasks[1]]["results"] == first[tasks[1]]["results"]
    lines = (tmp_path / "harness" / "sums_choice.jsonl").read_text().splitlines()
    assert len(lines) == 21 and json.loads(lines[0])["doc"]["question"] == "31+12="


def test_results_are_those_of_the_model_s_own_way_to_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness calls `generate`, which takes penalties and more from generation_config.json."""
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr(harness, "_language_model", lambda model, *_: model)
    monkeypatch.setattr(Harness, "_evaluate", lambda self, model, spec: {"results": {}})
    config = RunConfig()
    config.reference.cache = str(tmp_path / "cache")
    tokenizer = load_tokenizer(Path(folder), config.model)
    found = Harness(config, None, {TaskSpec("task"): "content"})
    loaded: list[object] = []

    def load() -> Any:
        loaded.append(object())
        return loaded[-1]

    for penalty, count in ((1.0, 1), (1.0, 1), (1.3, 2)):
        Path(folder, "generation_config.json").write_text(json.dumps({"repetition_penalty": penalty}))
        found.run(ModelSource(Path(folder)), tokenizer, load)
        assert len(loaded) == count


def reversed_lines(tasks: tuple[str, str]) -> str:
    text = Path(tasks[0]).parent.joinpath("sums.jsonl").read_text()
    return "\n".join(reversed(text.splitlines())) + "\n"


@pytest.mark.slow
def test_two_processes_share_the_documents(config: RunConfig, tmp_path: Path) -> None:
    one = flat_record(results(config))
    tasks = ",".join(config.eval.tasks)
    command = [
        sys.executable, "-m", "rcpo.cli", "evaluate", f"eval.tasks=[{tasks}]", "eval.preferences=false",
        "launch.processes=2", "reference.cache=off", f"hydra.run.dir={tmp_path / 'two'}",
    ]  # fmt: skip
    done = forked.run(command, imports=LM_EVAL)
    assert done.returncode == 0, done.stderr
    two = json.loads(Path(tmp_path, "two", "evaluation.json").read_text())
    assert two == pytest.approx(one, rel=1e-12) and len(two) == 6
    assert "sums_choice" in done.stdout


def test_entries_of_eval_tasks() -> None:
    assert TaskSpec.parse("mmlu@5") == TaskSpec("mmlu", 5)
    assert str(TaskSpec.parse("a/b.yaml")) == "a/b.yaml" and TaskSpec.parse("arc@25").shots == 25
    for text in ("@5", "mmlu@", "mmlu@five", ""):
        with pytest.raises(ConfigError, match="NAME@SHOTS"):
            TaskSpec.parse(text)


@pytest.mark.slow
def test_what_cannot_be_run_is_said_before_a_weight_is_read(tmp_path: Path, tasks: tuple[str, str]) -> None:
    config = RunConfig()
    config.eval.tasks = ["arc_chalenge@25"]
    with pytest.raises(ConfigError, match="no task arc_chalenge; did you mean arc_challenge"):
        Harness.prepare(config)
    choice = Path(tasks[0]).read_text()
    (tmp_path / "gone.yaml").write_text(choice.replace("sums.jsonl", "gone.jsonl"))
    config.eval.tasks = [str(tmp_path / "gone.yaml")]
    with pytest.raises(ConfigError, match=r"the data of .*gone\.yaml cannot be obtained"):
        Harness.prepare(config)
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    (tmp_path / "lacking.yaml").write_text(
        choice.replace('doc_to_text: "{{question}}"', "doc_to_text: !function lacking.text")
    )
    config.eval.tasks = [str(tmp_path / "lacking.yaml"), tasks[0]]
    harness = Harness.prepare(config)
    assert [str(spec) for spec in harness.keys] == [tasks[0]]
    (reason,) = harness.skipped.values()
    assert "no_such_package" in reason


@pytest.mark.slow
def test_the_leaderboards_settings() -> None:
    """Each preset's tasks exist; the numbers of examples are the leaderboards', ours or the harness's own."""
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = _task_manager()
    shots = {}
    for name in ("leaderboard", "leaderboard_v1", "leaderboard_v2"):
        preset = yaml.safe_load((conf_dir() / "eval" / f"{name}.yaml").read_text())
        for text in preset["tasks"]:
            spec = TaskSpec.parse(text)
            assert spec.name in manager.all_tasks
            shots.setdefault(spec.name, spec.shots)
    own = {}
    for task, shot in shots.items():
        group = task.removesuffix("_hard")  # a part of it is leaderboard_math_algebra_hard
        child = next(name for name in manager.all_subtasks if name == task or name.startswith(f"{group}_"))
        path = manager.task_index[child].yaml_path
        own[task] = load_yaml(path, resolve_func=False, recursive=True).get("num_fewshot", 0)
        own[task] = own[task] if shot is None else shot
    assert own == {
        "arc_challenge": 25,
        "gsm8k": 5,
        "mmlu": 5,
        "leaderboard_bbh": 3,
        "leaderboard_math_hard": 4,
        "leaderboard_mmlu_pro": 5,
        "leaderboard_musr": 0,
    }


def test_an_adapter_is_added_to_the_weights(tmp_path: Path) -> None:
    config = RunConfig()
    base = tiny_llama(tmp_path / "base")
    torch.manual_seed(4)
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(tmp_path / "final")
    merged = load_whole(ModelSource(Path(base), adapter=tmp_path / "final"), config.model, "fp32", 0)
    plain = load_whole(ModelSource(Path(base)), config.model, "fp32", 0)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found, expected, without = (model(ids).logits for model in (merged, adapted, plain))
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, without, atol=1e-1)


def test_numbers_that_are_not_finite_are_kept_as_text_that_any_reader_takes(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    sample = {"doc_id": 0, "resps": [[[-inf, False]]], "acc": nan}
    found = {"results": {"task": {"acc,none": nan, "acc_stderr,none": inf, "alias": "task"}}}
    results = {"task": {**found, "samples": {"task": [sample]}}}
    write_results(tmp_path, results)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    kept = json.loads((tmp_path / "harness.json").read_text(), parse_constant=refuse)
    assert kept["task"]["results"]["task"] == {"acc,none": "nan", "acc_stderr,none": "inf", "alias": "task"}
    lines = (tmp_path / "harness" / "task.jsonl").read_text()
    assert json.loads(lines, parse_constant=refuse) == {
        "doc_id": 0,
        "resps": [[["-inf", False]]],
        "acc": "nan",
    }
    merge_record(tmp_path, flat_record(results), kept=("eval/",))
    record = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert record == {"eval/harness/task/acc": None, "eval/harness/task/acc/stderr": None, "nonfinite": 2}
