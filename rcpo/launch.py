"""From a validated configuration to processes that train: this one, several, or an outer launcher's.

`python -m rcpo.launch RUN_DIR` trains what RUN_DIR/config.yaml says; it is what local ranks and the jobs of a
multirun are. torch is imported when a process is about to compute, not before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config import ConfigError, RunConfig, RunError, load_run_config, to_container
from rcpo.signals import STOP_SIGNALS, STOPPED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from rcpo.session import Session

DONE, FAILED, REFUSED = 0, 1, 2
LOG_FILE = "rcpo.log"
# seconds that the other local ranks have to leave by themselves once one has left: a checkpoint may be large
SHUTDOWN_SECONDS = 300

log = logging.getLogger(__name__)
Task = Callable[[RunConfig, Path], int]


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that an outer launcher started."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str


def external_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """The place an outer launcher gave this process (torchrun, deepspeed, srun with several tasks), or None.

    srun counts inside a job step only: a batch script has SLURM_PROCID too, and is a process alone.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local = int(environment.get("LOCAL_RANK", "0"))
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "an outer launcher"
        return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), local, launcher)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_PROCID" in environment:
        return Ranks(
            int(environment["SLURM_PROCID"]), tasks, int(environment.get("SLURM_LOCALID", "0")), "srun"
        )
    return None


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Writes srun's ranks and meeting point the way torch.distributed and DeepSpeed read them."""
    if ranks.launcher != "srun":
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = (int(environment.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.update(
        RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank)
    )
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = node_address(first_node(nodes))
    # all ranks compute the same port; steps of one job and neighbouring jobs get different ones
    environment.setdefault("MASTER_PORT", str(20000 + (job * 37 + step) % 20000))


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list, `gpu[007-012],cpu1` → `gpu007`; this machine for an empty one."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "127.0.0.1" if match is None else match[1] + (match[2] or "") + (match[3] or "")


def node_address(node: str) -> str:
    """A name or address of `node` that can be reached: its own name, else the one that SLURM has for it.

    Raises ConfigError where neither is known.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except socket.gaierror:
        shown = _scontrol("show", "node", node)
    address = re.search(r"\bNodeAddr=(\S+)", shown)
    if address is None:
        raise ConfigError(
            f"the job's first node {node} has no address here, by name or by SLURM; set MASTER_ADDR to one"
        )
    return address[1]


def _scontrol(*arguments: str) -> str:
    """What SLURM answers; nothing where it cannot be asked."""
    program = shutil.which("scontrol")
    if program is None:
        return ""
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout


def check(config: RunConfig, world_size: int) -> None:
    """Refuses, before a folder is made or a weight read, what needs torch and the objectives to be seen.

    Raises ConfigError for a batch that does not divide, an objective or hyper-parameter that does not exist,
    calibration without a loser, and a precision or a number of processes that the machine does not have.
    """
    config.train.accumulation(world_size)
    _check_objective(config)
    import torch

    if config.train.dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "train.dtype=fp16 needs a GPU: DeepSpeed refuses it on a CPU, whose fp16 kernels are partial and "
            "slow; choose train.dtype=fp32 or bf16"
        )
    if 0 < torch.cuda.device_count() < config.launch.processes:
        raise ConfigError(
            f"launch.processes={config.launch.processes} is more than this machine's "
            f"{torch.cuda.device_count()} GPU(s), and a process needs one for itself"
        )


def _check_objective(config: RunConfig) -> None:
    from rcpo.objectives import get_objective

    wanted = config.objective
    if wanted.module is not None:
        sys.path[:0] = [] if os.getcwd() in sys.path else [os.getcwd()]
        if importlib.util.find_spec(wanted.module.partition(".")[0]) is None:
            raise ConfigError(
                f"objective.module={wanted.module} is not installed and not in {os.getcwd()}; "
                "install it or add its folder to PYTHONPATH"
            )
    try:
        objective = get_objective(
            wanted.name,
            module=wanted.module,
            reduction=wanted.reduction,
            nll_coef=wanted.nll_coef,
            **wanted.hyperparameters,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if config.rc.enabled and not objective.needs_rejected:
        raise ConfigError(
            f"rc=on has nothing to calibrate: objective={wanted.name} has no rejected side; choose rc=off"
        )


def world_size(config: RunConfig) -> int:
    """Processes that the run will have; an outer launcher's count goes before `launch.processes`.

    Raises ConfigError where both are given and differ.
    """
    ranks = external_ranks()
    if ranks is None:
        return config.launch.processes
    if config.launch.processes not in (1, ranks.world_size):
        raise ConfigError(
            f"launch.processes={config.launch.processes}, but {ranks.launcher} started {ranks.world_size}; "
            "leave launch.processes out"
        )
    return ranks.world_size


def train(config: RunConfig, run_dir: Path) -> int:
    """The trainer with its held-out evaluation, imported when they are needed."""
    from rcpo import trainer
    from rcpo.evaluation.heldout import evaluate, show

    last: dict[str, Any] = {}

    def held_out(session: Session) -> dict[str, Any]:
        last.clear()
        last.update(evaluate(session))
        return last

    code = trainer.train(config, run_dir, held_out)
    show(last)
    return code


def launch(config: RunConfig, run_dir: Path | None) -> int:
    """Trains and returns the exit code: 0 done, 1 failed, 2 refused, 75 stopped with a checkpoint saved.

    `run_dir` holds the resolved config.yaml; ranks other than 0 pass None and get rank 0's.
    """
    if external_ranks() is None and config.launch.processes > 1:
        assert run_dir is not None
        return launch_workers(config.launch.processes, _command(run_dir))
    return run_here(train, config, run_dir)


def run_here(task: Task, config: RunConfig, run_dir: Path | None) -> int:
    """Runs `task` as this process's rank, in rank 0's folder; failures go to log and exit code."""
    ranks = external_ranks()
    try:
        if ranks is not None:
            export_ranks(ranks, os.environ)
        from rcpo import distributed

        distributed.initialize()
        folder = Path(distributed.broadcast_object(None if run_dir is None else str(run_dir)))
        if distributed.is_main():
            print(f"{task.__name__}: {folder}", flush=True)
            log.info("%s: %s", task.__name__, to_container(config))
        code = task(config, folder)
        distributed.shutdown()
        return code
    except ConfigError as error:
        report_refusal(error)
        return REFUSED
    except (RunError, OSError) as error:
        # the message says what happened (a full disk, a number that is no number); the log has where
        log.info("%s failed", task.__name__, exc_info=True)
        report_failure(error)
        return FAILED
    except Exception as error:
        # the process ends here: the log keeps the traceback, the caller gets a code
        log.exception("%s failed", task.__name__)
        _tell_agent(error)
        return FAILED


def report_refusal(error: ConfigError) -> None:
    """One message on standard error from each node, and to the local launcher where there is one."""
    if os.environ.get(_WORKER) == "1":
        _tell_agent(error)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"rcpo: {error}", file=sys.stderr)
    log.info("refused: %s", error)


def report_failure(error: Exception) -> None:
    """One message on standard error from rank 0, or by the local launcher where there is one."""
    if os.environ.get(_WORKER) == "1":
        _tell_agent(error)
    elif os.environ.get("RANK", "0") == "0":
        print(f"rcpo: {error}", file=sys.stderr)


# set in the environment of the ranks that `launch_workers` starts
_WORKER = "RCPO_WORKER"


def _tell_agent(error: BaseException) -> None:
    """Leaves the message where the elastic agent that started this rank finds it."""
    if os.environ.get(_WORKER) == "1":
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def launch_workers(processes: int, command: list[str]) -> int:
    """Starts `command` as local ranks under PyTorch's elastic agent; returns the exit code of the whole."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the agent's own reports would come beside ours; failures come as an exception anyway
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_share = {"OMP_NUM_THREADS": str(max(1, cores // processes)), _WORKER: "1"}
    with tempfile.TemporaryDirectory(prefix="rcpo-launch-") as folder:
        agent = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            run_id=Path(folder).name,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="",  # forwarded below: the agent would kill ranks that are saving a checkpoint
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        with _environment(ranks_share), forward_signals(_children) as received:
            try:
                elastic_launch(agent, command[0])(*command[1:])
            except ChildFailedError as error:
                return _outcome(list(error.failures.values()), stopping=bool(received))
    return STOPPED if received else DONE


def _children() -> list[int]:
    """Process ids of this process's children: the ranks (multiprocessing's tracker ignores signals)."""
    import psutil  # type: ignore[import-untyped]

    return [child.pid for child in psutil.Process().children()]


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """`extra` in os.environ for a while; what the user set already stays as it is."""
    added = {key: value for key, value in extra.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def forward_signals(children: Callable[[], list[int]]) -> Iterator[list[int]]:
    """Hands stop signals on to the processes that `children` lists, and yields the list of those received."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for pid in children():
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it left by itself in between
                continue

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _outcome(failures: list[ProcessFailure], *, stopping: bool) -> int:
    """The exit code that a set of failed ranks stands for, and one message for a failure."""
    codes = [failure.exitcode for failure in failures]
    if STOPPED in codes:
        return STOPPED
    first = min(failures, key=lambda failure: (failure.exitcode < 0 and REFUSED in codes, failure.timestamp))
    message = _message(first)
    if REFUSED in codes:
        print(f"rcpo: {message}", file=sys.stderr)
        return REFUSED
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        why = " while it was being stopped" if stopping else ""
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        message = f"it was ended by {name}{why}{hint}"
    print(
        f"rcpo: rank {first.local_rank} failed (exit code {first.exitcode}): {message}; "
        f"its traceback is above and in the run's {LOG_FILE}",
        file=sys.stderr,
    )
    return FAILED


def _message(failure: ProcessFailure) -> str:
    """The last line of what a rank recorded, without the exception's name where it was a ConfigError."""
    recorded = failure.error_file_data.get("message", "")
    text = recorded.get("message", "") if isinstance(recorded, dict) else recorded
    return str(text).removeprefix("ConfigError: ") or "no message"


def run_process(run_dir: Path) -> tuple[int, bool]:
    """Trains RUN_DIR in a process of its own: exit code, and whether a stop signal was handed on."""
    process = subprocess.Popen(_command(run_dir), start_new_session=True)
    with forward_signals(lambda: [process.pid]) as received:
        code = process.wait()
    return (code if code in (DONE, FAILED, REFUSED, STOPPED) else FAILED), bool(received)


def _command(run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "rcpo.launch", str(run_dir)]


def configure_log(run_dir: Path, *, file: bool) -> None:
    """Warnings to standard error, everything to the run's log; `file` on rank 0 only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.WARNING)
    if file:
        handlers.append(logging.FileHandler(run_dir / LOG_FILE, encoding="utf-8"))
    layout = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, handlers=handlers, force=True)


def main(arguments: list[str]) -> int:
    """`python -m rcpo.launch RUN_DIR`."""
    if len(arguments) != 1:
        print("usage: python -m rcpo.launch RUN_DIR", file=sys.stderr)
        return REFUSED
    run_dir = Path(arguments[0])
    try:
        config = load_run_config(run_dir / "config.yaml")
        ranks = external_ranks()
        configure_log(run_dir, file=ranks is None or ranks.rank == 0)
        check(config, world_size(config))
    except ConfigError as error:
        report_refusal(error)
        return REFUSED
    return launch(config, run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
