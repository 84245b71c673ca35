"""Every `rcpo` command of the pages runs, made small: one step, few examples, one seed.

What would download a model, or wants a cluster, is composed in its place (`--cfg job`, `--dry-run`).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import forked
import pytest
import yaml
from datasets import Dataset
from judge_server import JudgeServer
from pages import blocks
from tiny import sums_file, tiny_llama

from rcpo.config.paths import conf_dir

SMALL = {
    "train.max_steps": "1",
    "train.batch_size": "8",
    "train.micro_batch_size": "4",
    "data.train_examples": "32",
    "eval.max_examples": "8",
    "eval.generate_examples": "2",
    "wandb.mode": "disabled",
}
# Their weights are on the hub, or made by a script from other data: the configuration alone can be tried.
DOWNLOADED = re.compile(
    r"(^|,)(model=(?!tiny\b|local\b)|experiment=|study=(hh|real)|data=(?!sums\b|pairs\b)|adapter=qlora|eval=leaderboard|eval\.tasks=\[hellaswag)"
)


def commands() -> list[str]:
    """The lines of bash blocks that call rcpo, continuations joined, comments left out, each once."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] in (["rcpo"], ["./scripts/rcpo"]):
                found.append(shlex.join(words[1:]))
    return sorted(set(found))


def small(words: list[str]) -> list[str]:
    """The command with one seed, one objective, two trials and few steps; of runs beside each other, one."""
    one = "seed|objective|rc" if words[0] == "train" else "seed|objective"
    words = [re.sub(rf"^({one})=(\w+)(,\w+)+$", r"\1=\2", word) for word in words]
    words = [re.sub(r"^(plan\.\w+)=([\w.-]+)(,[\w.-]+)+$", r"\1=\2", word) for word in words]
    words = [re.sub(r"^sweep\.trials=\d+$", "sweep.trials=2", word) for word in words]
    if "eval=judge" in words:
        words.append("judge.max_examples=2")
    if words[0] in ("sample", "iterate"):
        words += ["sample.prompts=24", "sample.batch_size=64"]
    words = [re.sub(r"^rounds=\d+$", "rounds=1", word) for word in words]
    if words[0] == "plan":  # downloads nothing, trains nothing
        return words
    if any(DOWNLOADED.search(word) for word in words):
        return [*(re.sub(r"^rc=(\w+)(,\w+)+$", r"rc=\1", word) for word in words), "--cfg", "job"]
    if words[0] == "push":
        return words if "--dry-run" in words else [*words, "--dry-run"]
    if words[0] == "submit" and words[1] != "status":
        return [*words, "--dry-run"]
    given = {word.partition("=")[0] for word in words}
    words += [first for word in words if word.startswith("study=") for first in first_of(word[6:], given)]
    if words[0] in ("report", "doctor", "submit", "list", "init") or "compare" in given:
        return words
    kept = [word for word in words if word.partition("=")[0] not in SMALL]
    fitting = [key for key in SMALL if key != "data.train_examples" or "data=pairs" not in words]
    values = SMALL | (
        {"train.max_steps": "30"} if "optim.schedule=wsd" in words else {}
    )  # room for its parts
    return [*kept, *(f"{key}={values[key]}" for key in fitting)]


def first_of(study: str, given: set[str]) -> list[str]:
    """The first run of a named sweep: the first of each of the values that it takes in turn."""
    text = (conf_dir() / "study" / f"{study}.yaml").read_text(encoding="utf-8")
    turns = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    return [f"{key}={str(values).partition(',')[0]}" for key, values in turns.items() if key not in given]


def rcpo(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """One call in a folder, which is also importable from there."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "programs"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    return forked.rcpo(words, folder, environment)


def submitted_runs(folder: Path) -> None:
    """Two runs that a cluster has taken: stand-ins for its programs say so."""
    (folder / "programs").mkdir()
    for name, answer in (("sbatch", "41"), ("squeue", "41|PENDING|0:00|(Priority)")):
        (folder / "programs" / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (folder / "programs" / name).chmod(0o755)
    for name in ("first", "second"):
        result = rcpo(folder, ["submit", "train", f"hydra.run.dir=outputs/{name}"])
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name: models, data, a run, an adapter, an objective of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("my-model", "A", "B"):
        tiny_llama(folder / name)
    pairs = Path(sums_file(folder / "pairs.jsonl", 60))
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(pairs.read_bytes()))
    Dataset.from_json(str(pairs)).to_parquet(folder / "pairs.parquet")
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copyfile(pairs, folder / name)
    data = folder / "OWNER" / "NAME" / "data"  # a folder with the hub's names stands in for the hub
    data.mkdir(parents=True)
    for split in ("train_prefs", "test_prefs"):
        shutil.copyfile(folder / "pairs.parquet", data / f"{split}-00000-of-00001.parquet")
    python, conf = (
        [match.groups() for block in blocks(kind) if (match := re.match(r"# (\S+)\n(.*)", block, re.DOTALL))]
        for kind in ("python", "yaml")
    )
    for name, text in [*python, *conf]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, more in (("my-run", ["checkpoint.every=1"]), ("sft", ["objective=sft", "adapter=lora"])):
        words = small(["train", f"hydra.run.dir=outputs/{name}", *more])
        result = rcpo(folder, words)
        assert result.returncode == 0, result.stderr
    shutil.copytree(folder / "outputs" / "my-run", folder / "outputs" / "start")
    for sweep in ("mine", "dpo", "simpo", "sums", "sums_1e-4"):
        shutil.copytree(folder / "outputs" / "my-run", folder / "outputs" / sweep / "0")
    submitted_runs(folder)
    shutil.copytree(folder / "outputs" / "my-run", folder / "outputs" / "other-run")
    question = {"instruction": "10+99=", "output": "109"}
    (folder / "alpaca_eval.json").write_text(json.dumps([question] * 2), encoding="utf-8")
    return folder


def test_there_are_commands() -> None:
    assert len(commands()) > 10 and "train objective=simpo rc=on" in commands()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_command_runs(workspace: Path, command: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    # a submitted run has a copy of the code, which jobs alone read
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("code"))
    words = small(shlex.split(command))
    for word in words:
        if word.startswith(("hydra.sweep.dir=", "hydra.run.dir=")):  # what others read, this one makes
            shutil.rmtree(folder / word.partition("=")[2], ignore_errors=True)
    with JudgeServer().running() as judge:
        result = rcpo(folder, [word.replace("http://localhost:8000/v1", judge.url) for word in words])
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-1500:]
