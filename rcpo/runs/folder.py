"""A run's folder: who trains in it, its checkpoints, what it wrote down. Nothing here imports torch.

The lock is the kernel's: it goes when its holder dies, however it dies. NFS makes an exclusive lock of a file
that is open for writing, and a shared one of a file that is open for reading.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rcpo.config.changes import flatten
from rcpo.errors import ConfigError
from rcpo.system.files import replace_text
from rcpo.system.text import text_lines

LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"  # resolved
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"  # what became of the data
LOG_FILE = "rcpo.log"
CONSOLE_FILE = "console.log"  # the output of a run that shares its machine with others
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE, MLFLOW_ID_FILE, TRACKIO_ID_FILE = "wandb_id.txt", "mlflow_id.txt", "trackio_id.txt"
WANDB_STEP_FILE = "wandb_step.txt"  # the last step that wandb had when the run ended in order
TENSORBOARD = "tensorboard"  # the folder of its event files
PROBES_FILE, SAMPLES_FILE = "probes.parquet", "samples.jsonl"
FINISHED_FILE = "finished.json"  # the state of a run that came to its end
OUTCOME_FILE = "outcome.json"  # exit code and reason of a run that another process waited for
CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"  # in a checkpoint: the run's own state
START = "start"  # the model that adapter.merge makes
FINAL, BEST = "final", "best"
MERGED = "merged"  # in final/: the whole model
NONFINITE = "nonfinite"  # the batches whose loss or gradient was not finite
EVALUATION_FILE = "evaluation.json"
EVALUATION = "evaluation"  # single examples, checkpoints, and tasks
EVALUATED_CONFIG = "evaluation/config.yaml"
EXAMPLES_FILE = "examples.jsonl"
CHECKPOINT_RECORDS = "evaluation/checkpoints.jsonl"
HARNESS_FILE, HARNESS_FOLDER = (
    "harness.json",
    "harness",
)  # in evaluation/; the folder has a file for each task
JUDGE_FILE, VERDICTS_FILE = "evaluation/judge.json", "judge.jsonl"
ANNOTATIONS_FILE = "judge_annotations.json"  # in AlpacaEval's format: prompts for a second judge
JOB_FILE = "job-{}.json"  # of `rcpo submit` train, sweep, or evaluate
CODE = "code"  # the snapshot of `rcpo submit`
SWEEP_LOCK = ".sweep"  # in a sweep's folder, while its runs are started
EVALUATED = "evaluated"  # in it: whether the evaluation at the end succeeded
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster, where it was built
DAMAGED = ".damaged"  # ends the name of a checkpoint that was set aside
_NAME = re.compile(r"step-(\d+)(\.damaged)?")
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what a lock that another process has raises

log = logging.getLogger(__name__)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; raise ConfigError, naming the holder, where another process has it.

    A file system without locks (some network ones) gives none, and two runs are then not kept apart, which a
    warning reports.
    """
    path = run_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{run_dir} is in use: {holder} trains in it; wait for it, or choose another "
                    "hydra.run.dir"
                ) from error
            log.warning(
                "%s cannot be locked (%s), so nothing keeps a second run out: start one at a time there",
                run_dir,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def sweeping(sweep_dir: Path) -> Iterator[None]:
    """Mark a folder, while entered, as one whose runs this process starts one after another."""
    with (sweep_dir / SWEEP_LOCK).open("a+", encoding="utf-8") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_sweeping(sweep_dir: Path) -> bool:
    """Whether a process is starting the runs in a folder at this moment."""
    path = sweep_dir / SWEEP_LOCK
    try:  # for reading, the lock can be tried as well, though not on NFS
        with path.open("r+" if os.access(path, os.W_OK) else "r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with this file, as far as the file system has locks."""
    with path.open("a", encoding="utf-8") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_locked(run_dir: Path) -> None:
    """Raise ConfigError where a process trains in the folder at this moment."""
    if (run_dir / LOCK_FILE).exists():
        with locked(run_dir):
            pass


def is_locked(run_dir: Path) -> bool:
    """Whether a process trains in the folder at this moment; leaves the lock as it is."""
    try:
        with (run_dir / LOCK_FILE).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without any
        return False
    return False


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_dir / CHECKPOINTS / f"step-{step}"


def checkpoint_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint there, newest first, unverified."""
    return _steps(run_dir, damaged=False)


def damaged_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint that was found damaged and set aside, newest first."""
    return _steps(run_dir, damaged=True)


def _steps(run_dir: Path, *, damaged: bool) -> list[tuple[int, Path]]:
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    entries = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    found = ((int(match[1]), entry) for match, entry in entries if match and bool(match[2]) == damaged)
    return sorted(found, reverse=True)


def stored_state(run_dir: Path) -> dict[str, Any] | None:
    """The run's state in the newest readable checkpoint, unverified, or at its end; None without either."""
    for _, folder in checkpoint_folders(run_dir):
        try:
            state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged: the trainer will say so
            continue
        return state
    return finished_state(run_dir)


def finished_state(run_dir: Path) -> dict[str, Any] | None:
    """The state in which a run came to its end; None where it has not.

    Raises ConfigError where the file is damaged.
    """
    return read_record(run_dir / FINISHED_FILE, "remove it, and the run continues from its last checkpoint")


def read_record(path: Path, remedy: str) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no file. Raises ConfigError where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged, it holds no JSON: {remedy}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path} is damaged, it holds no JSON object: {remedy}")
    return record


def read_settings(path: Path) -> dict[str, Any]:
    """A run's config.yaml by dotted key; raises ConfigError where there is none that can be read."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a run's configuration: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a run's configuration")
    return flatten(tree)


def stored_id(path: Path) -> str:
    """The id of a run that a file keeps, made at the first call and read back at every later one."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(4)
    replace_text(path, f"{identity}\n")
    return identity


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_evaluation(path: Path) -> dict[str, float]:
    """The finite numbers of an evaluation.json; empty where there is none that can be read."""
    record = read_object(path)
    numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none of a missing one, none of a torn line."""
    try:
        lines = text_lines(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each with its step."""
    return [row for row in read_lines(path) if isinstance(row.get("step"), int)]
