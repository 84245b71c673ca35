"""The batch script of a job, from the template beside this file. It is made of text alone: nothing is run."""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.errors import ConfigError
from rcpo.slurm.settings import SlurmConfig

TEMPLATE = Path(__file__).with_name("job.sbatch")


class _Template(string.Template):
    """`@{name}`: the script is full of dollars of its own."""

    delimiter = "@"


@dataclass(frozen=True)
class BatchJob:
    """What a script is about. `name` is train, sweep or evaluate; `folder` holds the script and its output.

    `command` is the module that the interpreter runs as each task, with its arguments, to which training adds
    the run's folder: `folder` itself, or one of an array's `runs`.
    """

    folder: Path
    name: str
    code: Path
    cwd: Path
    command: Sequence[str]
    runs: Sequence[Path] | None = None

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    @property
    def trains(self) -> bool:
        return self.name != "evaluate"

    @property
    def run_list(self) -> Path:
        """The file that holds an array's run folders, a line each."""
        return self.folder / "runs.txt"


def render(job: BatchJob, slurm: SlurmConfig, after: str | None = None) -> str:
    """The script; `after` is the id of a job that has to be done before."""
    python = slurm.python or sys.executable
    interpreter = [*slurm.wrap, python]
    command = [*interpreter, "-m", *job.command]
    quoted = {
        "directives": "\n".join(f"#SBATCH {flag}" for flag in directives(job, slurm, after)),
        "cwd": shlex.quote(str(job.cwd)),
        "setup": "\n".join(_setup(slurm)),
        "code": shlex.quote(str(job.code)),
        "threads": _threads(job, slurm),
        "run_dir": _run_dir(job),
        "srun": shlex.join(_srun(slurm)),
        "command": shlex.join(command) + (' "$run_dir"' if job.trains else ""),
        "conclusion": "\n".join(_conclusion(job, slurm, shlex.join(interpreter))),
    }
    return _Template(TEMPLATE.read_text(encoding="utf-8")).substitute(quoted)


def directives(job: BatchJob, slurm: SlurmConfig, after: str | None) -> list[str]:
    """sbatch's flags, as they stand behind #SBATCH."""
    output = "slurm-%A_%a.out" if job.runs is not None else "slurm-%j.out"
    per_node = slurm.ranks if slurm.tasks == "rank" or not job.trains else 1
    last = len(job.runs or ()) - 1
    at_a_time = f"%{slurm.array_parallel}" if slurm.array_parallel else ""
    flags: dict[str, Any] = {
        "job-name": slurm.name or f"{job.name}-{job.folder.name}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodes": slurm.nodes,
        "ntasks-per-node": per_node,
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "array": None if job.runs is None else f"0-{last}{at_a_time}",
        "output": f"{str(job.folder).replace('%', '%%')}/{output}",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "dependency": None if after is None else f"afterok:{after}",
        # a job that waits for one that failed would wait for ever
        "kill-on-invalid-dep": None if after is None else "yes",
    }
    given = [f"--{key}={shlex.quote(str(value))}" for key, value in flags.items() if value is not None]
    for flag in given:
        if not flag.isprintable():  # a line feed would end the directive, and what follows would be a command
            raise ConfigError(
                f"{flag!r} cannot be a line of a batch script: give slurm.* and folders in one line"
            )
    return [*given, "--requeue" if slurm.requeue else "--no-requeue", *slurm.sbatch]


def _setup(slurm: SlurmConfig) -> list[str]:
    modules = [f"module load {shlex.join(slurm.modules)} || exit"] if slurm.modules else []
    exports = [f"export {key}={shlex.quote(value)}" for key, value in (slurm.env or {}).items()]
    return [*modules, *slurm.setup, *exports]


def _threads(job: BatchJob, slurm: SlurmConfig) -> str:
    """A rank's share of its task's cores, as the shell counts it."""
    if not job.trains or slurm.tasks == "rank":
        return "${SLURM_CPUS_PER_TASK:-1}"
    return f"$(((${{SLURM_CPUS_PER_TASK:-1}} + {slurm.ranks - 1}) / {slurm.ranks}))"


def _run_dir(job: BatchJob) -> str:
    if job.runs is None:
        return f"run_dir={shlex.quote(str(job.folder))}"
    return f'run_dir=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(job.run_list))})'


def _srun(slurm: SlurmConfig) -> list[str]:
    """srun's own flags.

    A rank that ended takes the others with it only after they had time to save, and SLURM to find a lost node
    (SlurmdTimeout, 300 s unless set): a step that ends before has failed, and is not requeued. The ranks get
    the script's environment even where the job was submitted without one (`--export=NONE`).
    """
    return ["--wait=360", "--export=ALL", *slurm.srun]


def _conclusion(job: BatchJob, slurm: SlurmConfig, interpreter: str) -> list[str]:
    """What is left behind for `rcpo submit status`, of a sweep the table so far, and the next piece."""
    sweep = [] if job.runs is None else [shlex.quote(str(job.folder))]
    # a rank, or srun, that was warned before it could listen ends with 128 + SIGUSR1, and has nothing to save
    task = "" if job.trains else "evaluate "
    lines = ['[ "$code" -ne 138 ] || code=75']
    lines.append(" ".join([f'{interpreter} -m rcpo.slurm.conclude {task}"$run_dir" "$code"', *sweep]))
    if slurm.requeue and job.trains:
        lines.append("# 75: stopped with a checkpoint saved")
        lines.append('if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi')
    return lines
