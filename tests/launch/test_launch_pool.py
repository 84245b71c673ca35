"""Runs as processes: how many at a time, what ends them, what is kept of their ends. Real processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rcpo.launch import pool
from rcpo.launch.outcomes import Outcome, last_message, read_outcome
from rcpo.launch.pool import NEVER, Pool, run_process, slots
from rcpo.runs.folder import LOG_FILE

RECORD = "[2026-01-01 00:00:00,000][rcpo.launch.run][{}] - {}\n"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is the Python program in its folder's `run.py`, which knows its folder by `here`."""

    def command(run_dir: Path) -> list[str]:
        start = "import os, signal, sys, time; from pathlib import Path; here = Path(sys.argv[1])\n"
        return [sys.executable, "-c", start + (run_dir / "run.py").read_text(), str(run_dir)]

    monkeypatch.setattr(pool, "run_command", command)


def run(folder: Path, body: str) -> Path:
    folder.mkdir()
    (folder / "run.py").write_text(body)
    return folder


@pytest.mark.usefixtures("program")
def test_as_many_runs_at_a_time_as_there_are_slots(tmp_path: Path) -> None:
    # a run ends when it has seen another one begin: they wait for each other, two by two
    body = "(here / 'on').touch()\nwhile len(list(here.parent.glob('*/on'))) < {}: time.sleep(0.01)\n"
    folders = [run(tmp_path / str(n), body.format(2 * (n // 2 + 1))) for n in range(4)]
    with Pool([{"SLOT": "a"}, {"SLOT": "b"}]) as runs:
        outcomes = [runs.start(folder) for folder in folders]
        assert [future.result() for future in outcomes] == [Outcome(0)] * 4


@pytest.mark.usefixtures("program")
def test_one_slot_is_one_after_another_and_more_write_to_files(tmp_path: Path) -> None:
    body = "begun = time.monotonic(); time.sleep(0.2); print(os.environ['SLOT'], begun, time.monotonic())"
    folders = [run(tmp_path / str(n), body) for n in range(2)]
    with Pool([{"SLOT": "a"}, {"SLOT": "b"}]) as runs:
        for future in [runs.start(folder) for folder in folders]:
            future.result()
    said = [(folder / "console.log").read_text().split() for folder in folders]
    assert {slot for slot, _, _ in said} == {"a", "b"}
    with Pool([{"SLOT": "a"}]) as runs:
        assert all(future.result() == Outcome(0) for future in [runs.start(folder) for folder in folders])
    assert (folders[0] / "console.log").read_text().split() == said[0]


@pytest.mark.usefixtures("program")
def test_a_signal_reaches_the_run_under_way_and_no_other_starts(tmp_path: Path) -> None:
    stops = "signal.signal(15, lambda *_: sys.exit(75)); os.kill(os.getppid(), 15); time.sleep(60)"
    folders = [run(tmp_path / "first", stops), run(tmp_path / "second", "(here / 'on').touch()")]
    before = signal.getsignal(signal.SIGTERM)
    with Pool([{}]) as runs:
        futures = [runs.start(folder) for folder in folders]
        assert futures[0].result() == Outcome(75, "stopped by a signal")
        assert futures[1].result() == NEVER
    assert not (folders[1] / "on").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("program")
def test_a_run_that_is_given_up_takes_no_other_along(tmp_path: Path) -> None:
    stops = "signal.signal(15, lambda *_: sys.exit(75)); (here / 'ready').touch(); time.sleep(60)"
    first, second = run(tmp_path / "first", stops), run(tmp_path / "second", "")
    with Pool([{}]) as runs:
        futures = runs.start(first, lambda: (first / "ready").exists()), runs.start(second)
        assert [future.result().code for future in futures] == [75, 0]
        assert not runs.stopped


@pytest.mark.usefixtures("program")
def test_an_error_ends_what_is_under_way(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "(here / 'ready').touch(); time.sleep(3600)")
    began = time.monotonic()
    with pytest.raises(SystemExit), Pool([{}]) as runs:
        future = runs.start(folder)
        while not (folder / "ready").exists():
            time.sleep(0.01)
        raise SystemExit
    # on a loaded machine too it takes far less than the run would
    assert future.result().code == 1 and time.monotonic() - began < 240


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("", Outcome(0)),
        ("sys.exit(9)", Outcome(1, "ended with exit code 9")),
        ("os.kill(os.getpid(), 9)", Outcome(1, "ended by SIGKILL; the machine may have run out of memory")),
        ("os.kill(os.getpid(), 40)", Outcome(1, "ended by signal 40")),  # a real-time one has no name
        (
            f"(here / {LOG_FILE!r}).write_text({RECORD.format('INFO', 'refused: objective=x is unknown')!r})"
            "\nsys.exit(2)",
            Outcome(2, "objective=x is unknown"),
        ),
    ],
)
def test_an_outcome_is_kept_in_the_run_s_folder(body: str, outcome: Outcome, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", body)
    assert read_outcome(folder) is None
    assert run_process(folder) == outcome
    assert read_outcome(folder) == outcome


@pytest.mark.usefixtures("program")
def test_an_outcome_that_cannot_be_written_ends_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(outcome: Outcome, run_dir: Path) -> None:
        if run_dir.name == "full":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outcome, "write", full)
    with Pool([{}]) as pool:
        jobs = [
            pool.start(run(tmp_path / name, f"sys.exit({code})")) for name, code in (("full", 9), ("b", 0))
        ]
        assert [job.result().code for job in jobs] == [1, 0]


def test_the_last_message_is_a_record_s_or_a_traceback_s_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_message(log) == "no x.log"
    log.write_text(RECORD.format("INFO", "first") + RECORD.format("INFO", "not this\nrun: a: 1 -> 2"))
    assert last_message(log) == "not this run: a: 1 -> 2"
    with log.open("a") as file:
        trace = 'train failed\nTraceback (most recent call last):\n  File "x"\nRunError: the disk is full'
        file.write(RECORD.format("ERROR", trace))
    assert last_message(log) == "RunError: the disk is full"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (
            "ValueError: no viable alternative at 'x'\n    {x\n     ^",
            "ValueError: no viable alternative at 'x'",
        ),
        (
            '  File "y.py", line 1\n    a b\n    ^^^\nSyntaxError: invalid syntax',
            "SyntaxError: invalid syntax",
        ),
        (
            "yaml.scanner.ScannerError:\n  in a.yaml, line 3\n    ^",
            "yaml.scanner.ScannerError: in a.yaml, line 3",
        ),
        ("KeyError: 'a'\nand a second line\n^", "KeyError: 'a'"),
    ],
)
def test_a_reason_is_the_exception_and_not_the_caret_below_it(end: str, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    trace = f'train failed\nTraceback (most recent call last):\n  File "x.py", line 2, in f\n    g()\n{end}\n'
    log.write_text(RECORD.format("ERROR", trace))
    assert last_message(log) == reason


@pytest.mark.usefixtures("program")
def test_a_reason_is_no_line_of_another_process(tmp_path: Path) -> None:
    folder = run(tmp_path / "silent", "sys.exit(1)")
    (folder / LOG_FILE).write_text(RECORD.format("INFO", "another run's line"))
    outcome = run_process(folder)
    assert outcome.code == 1 and "another" not in str(outcome.reason)
    assert "before it said anything in its log" in str(outcome.reason)
    body = f"(here / {LOG_FILE!r}).open('a').write({RECORD.format('ERROR', 'its own')!r})\nsys.exit(1)"
    (folder / "run.py").write_text(body)
    assert run_process(folder) == Outcome(1, "its own")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"code": "x"}'])
def test_a_damaged_outcome_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(content)
    outcome = read_outcome(tmp_path)
    assert outcome is not None and outcome.code == 1
    assert f"{tmp_path / 'outcome.json'} is damaged" in str(outcome.reason)


def test_slots_share_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots(1, 2) == [{}]
    # pairs of GPUs for runs of two processes; the odd one stays idle, a third run shares the first pair
    pairs = [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert slots(None, 2) == pairs
    assert slots(3, 2) == [*pairs, pairs[0]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots(None, 1) == [{}]
    assert slots(2, 1) == [{}, {}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    # of a node of 64 cores a job has 8
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert slots(2, 2) == [{"OMP_NUM_THREADS": "2"}] * 2


def test_a_pool_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    with Pool([{}] * 3):
        pass
    assert threading.active_count() == before
