"""Fault campaign: real runs under real faults; every bit of what they end with is compared.

    scripts/soak --kills 50 --processes 2 --stage 2     kill -9 of the whole run at random moments
    scripts/soak --faults                               each other fault once
    scripts/soak --memory 2000                          memory over so many steps
    scripts/soak --costs                                of a checkpoint and of launch.deterministic, if alone

Runs fork their ranks from a process that has everything imported, so that most of a run is training. Killed
ones save a checkpoint every step, so that many kills hit one being written, and follow each other until the
number of kills is reached. Exit code 1 where a bit differs, a step is missing or a row is twice, or a fault
ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import faults
import numpy as np
import runs

from rcpo.config.schema import RunConfig


@dataclass
class Campaign:
    """What happened so far."""

    seconds: float = 0.0  # a run that nothing happens to
    kills: int = 0
    writing: int = 0
    lost: int = 0
    runs: int = 0
    resumed_from: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def killed_run(config: RunConfig, run_dir: Path, ranks: int, kills: int, seen: Campaign) -> None:
    """One run, killed at random moments until it ends or `kills` are reached, then let go to its end."""
    while True:
        last = seen.kills >= kills
        before, left = runs.newest(run_dir), unfinished(run_dir)
        seen.resumed_from.append(before)
        attempt = runs.start(config, run_dir, ranks)
        if last:
            attempt.wait()
        else:
            wait_for_a_moment(attempt, before, left, seen)
        codes = set(attempt.codes.values())
        if not attempt.alive and codes == {0}:
            return
        if last or codes - {0}:
            seen.problems.append(f"{run_dir.name}: exit codes {attempt.codes}\n{attempt.text[-2000:]}")
            attempt.kill()
            return
        attempt.kill()
        seen.kills += 1
        seen.writing += bool(unfinished(run_dir) - left)
        seen.lost += runs.newest(run_dir) < before


def wait_for_a_moment(attempt: runs.Attempt, before: int, left: set[str], seen: Campaign) -> None:
    """Until somewhere in the set-up, or in a later step; each third time a checkpoint is being written."""
    steps = random.randrange(6)
    while attempt.alive and runs.newest(attempt.run_dir) < before + steps:
        attempt.wait(0.002)
    attempt.wait(random.uniform(0.0, 0.1 if steps else seen.seconds))
    while seen.kills % 3 == 2 and attempt.alive and not unfinished(attempt.run_dir) - left:
        attempt.wait(0.0005)


def unfinished(run_dir: Path) -> set[str]:
    """Checkpoints that are, or were at the end, being written, each time anew."""
    found = set()
    for folder in (run_dir / "checkpoints").glob(".step-*.new"):
        with suppress(FileNotFoundError):  # it got its name
            found.add(f"{folder.name} {folder.stat().st_ino} {(folder / 'tensors').stat().st_ctime_ns}")
    return found


def kill_campaign(lab: faults.Lab, arguments: argparse.Namespace) -> Campaign:
    """Runs killed until enough is killed; each is compared with the one that nothing happened to."""
    seen, ranks = Campaign(), arguments.processes
    began = time.monotonic()
    whole = lab.whole(ranks)
    seen.seconds = time.monotonic() - began
    while seen.kills < arguments.kills and not seen.problems:
        seen.runs += 1
        run_dir = lab.folder / f"run{seen.runs}"
        killed_run(lab.config, run_dir, ranks, arguments.kills, seen)
        seen.problems += runs.differences(run_dir, whole)
    show(
        ("processes, ZeRO stage, rc", f"{ranks}, {arguments.stage}, {arguments.rc}"),
        ("steps a run, a checkpoint each", arguments.steps),
        ("moments killed", seen.kills),
        ("  while a checkpoint was written", seen.writing),
        ("runs, attempts", f"{seen.runs}, {len(seen.resumed_from)}"),
        ("attempts that continued a checkpoint", sum(step > 0 for step in seen.resumed_from)),
        ("runs with all bits equal", seen.runs if not seen.problems else f"{len(seen.problems)} problems"),
        ("checkpoints lost", seen.lost),
        ("seconds", round(time.monotonic() - began)),
    )
    if seen.lost:
        seen.problems.append(f"{seen.lost} checkpoints are gone")
    return seen


def fault_campaign(lab: faults.Lab) -> list[str]:
    """Each fault once; the problems."""
    problems = []
    for name, fault in faults.FAULTS.items():
        began = time.monotonic()
        try:
            seen = fault(lab)
        except faults.Skipped as reason:
            seen = f"skipped: {reason}"
        except (AssertionError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
            seen = "PROBLEM"
        show((f"{name} ({time.monotonic() - began:.0f} s)", seen))
    return problems


def memory(lab: faults.Lab, steps: int) -> list[str]:
    """The growth of a run's memory over its later three quarters, by least squares; the problems."""
    config = lab.settings()
    config.train.max_steps, config.checkpoint.every, config.log.every = steps, 50, 10
    run_dir = lab.place()
    attempt = runs.start(config, run_dir)
    status, samples = Path(f"/proc/{attempt.pids[0]}/statm"), []
    for row in range(1, steps // 10):
        attempt.wait_for_rows(row)
        samples.append((10 * row, int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024))
    if attempt.wait() != {0}:
        return [f"memory: {attempt.text[-2000:]}"]
    x, y = np.array(samples[len(samples) // 4 :], dtype=float).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    noise = float(np.sqrt(covariance[0, 0]))
    show(
        ("steps, checkpoint every", f"{steps}, {config.checkpoint.every}"),
        ("resident memory at first and last", f"{y[0] / 1024:.1f} and {y[-1] / 1024:.1f} MiB"),
        ("growth a step", f"{1024 * slope:+.0f} ± {1024 * noise:.0f} bytes"),
    )
    # a float that is kept a step is 24 bytes, a row of metrics more than a thousand
    return [f"memory grows by {1024 * slope:.0f} bytes a step"] if slope > max(0.5, 3 * noise) else []


def costs(lab: faults.Lab) -> None:
    """Of a model with 70M weights, and of the packaged one in the default run."""
    import costs

    costs.model_of_70m(lab.folder / "70m", lab.folder / "model")
    config = lab.settings()
    config.model.path, config.train.max_steps, config.rc.sketch = str(lab.folder / "70m"), 10_000, 2048
    config.train.micro_batch_size = 8
    show(*costs.checkpoint_cost(config, lab.place()))
    show(*costs.deterministic_cost(config, lab.place(), 20))
    default = RunConfig()
    default.wandb.mode, default.rc.enabled = "disabled", True
    show(*costs.deterministic_cost(default, lab.place(), 60))


def show(*table: tuple[str, object]) -> None:
    for name, value in table:
        print(f"{name:<48}{value}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--memory", type=int, default=0, metavar="STEPS")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="of the killed runs")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rc", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if not (arguments.kills or arguments.faults or arguments.memory or arguments.costs):
        parser.error("give --kills, --faults, --memory or --costs")
    random.seed(arguments.seed)
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from tiny import sums_file, tiny_llama

    import rcpo.launch.run
    import rcpo.training.trainer  # noqa: F401 - before the forks

    folder = Path(tempfile.mkdtemp(prefix="rcpo-soak-"))
    tiny_llama(folder / "model")
    sums_file(folder / "pairs.jsonl", 36)  # five steps an epoch, the last one short
    lab = faults.Lab(
        folder, runs.configuration(folder, arguments.steps, arguments.stage, arguments.rc == "on")
    )
    problems: list[str] = []
    if arguments.kills:
        problems += kill_campaign(lab, arguments).problems
    if arguments.faults:
        problems += fault_campaign(lab)
    if arguments.memory:
        problems += memory(lab, arguments.memory)
    if arguments.costs:
        costs(lab)
    for problem in problems:
        print(f"PROBLEM {problem}")
    if problems:
        print(f"everything is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
