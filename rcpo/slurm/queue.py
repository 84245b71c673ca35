"""What is asked of SLURM's programs, and what is kept of a submitted job: `job-NAME.json` in its folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rcpo.errors import ConfigError, RunError
from rcpo.runs.environment import git_state
from rcpo.runs.folder import JOB_FILE, read_record
from rcpo.slurm.snapshot import PACKAGE
from rcpo.system.files import replace_text

# states of a job that has not come to its end
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM took: its id, its run folders in the order of its array, the command, the commit."""

    job: str
    runs: list[str]
    array: bool
    command: list[str]
    git: dict[str, Any] | None
    time: str

    def write(self, folder: Path, name: str) -> None:
        replace_text(folder / JOB_FILE.format(name), json.dumps(asdict(self), indent=2) + "\n")


def read_submitted(folder: Path, name: str) -> Submitted | None:
    """The job of that name (train, sweep, evaluate) that was submitted from a folder; None without one.

    Raises ConfigError for a damaged record.
    """
    path = folder / JOB_FILE.format(name)
    remedy = "remove it; squeue lists the jobs themselves"
    record = read_record(path, remedy)
    if record is None:
        return None
    try:
        submitted = Submitted(**record)
    except TypeError as error:
        raise ConfigError(f"{path} is damaged, it is not a submitted job: {remedy}") from error
    if not (isinstance(submitted.job, str) and isinstance(submitted.runs, list)):
        raise ConfigError(f"{path} is damaged, it is not a submitted job: {remedy}")
    return submitted


def job_id(after: str) -> str:
    """The job that `slurm.after` means: an id as it stands, or that of a submitted run's folder."""
    if re.fullmatch(r"[0-9]+(_[0-9]+)?", after):
        return after
    for name in ("train", "sweep"):
        submitted = read_submitted(Path(after), name)
        if submitted is not None:
            return submitted.job
    raise ConfigError(f"slurm.after={after} is neither a job id nor the folder of a run that was submitted")


def submit_job(script: Path, name: str, runs: Sequence[Path], command: list[str], *, array: bool) -> str:
    """Submit the script in a folder, record the job there, and return its id.

    Raises RunError with SLURM's own words where it refuses.
    """
    job = _ask("sbatch", ["--parsable", str(script)]).strip().partition(";")[0]
    git, time = git_state(PACKAGE / "__init__.py"), datetime.now(UTC).isoformat(timespec="seconds")
    Submitted(job, list(map(str, runs)), array, command, git, time).write(script.parent, name)
    return job


def refuse_queued(folder: Path, name: str) -> None:
    """Raise ConfigError where such a job of the folder has not ended: two would only find it locked."""
    before = read_submitted(folder, name)
    if before is None:
        return
    mine = [queued for job, queued in queue().items() if job.partition("_")[0] == before.job]
    if any(queued.state in ACTIVE for queued in mine):
        raise ConfigError(f"{folder} is job {before.job} already; wait for it, or scancel {before.job}")


@dataclass(frozen=True)
class Queued:
    """A line of the queue."""

    state: str
    elapsed: str
    where: str


def queue() -> dict[str, Queued]:
    """The user's jobs that SLURM still knows, by id; an array's tasks are `ID_INDEX`."""
    answer = _ask("squeue", ["--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%M|%R"])
    lines = [line.split("|", 3) for line in answer.split("\n") if line.count("|") >= 3]
    return {job: Queued(state, elapsed, where) for job, state, elapsed, where in lines}


def _ask(program: str, arguments: Sequence[str]) -> str:
    if shutil.which(program) is None:
        raise ConfigError(f"{program} is not on this machine: submit from a login node of the cluster")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"{program}: {result.stderr.strip() or f'exit code {result.returncode}'}")
    return result.stdout
