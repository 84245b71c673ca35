"""Calibration in old and new versions of TRL: the numbers of the newest, which are those of `rcpo train`."""

from __future__ import annotations

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import forked
import pytest
from trainers import sums, sums_model
from versions import ALWAYS, VERSIONS, logs

from rcpo.data.batches import GlobalBatches

pytestmark = pytest.mark.slow
CHOSEN = list(VERSIONS) if os.environ.get("RCPO_TRL") == "all" else ALWAYS
STEPS = 20
# what `rcpo train` and TRL both log, and the same objective's settings in rcpo
LOGGED = {"loss": 0, "rc/alpha": 2, "dynamics/incentive_chosen": 3, "dynamics/score_cosine": 6}
OBJECTIVES = {
    "dpo": ["objective=dpo", "objective.beta=0.1"],
    "simpo": ["objective=simpo", "objective.beta=2.0", "objective.gamma=1.0"],
    "apo": ["objective=apo_zero_unpaired", "objective.beta=0.1"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers 4 and 5 can read, pairs, and the pairs in the order that rcpo takes them."""
    folder = tmp_path_factory.mktemp("versions")
    sums_model(folder)
    settings = folder / "model" / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**known, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    rows = sums(folder, 64)
    batches = GlobalBatches(len(rows), 8, seed=1)
    order = chain.from_iterable(batches.indices(step) for step in range(STEPS))
    (folder / "ordered.json").write_text(json.dumps([rows[i] for i in order]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def newest(inputs: Path) -> dict[str, Any]:
    return logs(None, inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_twenty_steps_are_those_of_rcpo(inputs: Path, newest: dict[str, Any], name: str) -> None:
    run = inputs / f"run-{name}"
    words = [
        *("train", *OBJECTIVES[name], "rc=on", "model=local", f"model.path={inputs / 'model'}", "data=pairs"),
        *(f"data.path={inputs / 'pairs.jsonl'}", f"data.eval_path={inputs / 'pairs.jsonl'}"),
        *(f"train.max_steps={STEPS}", "train.batch_size=8", "train.micro_batch_size=8", "optim.lr=2e-4"),
        *("wandb.mode=disabled", "eval.max_examples=8", "eval.generate_examples=1", f"hydra.run.dir={run}"),
    ]
    done = forked.rcpo(words, inputs, os.environ)
    assert done.returncode == 0, done.stderr
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line, theirs in zip(lines, newest["runs"][name], strict=True):
        ours = json.loads(line)
        for key, column in LOGGED.items():
            assert ours[key] == pytest.approx(theirs[column], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("version", CHOSEN)
def test_old_versions_calibrate_as_the_newest_does(
    inputs: Path, newest: dict[str, Any], version: str, tmp_path: Path
) -> None:
    # the worker also checks each trainer's log-probs and gradients as those of an untested version
    shutil.copytree(inputs / "model", tmp_path / "model")
    for name in ("pairs.jsonl", "ordered.json"):
        shutil.copy(inputs / name, tmp_path)
    found = logs(version, tmp_path)
    assert found["version"] == version != newest["version"]
    assert found["runs"].keys() == newest["runs"].keys()
    for name, rows in newest["runs"].items():
        for own, theirs in zip(found["runs"][name], rows, strict=True):
            assert own[0] == pytest.approx(theirs[0], abs=6e-5), name  # transformers 4 logs four decimals
            assert own[1:] == pytest.approx(theirs[1:], rel=1e-5, abs=1e-6), name


def test_a_resumed_run_is_the_whole_one(newest: dict[str, Any]) -> None:
    # the other versions are held to these numbers
    assert newest["runs"]["resumed"] == newest["runs"]["whole"]
    alphas = [row[2] for row in newest["runs"]["whole"]]
    assert len(alphas) == 4 and alphas[0] == 1.0 and len(set(alphas)) == 4
