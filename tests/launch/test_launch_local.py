"""Local processes: how they end, what their exit codes and signals become."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest

from rcpo.config.parsing import save_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import RunError
from rcpo.launch import local
from rcpo.launch.__main__ import main
from rcpo.launch.outcomes import report_failure

ROOT = Path(local.__file__).parents[2]


def ranks_that(run_dir: Path, body: str, processes: int = 2, before: str = "") -> subprocess.Popen[str]:
    """A program that starts `processes` ranks, each of which runs `body` in place of the trainer.

    `before` is what each does first, with the run's `folder`.
    """
    worker = run_dir / "worker.py"
    worker.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom rcpo.launch.run import Task, launch\n"
        "from rcpo.errors import ConfigError; from rcpo.config.parsing import load_run_config\n"
        "def task(config, run_dir):\n    rank = int(os.environ['RANK'])\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + f"\nfolder = Path({str(run_dir)!r})\nconfig = load_run_config(folder)\n{before}"
        "own = folder if os.environ['RANK'] == '0' else None\n"
        "sys.exit(launch(config, own, Task(task, lambda folder: [])))\n"
    )
    command = [sys.executable, str(worker)]
    call = f"launch_workers({processes}, {command!r})"
    program = f"import sys; from rcpo.launch.local import launch_workers; sys.exit({call})"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    save_run_config(RunConfig(), run_dir / "config.yaml")
    return forked.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("codes", "seconds", "first"),
    [
        (
            (-signal.SIGTERM, -signal.SIGKILL),
            (10, 11),
            1,
        ),  # rank 0 wrote of the other's silence, was told to end
        ((1, -signal.SIGSEGV), (10, 11), 1),  # rank 0 wrote of the other's silence and ended
        ((-signal.SIGKILL, 1), (40, 10), 1),  # rank 0 was killed because it had not ended
        ((-signal.SIGTERM, 1), (12, 12), 1),
        ((1, -signal.SIGTERM), (12, 13), 0),
        ((-signal.SIGTERM, -signal.SIGTERM), (13, 12), 1),
    ],
)
def test_the_rank_that_failed_first_is_named(
    codes: tuple[int, int], seconds: tuple[int, int], first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[Any] = [
        SimpleNamespace(local_rank=rank, exitcode=code, timestamp=second, error_file_data={})
        for rank, (code, second) in enumerate(zip(codes, seconds, strict=True))
    ]
    assert local._outcome(failures, stopping=False) == 1
    assert f"rank {first} failed (exit code {codes[first]})" in capsys.readouterr().err


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
        ("os.kill(os.getppid(), signal.SIGUSR1)\ntime.sleep(60)", 75, []),
    ],
    ids=["refused", "refused on one", "stopped", "failed", "killed", "stopped before it could listen"],
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


def test_a_full_disk_of_one_rank_is_reported_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RCPO_WORKER", raising=False)
    monkeypatch.setenv("RANK", "3")  # of srun
    report_failure(RunError("the loss is not finite"))  # on all ranks, of which rank 0 reports it
    assert capsys.readouterr().err == ""
    report_failure(OSError(28, "No space left on device", "/tmp/x"))
    name = socket.gethostname()
    assert (
        capsys.readouterr().err == f"rcpo: rank 3 on {name}: [Errno 28] No space left on device: '/tmp/x'\n"
    )


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


def test_a_folder_without_a_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert main([]) == 2


def test_a_signal_that_nohup_has_ignored_stays_ignored() -> None:
    """A closed terminal does not stop `nohup rcpo sweep`, whose runs ignore the signal too."""
    sent: list[int] = []
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with local.forward_signals(lambda: sent) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
