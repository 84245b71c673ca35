"""Runs on a real SLURM of two nodes: submitted, stopped, lost, and equal to those of one machine."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm import Cluster
from user import ONE_STEP, ROOT, STEPS, TWO_RANKS, User

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_that_is_warned_and_then_loses_a_node_ends_with_one_machine_s_bits(
    user: User, cluster: Cluster
) -> None:
    job = user.submit("train", *TWO_RANKS, "slurm.nodes=2", "hydra.run.dir=run")
    evaluation = user.submit("evaluate", "run=run", "eval.max_examples=8", "slurm.after=run")
    user.wait_for_step("run", 3, lambda: cluster.state(job) in ("PENDING", "RUNNING"))
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    cluster.wait(lambda: cluster.state(job) != "RUNNING", "end of the first piece")
    stopped = user.rows("run")[-1]["step"]
    assert stopped < STEPS
    assert (user.folder / "run" / "checkpoints" / "latest").read_text() == f"step-{stopped}\n"
    assert "PENDING" in user.rcpo("submit", "status", ".")

    user.wait_for_step("run", stopped + 1, lambda: cluster.state(job) in ("PENDING", "RUNNING"))
    cluster.lose_node("n2", job)
    cluster.wait(lambda: cluster.state(job) != "RUNNING", "end of the second piece")
    assert user.rows("run")[-1]["step"] < STEPS
    cluster.start_node("n2")

    assert cluster.wait_for_end(job) == "COMPLETED", user.words("run")
    assert f"continues after step {stopped}" in user.words("run")
    user.same("run", "here")
    assert cluster.wait_for_end(evaluation) == "COMPLETED", user.words("run")
    evaluated = json.loads((user.folder / "run" / "evaluation.json").read_text())
    assert "eval/rewards/accuracies" in evaluated
    assert user.rcpo("submit", "status", "run").count("COMPLETED") == 2


def test_the_script_by_hand_is_cancelled_and_goes_on_as_a_job(user: User, cluster: Cluster) -> None:
    (user.folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "train.sbatch", user.folder / "scripts")
    program = user.folder / "scripts" / "rcpo"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m rcpo.cli "$@"\n')
    program.chmod(0o755)
    flags = ["--nodes=2", "--export=ALL,RUN_DIR=by-hand", "--output=by-hand/slurm-%j.out"]
    command = ["sbatch", "--parsable", *flags, "scripts/train.sbatch", *TWO_RANKS]

    (user.folder / "by-hand").mkdir()
    job = user.says(command).strip()
    user.wait_for_step("by-hand", 3, lambda: cluster.state(job) in ("PENDING", "RUNNING"))
    cluster.run("scancel", job)
    cluster.wait(lambda: not cluster.processes("n1", job) + cluster.processes("n2", job), "end of its ranks")
    assert cluster.wait_for_end(job) == "CANCELLED"
    stopped = user.rows("by-hand")[-1]["step"]
    assert stopped < STEPS
    assert (user.folder / "by-hand" / "checkpoints" / "latest").read_text() == f"step-{stopped}\n"

    # goes on as a job of the same folder: one task a node, in a container, warned before it can listen
    again = at_a_site(user).submit(
        *("train", *TWO_RANKS, "slurm.nodes=2", "slurm.tasks=node", "slurm.modules=[toolchain/1]"),
        *(f"slurm.wrap=[{user.folder / 'container'},image.sif]", "hydra.run.dir=by-hand"),
    )
    cluster.wait((user.folder / "loaded").exists, "start of the script")
    cluster.run("scancel", "--batch", "--signal=USR1", again)
    cluster.wait(lambda: cluster.state(again) != "RUNNING", "end of the first piece")
    assert user.rows("by-hand")[-1]["step"] == stopped

    assert cluster.wait_for_end(again) == "COMPLETED", user.words("by-hand")
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", again)
    assert f"continues after step {stopped}" in user.words("by-hand")
    assert (user.folder / "loaded").read_text() == "load toolchain/1\n" * 2
    entered = (user.folder / "entered").read_text().splitlines()
    # both nodes, and the end, in each of two pieces; the first may have ended before a task began
    assert set(entered) == {"image.sif n1", "image.sif n2"} and 4 <= len(entered) <= 6
    user.same("by-hand", "here")


def at_a_site(user: User) -> User:
    """The user with stand-ins for modules and a `container`, each of which says that it was asked."""
    container = user.folder / "container"
    container.write_text('#!/bin/sh\necho "$1 $SLURMD_NODENAME" >>entered\nshift\nexec "$@"\n')
    container.chmod(0o755)
    # as on a cluster a function of the user's shell, which a job inherits
    module = {"BASH_FUNC_module%%": '() { echo "$@$NEVER_SET" >>loaded; }'}
    return replace(user, environment={**user.environment, **module})


def test_an_array_of_four_runs_one_of_which_fails(user: User, cluster: Cluster) -> None:
    sweep = ["sweep", "seed=1,2", "optim.lr=1e-4,1e-3", *ONE_STEP, "hydra.sweep.dir=array"]
    failing = user.folder / "array" / "seed-2_optim.lr-0.001"
    # made to fail while it runs: a folder in the place of a file that it writes
    (failing / "metrics.jsonl").mkdir(parents=True)
    job = user.submit(*sweep)
    waiting = user.submit("train", *ONE_STEP, "slurm.after=array", "hydra.run.dir=after")
    states = [cluster.wait_for_end(f"{job}_{index}") for index in range(4)]
    assert states == ["COMPLETED"] * 3 + ["FAILED"], [user.words(f"array/{path.name}") for path in runs(user)]
    found = json.loads((user.folder / "array" / "sweep.json").read_text())
    labels = [condition["label"] for condition in found["conditions"]]
    assert labels == ["sft optim.lr=0.0001", "sft optim.lr=0.001"]
    assert [len(condition["seeds"]) for condition in found["conditions"]] == [2, 1]
    (failed,) = found["incomplete"]
    assert failed["name"] == failing.name and failed["code"] == 1
    status = user.rcpo("submit", "status", "array")
    assert status.count("COMPLETED") == 3 and status.count("FAILED") == 1
    # what waits for it drops out
    assert cluster.wait_for_end(waiting) == "CANCELLED"
    # submitted again, only what is missing is submitted
    (failing / "metrics.jsonl").rmdir()
    shown = user.rcpo("submit", *sweep, "--dry-run")
    assert "--array=0-0\n" in shown and f"# {failing}" in shown


def runs(user: User) -> list[Path]:
    return sorted(path.parent for path in (user.folder / "array").glob("*/config.yaml"))


def test_hydra_s_submitit_launcher_runs_a_sweep(user: User, cluster: Cluster) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="submitit is not installed: pip install 'rcpo[slurm]'"
    )
    said = user.rcpo(
        *("sweep", "seed=1,2", *ONE_STEP, "hydra/launcher=submitit_slurm", "hydra.sweep.dir=submitit"),
        *("hydra.launcher.timeout_min=15", "hydra.launcher.cpus_per_task=1"),
    )
    assert "2 complete runs" in said
    found = json.loads((user.folder / "submitit" / "sweep.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["seed-1", "seed-2"]
    assert list((user.folder / "submitit" / ".submitit").iterdir())


def test_what_slurm_refuses_is_said_in_its_words(user: User, cluster: Cluster) -> None:
    said = user.rcpo("submit", "train", *ONE_STEP, "slurm.partition=nowhere", "hydra.run.dir=no", code=1)
    assert "rcpo: sbatch: " in said and "invalid partition" in said
