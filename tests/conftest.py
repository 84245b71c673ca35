"""What every test runs under: one thread per process, no network, no tracking service, one profile."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import compositions
import forked
import psutil
import pytest
from environment import ENVIRONMENT
from hypothesis import HealthCheck, settings

for key, value in ENVIRONMENT.items():
    os.environ.setdefault(key, value)

# A loaded machine is not a failure, and the same commit gives the same examples: no deadline, no randomness.
_LOADED = [HealthCheck.too_slow]
settings.register_profile(
    "rcpo", deadline=None, derandomize=True, max_examples=50, suppress_health_check=_LOADED
)
# `scripts/test --thorough`: other examples each time
settings.register_profile("thorough", deadline=None, max_examples=1000, suppress_health_check=_LOADED)
settings.load_profile("thorough" if os.environ.get("RCPO_TESTS") == "thorough" else "rcpo")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[object]) -> None:
    """Forks the workers, if there are several, from a process that has imported everything."""
    if len(specs) > 1:
        forked.fork_workers()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals the files to pytest-xdist's workers, those with slow tests first: all end together.

    A test's name with an object's address would be another one in each process.
    """
    if named := next((item.nodeid for item in items if " at 0x" in item.nodeid), None):
        raise pytest.UsageError(f"{named}: give the parameters ids")
    if hasattr(config, "workerinput"):
        files: dict[Path, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        slow = [any(item.get_closest_marker("slow") for item in file) for file in files.values()]
        order = sorted(range(len(files)), key=lambda place: not slow[place])
        queue = list(files.values())
        workers = config.workerinput["workercount"]
        dealt = [place for first in range(workers) for place in order[first::workers]]
        items[:] = [item for place in dealt for item in queue[place]]


def pytest_collection_finish() -> None:
    """Takes what the tests' imports left out of garbage collections, which libraries ask for at each run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Writes a test's processor and wall seconds, its processes' among them, to the file RCPO_TIMES."""
    file = os.environ.get("RCPO_TIMES")
    if file is None:
        return (yield)
    cpu, wall = processor_seconds(), time.monotonic()
    result = yield
    with Path(file).open("a", encoding="utf-8") as lines:
        spent = processor_seconds() - cpu, time.monotonic() - wall
        lines.write(f"{spent[0]:.2f}\t{spent[1]:.2f}\t{item.nodeid}\n")
    return result


def processor_seconds() -> float:
    """Of this process and its descendants, as far as they were waited for or are still there."""
    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Writes why tests were skipped to the file that scripts/test names, a line for each test."""
    file = os.environ.get("RCPO_SKIPPED")
    if file is None or hasattr(terminalreporter.config, "workerinput"):  # pytest-xdist's workers have one too
        return
    reasons = [
        " ".join(str(report.longrepr[2]).removeprefix("Skipped: ").split())
        for report in terminalreporter.stats.get("skipped", [])
    ]
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.writelines(f"{reason}\n" for reason in reasons)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test's libraries leave in the environment, such as ranks, is not the next one's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """What a test's runs and Hydra hang on the root logger writes to streams and files of that test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference log-probs are cached here, and never in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def kept_compositions() -> Iterator[None]:
    """What Hydra makes of the shipped options is made once."""
    with pytest.MonkeyPatch.context() as patch:
        compositions.keep(patch)
        yield
