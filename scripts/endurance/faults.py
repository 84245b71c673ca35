"""Each fault once, for real: real processes, signals and small file systems. A fault raises AssertionError
where the run does anything else than it should, and returns what was seen.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import runs

from rcpo.config.schema import RunConfig

WITHIN = 60.0  # seconds from a signal, or a rank's death, to the end: a second, and the machine may be busy


class Skipped(Exception):
    """The machine does not allow the fault."""


@dataclass
class Lab:
    """A folder with inputs and the runs that nothing happened to, by number of ranks."""

    folder: Path
    config: RunConfig
    _whole: dict[int, Path] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def whole(self, ranks: int) -> Path:
        if ranks not in self._whole:
            self._whole[ranks] = self.folder / f"whole{ranks}"
            attempt = runs.finish(self.config, self._whole[ranks], ranks)
            assert set(attempt.codes.values()) == {0}, attempt.text
        return self._whole[ranks]

    def place(self) -> Path:
        """A new run's folder."""
        return self.folder / f"fault{next(self._numbers)}"

    def settings(self) -> RunConfig:
        return copy.deepcopy(self.config)

    def ends_well(self, run_dir: Path, config: RunConfig | None = None, ranks: int = 1) -> runs.Attempt:
        """Continues a run to its end and compares every bit."""
        attempt = runs.finish(config or self.config, run_dir, ranks)
        assert set(attempt.codes.values()) == {0}, attempt.text
        found = runs.differences(run_dir, self.whole(ranks))
        assert not found, found
        return attempt

    def stopped(self, row: int = 5) -> Path:
        """The folder of a run that a signal stopped after some steps."""
        run_dir = self.place()
        attempt = runs.start(self.config, run_dir)
        attempt.wait_for_rows(row)
        os.kill(attempt.pids[0], signal.SIGTERM)
        assert attempt.wait() == {75}, attempt.text
        return run_dir


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        raise Skipped("mounting needs to be root, with the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Takes what is free on a file system, but for `leave` bytes; the file that took it."""
    ballast = disk / "ballast"
    status = os.statvfs(disk)
    with ballast.open("wb", buffering=0) as file:
        try:
            left = status.f_bavail * status.f_frsize - leave
            while left > 0:
                left -= file.write(b"\0" * min(left, 1 << 16))
        except OSError:
            pass  # it is full: that was wanted
    return ballast


def signals(lab: Lab) -> str:
    """One rank, all of two, or one of two gets a signal: a checkpoint, exit code 75, the same bits after."""
    seconds = []
    cases = [(1, (0,), "SIGINT"), (2, (0, 1), "SIGUSR1"), (2, (1,), "SIGTERM")]
    for ranks, victims, name in cases:
        codes = {0}
        for _ in range(30):  # a dozen steps of some milliseconds are often over before the signal comes
            run_dir = lab.place()
            attempt = runs.start(lab.config, run_dir, ranks)
            attempt.wait_for_rows(1)
            began = time.monotonic()
            for victim in victims:
                os.kill(attempt.pids[victim], signal.Signals[name])
            codes = attempt.wait(WITHIN)
            if codes != {0}:
                break
        seconds.append(time.monotonic() - began)
        assert codes == {75} and not attempt.alive, (name, ranks, attempt.codes, attempt.text)
        assert "stopped after step" in attempt.text
        lab.ends_well(run_dir, ranks=ranks)
    return f"{len(cases)} saved and left with 75 within {max(seconds):.2f} s"


def signal_in_set_up(lab: Lab) -> str:
    """A signal while models are loaded: exit code 75 at once, and a fresh start after."""
    run_dir = lab.place()
    attempt = runs.start(lab.config, run_dir)
    lock = run_dir / ".lock"
    while not (lock.exists() and lock.stat().st_size):
        time.sleep(0.0005)
    began = time.monotonic()
    os.kill(attempt.pids[0], signal.SIGTERM)
    assert attempt.wait() == {75} and "stopped before the first step" in attempt.text, attempt.text
    seconds = time.monotonic() - began
    lab.ends_well(run_dir)
    return f"left with 75 after {seconds:.2f} s, started again"


def lost_rank(lab: Lab) -> str:
    """One of two ranks is killed, nobody watches: the other ends by itself, and both continue."""
    run_dir = lab.place()
    attempt = runs.start(lab.config, run_dir, 2)
    attempt.wait_for_rows(5)
    began = time.monotonic()
    os.kill(attempt.pids[1], signal.SIGKILL)
    attempt.wait(WITHIN)
    seconds = time.monotonic() - began
    assert attempt.codes == {attempt.pids[0]: 1, attempt.pids[1]: -signal.SIGKILL}, attempt.text
    lab.ends_well(run_dir, ranks=2)
    return f"the other left after {seconds:.2f} s"


def hung_rank(lab: Lab) -> str:
    """One of two ranks stands still: the other ends in the stated time and names it, and both continue."""
    config = lab.settings()
    config.launch.lost_after = 15.0
    run_dir = lab.place()
    attempt = runs.start(config, run_dir, 2)
    attempt.wait_for_rows(4)
    began = time.monotonic()
    os.kill(attempt.pids[1], signal.SIGSTOP)
    while attempt.pids[0] in attempt.alive and time.monotonic() - began < 10 * WITHIN:
        attempt.poll()
        time.sleep(0.01)
    seconds = time.monotonic() - began
    attempt.kill()
    assert attempt.codes[attempt.pids[0]] == 1 and "rank 1 on" in attempt.text, attempt.text
    lab.ends_well(run_dir, ranks=2)
    return f"the other named it and left after {seconds:.1f} s, allowed {config.launch.lost_after:g}"


def full_disk(lab: Lab) -> str:
    """No space for a checkpoint: exit code 1, said; with space again the run continues."""
    with small_disk(lab.folder / "disk", "40m") as disk:
        run_dir = disk / "run"
        attempt = runs.start(lab.config, run_dir)
        attempt.wait_for_rows(5)
        with attempt.paused():
            ballast = fill(disk, leave=8192)  # the metrics go on for a while
        assert attempt.wait() == {1}, attempt.text
        assert "No space left on device" in attempt.text and "Traceback" not in attempt.text, attempt.text
        kept, said = runs.newest(run_dir), "could not be written" in attempt.text
        ballast.unlink()
        again = lab.ends_well(run_dir)
        assert kept >= 3 and f"continues after step {kept}" in again.text, (kept, again.text)
    return f"{'checkpoint' if said else 'metrics'} refused, continued from step {kept}"


def full_disk_metrics(lab: Lab) -> str:
    """No space for a row of metrics.jsonl: exit code 1, the file is named."""
    config = lab.settings()
    config.checkpoint.every = 0
    with small_disk(lab.folder / "disk2", "40m") as disk:
        run_dir = disk / "run"
        attempt = runs.start(config, run_dir)
        attempt.wait_for_rows(5)
        with attempt.paused():
            ballast = fill(disk)
        assert attempt.wait() == {1}, attempt.text
        assert "No space left on device" in attempt.text and "metrics.jsonl" in attempt.text, attempt.text
        assert "Traceback" not in attempt.text, attempt.text
        ballast.unlink()
        lab.ends_well(run_dir, config)
    return "named, started again"


def full_disk_cache(lab: Lab) -> str:
    """No space for the reference's log-probs: they stay in memory, said."""
    config = lab.settings()
    with small_disk(lab.folder / "disk3", "1m") as disk:
        fill(disk)
        config.reference.cache = str(disk / "cache")
        attempt = lab.ends_well(lab.place(), config)
    assert "stay in memory" in attempt.text, attempt.text
    return "kept in memory, run to its end"


def read_only(lab: Lab) -> str:
    """A folder that cannot be written to: exit code 1 or 2, no traceback."""
    with small_disk(lab.folder / "disk4", "1m") as disk:
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        attempt = runs.start(lab.config, disk / "run")
        codes = attempt.wait()
    log = attempt.text
    assert codes <= {1, 2} and "Read-only file system" in log and "Traceback" not in log, (codes, log)
    return f"exit code {codes.pop()}"


def second_run(lab: Lab) -> str:
    """A second run in a folder where one is training: exit code 2, the first goes on."""
    run_dir = lab.place()
    first = runs.start(lab.config, run_dir)
    first.wait_for_rows(3)
    with first.paused():  # it cannot end before
        second = runs.start(lab.config, run_dir)
        second.wait()
    assert set(second.codes.values()) == {2}, second.text
    assert f"is in use: process {first.pids[0]}" in second.text, second.text
    assert first.wait() == {0}, first.text
    found = runs.differences(run_dir, lab.whole(1))
    assert not found, found
    return "refused"


def damaged(lab: Lab) -> str:
    """The newest checkpoint truncated, the one before with a flipped bit: the third is used, said."""
    config = lab.settings()
    config.checkpoint.keep = 3
    run_dir = lab.place()
    attempt = runs.start(config, run_dir)
    attempt.wait_for_rows(6)
    attempt.kill()
    from rcpo.runs.folder import checkpoint_folders

    # killed after a new one got its name and before the oldest went, there are four
    (_, newest), (_, second), (third, _), *_ = checkpoint_folders(run_dir)
    (part,) = (newest / "tensors").iterdir()
    os.truncate(part, part.stat().st_size // 2)
    (part,) = (second / "tensors").iterdir()
    content = bytearray(part.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    part.write_bytes(content)
    again = lab.ends_well(run_dir, config)
    assert again.text.count("is damaged and left out") == 2, again.text
    assert f"continues after step {third}" in again.text, again.text
    return "both left out, the one before used"


def clock(lab: Lab) -> str:
    """The machine's clock jumps by days at each look, checkpoints go by time: nothing changes."""
    real = time.time

    def jumping() -> None:
        time.time = lambda: real() + random.uniform(-1e6, 1e6)

    config = lab.settings()
    config.checkpoint.every, config.checkpoint.minutes = 0, 0.001
    run_dir = lab.place()
    attempt = runs.start(config, run_dir, before=jumping)
    assert attempt.wait() == {0}, attempt.text
    found = runs.differences(run_dir, lab.whole(1))
    assert not found and runs.newest(run_dir) > 0, (found, runs.newest(run_dir))
    return f"same bits, last checkpoint at step {runs.newest(run_dir)}"


def data_gone(lab: Lab) -> str:
    """The data file and the cache are deleted under a run: it goes on; changed before a resume: refused."""
    config = lab.settings()
    for key in ("path", "eval_path"):
        setattr(config.data, key, str(shutil.copy(lab.config.data.path or "", lab.folder / "copy.jsonl")))
    config.reference.cache = str(shutil.copytree(lab.folder / "cache", lab.folder / "cache2"))
    run_dir = lab.place()
    attempt = runs.start(config, run_dir)
    attempt.wait_for_rows(3)
    content = Path(config.data.path or "").read_text()
    with attempt.paused():
        Path(config.data.path or "").unlink()
        shutil.rmtree(config.reference.cache)
    attempt.wait_for_rows(6)
    os.kill(attempt.pids[0], signal.SIGTERM)
    assert attempt.wait() == {75}, attempt.text
    Path(config.data.path or "").write_text(content.replace("109", "108", 1))
    other = runs.finish(config, run_dir)
    assert set(other.codes.values()) == {2} and "the training examples" in other.text, other.text
    Path(config.data.path or "").write_text(content)
    lab.ends_well(run_dir, config)
    return "went on; changed: exit code 2; back: continued"


def cache_changed(lab: Lab) -> str:
    """The cache is written to under a run: exit code 1, said; after, it is computed again."""
    config = lab.settings()
    config.reference.cache = str(shutil.copytree(lab.folder / "cache", lab.folder / "cache3"))
    run_dir = lab.place()
    attempt = runs.start(config, run_dir)
    attempt.wait_for_rows(3)
    with attempt.paused():
        for path in Path(config.reference.cache).rglob("*.logps"):
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
    assert attempt.wait() == {1} and "was changed while this run" in attempt.text, attempt.text
    assert "Traceback" not in attempt.text, attempt.text
    again = lab.ends_well(run_dir, config)
    assert "is not used" in again.text, again.text
    return "exit code 1; computed again, continued"


def model_changed(lab: Lab) -> str:
    """The model that a run started from is another one before a resume: exit code 2."""
    run_dir = lab.stopped()
    path = lab.folder / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    other = runs.finish(lab.config, run_dir)
    path.write_bytes(content)
    assert set(other.codes.values()) == {2} and "the model it starts from" in other.text, other.text
    lab.ends_well(run_dir)
    return "exit code 2; back: continued"


FAULTS: dict[str, Callable[[Lab], str]] = {
    "SIGTERM, SIGINT, SIGUSR1; 1 and 2 ranks": signals,
    "SIGTERM before the first step": signal_in_set_up,
    "kill -9 of one rank of two": lost_rank,
    "SIGSTOP of one rank of two": hung_rank,
    "disk full while checkpoints are written": full_disk,
    "disk full while metrics are written": full_disk_metrics,
    "disk full while the cache is written": full_disk_cache,
    "read-only folder": read_only,
    "two runs in one folder": second_run,
    "truncated and bit-flipped checkpoints": damaged,
    "clock jumping by days": clock,
    "data and cache deleted, data changed": data_gone,
    "cache changed under the run": cache_changed,
    "starting model changed before a resume": model_changed,
}
