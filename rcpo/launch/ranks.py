"""Who started this process: nobody, or an outer launcher that made it one rank of several."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError


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
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local = _number(environment, "LOCAL_RANK") or 0
    if rank is not None and size is not None:
        if size == 1 and "MASTER_ADDR" not in environment:  # nobody to meet
            return None
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "an outer launcher"
        if rank >= size:
            raise ConfigError(f"the environment has RANK={rank} and WORLD_SIZE={size}: ranks count from 0")
        return Ranks(rank, size, local, launcher)
    tasks, place = _number(environment, "SLURM_STEP_NUM_TASKS") or 1, _number(environment, "SLURM_PROCID")
    if tasks > 1 and place is not None:
        return Ranks(place, tasks, _number(environment, "SLURM_LOCALID") or 0, "srun")
    if size not in (None, 1):
        raise ConfigError(
            f"the environment has WORLD_SIZE={size} and no RANK: start all processes by torchrun, deepspeed "
            "or srun, which set both, or unset WORLD_SIZE to train in one process"
        )
    return None


def is_first() -> bool:
    """Whether this process, as rank 0 or without an outer launcher, writes the run's files."""
    ranks = external_ranks()
    return ranks is None or ranks.rank == 0


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable's whole number; None where it is not set, or empty. Raises ConfigError for anything else."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text}, which is not a whole number; unset it")
    return int(text)


def _refuse_incomplete(environment: Mapping[str, str], ranks: Ranks) -> None:
    """Raise ConfigError for ranks that cannot meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(
                f"the environment has RANK={ranks.rank} and WORLD_SIZE={ranks.world_size} and no {name}: "
                "set it to where rank 0 is, as torchrun, deepspeed and srun do; or unset RANK and WORLD_SIZE"
            )
    _number(environment, "MASTER_PORT")


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Write srun's ranks and meeting point the way torch.distributed and DeepSpeed read them.

    Raises ConfigError where another launcher left out where the ranks meet.
    """
    if ranks.launcher != "srun":
        _refuse_incomplete(environment, ranks)
        return
    environment.update(
        RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank)
    )
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = meeting_point(environment)


def meeting_point(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address and port where the tasks of a SLURM job step meet: MASTER_ADDR and MASTER_PORT where given."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = (int(environment.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    address = environment.get("MASTER_ADDR") or node_address(first_node(nodes))
    # all tasks compute the same port, below those that systems hand out; neighbouring jobs get different ones
    return address, environment.get("MASTER_PORT", str(20000 + (job * 37 + step) % 12000))


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list, `r[1-2]n[07-12],x` → `r1n07`; this machine for an empty one."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return "127.0.0.1" if match is None else re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


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
