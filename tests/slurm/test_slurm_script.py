"""What a job's script says, and that a shell reads it as it was meant."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rcpo.slurm.script import BatchJob, directives, render
from rcpo.slurm.settings import SlurmConfig

RUN = BatchJob(Path("/r/my run"), "train", Path("/r/my run/code"), Path("/home dir"), ["rcpo.launch"])


def test_a_job_of_two_nodes_asks_for_what_was_given() -> None:
    slurm = SlurmConfig(
        nodes=2,
        gpus_per_node=8,
        time="08:00:00",
        cpus_per_task=6,
        memory="64G",
        partition="long",
        sbatch=["--exclusive"],
    )
    assert directives(RUN, slurm, after="71") == [
        "--job-name='train-my run'",
        "--partition=long",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--mem=64G",
        "--time=08:00:00",
        "--output='/r/my run/slurm-%j.out'",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--dependency=afterok:71",
        "--kill-on-invalid-dep=yes",
        "--requeue",
        "--exclusive",
    ]


def test_an_array_has_a_task_for_each_run() -> None:
    runs = [Path(f"/s/{name}") for name in "abc"]
    job = BatchJob(Path("/s"), "sweep", Path("/s/code"), Path("/w"), ["rcpo.launch"], runs=runs)
    flags = directives(job, SlurmConfig(array_parallel=2), None)
    assert "--array=0-2%2" in flags and "--output=/s/slurm-%A_%a.out" in flags
    script = render(job, SlurmConfig())
    assert 'run_dir=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" /s/runs.txt)' in script
    assert '-m rcpo.slurm.conclude "$run_dir" "$code" /s\n' in script


def test_a_percent_sign_in_a_folder_is_no_pattern_of_slurm_s() -> None:
    job = BatchJob(Path("/r/beta-50%_a"), "train", Path("/r/code"), Path("/w"), ["rcpo.launch"])
    assert "--output=/r/beta-50%%_a/slurm-%j.out" in directives(job, SlurmConfig(), None)


def test_one_task_a_node_starts_the_node_s_ranks() -> None:
    slurm = SlurmConfig(nodes=2, gpus_per_node=4, tasks="node", python="python")
    assert "--ntasks-per-node=1" in directives(RUN, slurm, None)
    job = replace(RUN, command=["rcpo.launch.node", "4"])
    # the task's cores are its four ranks' together
    assert "OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + 3) / 4))}" in render(job, slurm)
    assert "OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" in render(RUN, replace(slurm, tasks="rank"))


def programs(folder: Path, bodies: dict[str, str]) -> dict[str, str]:
    """Stand-ins for a cluster's programs in `folder`, and the environment in which a script finds them."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "LOG": str(folder), "SLURM_JOB_ID": "9", **MODULE}


# the `module` of a cluster is a function that the shell inherits; it reads what nobody set
MODULE = {"BASH_FUNC_module%%": '() { echo "$@$NEVER_SET" >"$LOG/module"; [ "$2" != missing ]; }'}


# 138: a rank died of the warning, as it could not listen yet
@pytest.mark.parametrize(
    ("code", "end", "requeue"),
    [(0, 0, True), (1, 1, True), (75, 75, True), (75, 75, False), (138, 75, True)],
)
def test_a_shell_runs_the_script_as_it_was_meant(code: int, end: int, requeue: bool, tmp_path: Path) -> None:
    cwd, run = tmp_path / "a 'quoted' place", tmp_path / "a run; rm -rf $HOME"
    cwd.mkdir()
    job = BatchJob(run, "train", run / "code", cwd, ["rcpo.launch"])
    slurm = SlurmConfig(
        python="python",
        modules=["gcc/13", "cuda/12"],
        wrap=["apptainer", "exec", "my image.sif"],
        srun=["--label"],
        requeue=requeue,
        env={"NCCL_SOCKET_IFNAME": "ib0 $X"},
        setup=["export MINE=yes"],
    )
    said = 'printf "%s\\n" "$@" >"$LOG/{}.log"'
    bodies = {name: said.format(name) for name in ("srun", "scontrol", "apptainer")}
    bodies["srun"] += f'; env >"$LOG/env"; pwd >"$LOG/pwd"; exit {code}'
    log = tmp_path / "log"
    environment = programs(log, bodies)
    result = subprocess.run(
        ["bash", "-c", render(job, slurm)], env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (end, "")
    assert (log / "module").read_text() == "load gcc/13 cuda/12\n"
    given = {path.stem: path.read_text().splitlines() for path in log.glob("*.log")}
    image = ["apptainer", "exec", "my image.sif"]
    flags, command = ["--wait=360", "--export=ALL", "--label"], ["python", "-m", "rcpo.launch", str(run)]
    assert given["srun"] == [*flags, *image, *command]
    assert (log / "pwd").read_text().strip() == str(cwd)
    found = (log / "env").read_text().splitlines()
    for line in ("NCCL_SOCKET_IFNAME=ib0 $X", "MINE=yes", f"PYTHONPATH={run / 'code'}", "OMP_NUM_THREADS=1"):
        assert line in found
    assert given["apptainer"] == [*image[1:], "python", "-m", "rcpo.slurm.conclude", str(run), str(end)]
    assert given.get("scontrol", []) == (["requeue", "9"] if end == 75 and requeue else [])


@pytest.mark.parametrize("cores", [None, "6"])
def test_a_task_gets_the_cores_that_the_job_asked_for(cores: str | None, tmp_path: Path) -> None:
    by_hand = Path(__file__).parents[2] / "scripts" / "train.sbatch"
    job = BatchJob(tmp_path / "run", "train", tmp_path / "code", tmp_path, ["rcpo.launch"])
    for script in (render(job, SlurmConfig(python="true")), by_hand.read_text()):
        environment = programs(tmp_path, {"srun": 'env >"$LOG/env"', "rcpo": ""})
        environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
        if cores is not None:  # as sbatch sets it, also where the script's line was edited
            environment["SLURM_CPUS_PER_TASK"] = cores
        subprocess.run(["bash", "-c", script], env=environment, check=True)
        found = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
        assert (found.get("SRUN_CPUS_PER_TASK"), found["OMP_NUM_THREADS"]) == (cores, cores or "1")


def test_a_module_that_cannot_be_loaded_ends_the_job(tmp_path: Path) -> None:
    environment = programs(tmp_path, {"srun": "touch $LOG/began"})
    script = render(replace(RUN, cwd=tmp_path), SlurmConfig(modules=["missing"]))
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert not (tmp_path / "began").exists()


def test_a_warning_reaches_the_step_and_its_end_is_waited_for(tmp_path: Path) -> None:
    step = (
        "trap 'sleep 0.3; touch $LOG/saved; exit 75' USR1; touch $LOG/ready; while true; do sleep 0.05; done"
    )
    requeue = 'echo "$@" >$LOG/requeued'
    environment = programs(tmp_path, {"srun": step, "scontrol": requeue, "python": "true"})
    job = BatchJob(tmp_path / "run", "train", tmp_path / "code", tmp_path, ["rcpo.launch"])
    command = ["bash", "-c", render(job, SlurmConfig(python="python"))]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 75
        assert (tmp_path / "saved").exists()
        assert (tmp_path / "requeued").read_text() == "requeue 9\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
