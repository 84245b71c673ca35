"""Processes: who started this one, how local ranks end, what their exit codes and signals become."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rcpo import launch
from rcpo.config import ConfigError, LaunchConfig, ObjectiveConfig, RunConfig, TrainConfig, save_run_config
from rcpo.launch import Ranks, external_ranks, first_node

ROOT = Path(launch.__file__).parents[1]


def test_a_process_alone_has_no_outer_launcher() -> None:
    assert external_ranks({}) is None
    # a batch script of SLURM is a process alone, whatever the job's number of tasks
    assert external_ranks({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert external_ranks({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_and_srun_are_recognised() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert external_ranks(torchrun) == Ranks(3, 4, 1, "torchrun")
    srun = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert external_ranks(srun) == Ranks(3, 4, 1, "srun")
    # torchrun inside a job step: the inner launcher's ranks count
    assert external_ranks({**srun, **torchrun}) == Ranks(3, 4, 1, "torchrun")


def test_srun_s_ranks_become_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "node_address", lambda node: f"address of {node}")
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "100",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
    }
    ranks = external_ranks(environment)
    assert ranks is not None
    launch.export_ranks(ranks, environment)
    assert [environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    assert environment["MASTER_ADDR"] == "address of gpu07"
    assert environment["MASTER_PORT"] == "23702"  # 20000 + (100 · 37 + 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-012,020],cpu1", "gpu007"),
        ("a1,b2", "a1"),
        ("rack[1-2].example.org", "rack1.example.org"),
        ("node-3-[12,14]", "node-3-12"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_node_without_a_name_in_the_network_has_slurm_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.node_address("localhost") == "localhost"
    answer = "NodeName=no_such.invalid NodeAddr=10.0.0.7 NodeHostName=x"
    monkeypatch.setattr(launch, "_scontrol", lambda *_: answer)
    assert launch.node_address("no_such.invalid") == "10.0.0.7"
    monkeypatch.setattr(launch, "_scontrol", lambda *_: "")
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        launch.node_address("no_such.invalid")


def test_an_outer_launcher_s_count_goes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    two = RunConfig(launch=LaunchConfig(processes=2))
    assert launch.world_size(two) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.world_size(RunConfig()) == 4
    with pytest.raises(ConfigError, match=r"leave launch\.processes out"):
        launch.world_size(two)


def test_what_needs_torch_to_be_seen_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="12 process"):
        launch.check(RunConfig(train=TrainConfig(batch_size=32, micro_batch_size=1)), world_size=12)
    unknown = RunConfig(objective=ObjectiveConfig(name="dpo", hyperparameters={"bta": 1.0}))
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        launch.check(unknown, world_size=1)


def ranks_that(run_dir: Path, body: str, processes: int = 2) -> subprocess.Popen[str]:
    """A program that starts `processes` ranks, each of which runs `body` in place of the trainer."""
    worker = run_dir / "worker.py"
    worker.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom rcpo import launch\n"
        "from rcpo.config import ConfigError, load_run_config\n"
        "def task(config, run_dir):\n    rank = int(os.environ['RANK'])\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + f"\nfolder = Path({str(run_dir)!r})\n"
        "own = folder if os.environ['RANK'] == '0' else None\n"
        "sys.exit(launch.run_here(task, load_run_config(folder), own))\n"
    )
    command = [sys.executable, str(worker)]
    program = f"import sys; from rcpo.launch import *; sys.exit(launch_workers({processes}, {command!r}))"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    save_run_config(RunConfig(), run_dir / "config.yaml")
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.serial
def test_ranks_share_rank_0_s_folder_and_the_machine_s_cores(tmp_path: Path) -> None:
    body = """
        (run_dir / f"rank{rank}").write_text(os.environ["OMP_NUM_THREADS"] + os.environ["MASTER_ADDR"])
        return 0
    """
    program = ranks_that(tmp_path, body)
    out, err = program.communicate()
    assert program.returncode == 0, err
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == share + "127.0.0.1"
    assert out == f"task: {tmp_path}\n"


@pytest.mark.serial
@pytest.mark.parametrize(
    ("body", "code", "parts"),
    [
        ("raise ConfigError('data.path=x is wrong')", 2, ["rcpo: data.path=x is wrong\n"]),
        ("time.sleep(60 * (1 - rank))\nraise ConfigError('only here')", 2, ["rcpo: only here\n"]),
        ("return 75", 75, []),
        (
            "time.sleep(60 * (1 - rank))\nraise RuntimeError('boom')",
            1,
            ["rcpo: rank 1 failed", "boom", "Traceback"],
        ),
        ("time.sleep(60 * (1 - rank))\nos.kill(os.getpid(), 9)", 1, ["rank 1", "SIGKILL", "memory"]),
    ],
    ids=["refused", "refused on one", "stopped", "failed", "killed"],
)
def test_ranks_exit_codes_become_one(body: str, code: int, parts: list[str], tmp_path: Path) -> None:
    program = ranks_that(tmp_path, body)
    _, err = program.communicate()
    assert program.returncode == code, err
    for part in parts:
        assert part in err
    if code == 2:
        assert err.count("rcpo: ") == 1
        assert "Traceback" not in err


@pytest.mark.serial
def test_a_stop_signal_reaches_the_ranks_and_comes_back_as_75(tmp_path: Path) -> None:
    body = """
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        (run_dir / f"ready{rank}").touch()
        while not stopped:
            time.sleep(0.05)
        time.sleep(0.5)  # a checkpoint being written
        (run_dir / f"saved{rank}").touch()
        return 75
    """
    program = ranks_that(tmp_path, body)
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate()
    assert program.returncode == 75, err
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))


def test_a_signal_is_handed_to_a_run_s_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal, sys; signal.signal(15, lambda *_: sys.exit(75)); "
        "os.kill(os.getppid(), 15); signal.pause()"
    )
    monkeypatch.setattr(launch, "_command", lambda _: [sys.executable, "-c", code])
    before = signal.getsignal(signal.SIGTERM)
    assert launch.run_process(tmp_path) == (75, True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unheard_of_exit_code_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_command", lambda _: [sys.executable, "-c", "import sys; sys.exit(9)"])
    assert launch.run_process(tmp_path) == (1, False)


def test_a_folder_without_a_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main([str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert launch.main([]) == 2
