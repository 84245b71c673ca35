"""`slurm.*`: what `rcpo submit` asks of the cluster."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from rcpo.config.fields import key
from rcpo.config.nodes import read_node
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class SlurmConfig:
    """What `rcpo submit` asks of SLURM; null leaves the choice to the cluster."""

    nodes: int = key(1, "nodes", at_least=1)
    gpus_per_node: int = key(
        0, "GPUs of each node; 0: none, or a cluster that does not count them", at_least=0
    )
    ranks_per_node: int | None = key(None, "ranks on each node; null: one per GPU, or one", at_least=1)
    tasks: str = key("rank", "what srun starts: each rank, or each node's launcher", choices=("rank", "node"))
    cpus_per_task: int | None = key(None, "cores of a task", at_least=1)
    memory: str | None = key(None, "memory of a node, such as 64G")
    time: str = key("01:00:00", "time limit of one piece; the run continues in the next")
    name: str | None = key(None, "name of the job; null: the run folder's")
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account to charge")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that nodes must have")
    signal_seconds: int = key(
        120, "seconds before the limit at which the run saves a checkpoint", at_least=1, at_most=65535
    )
    requeue: bool = key(True, "continue a run that was interrupted or lost a node")
    array_parallel: int | None = key(None, "tasks of a sweep's array at a time; null: no limit", at_least=1)
    after: str | None = key(None, "job id, or folder of a submitted run, to wait for", path=True)
    modules: list[str] = key([], "modules to load")
    setup: list[str] = key([], "lines of shell before the run")
    env: dict[str, str] | None = key(None, "environment variables: {NCCL_SOCKET_IFNAME: ib0}")
    python: str | None = key(None, "Python interpreter; null: the one that submits")
    wrap: list[str] = key([], "words before the interpreter: [apptainer, exec, --nv, image.sif]")
    srun: list[str] = key([], "more flags of srun")
    sbatch: list[str] = key([], "more flags of sbatch")

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @property
    def shown(self) -> SlurmConfig:
        """The same with its environment's values, which may be secrets, hidden."""
        return dataclasses.replace(self, env=dict.fromkeys(self.env or {}, "***"))


# the forms of a time limit in sbatch's manual, and the seconds that each of their numbers counts
SLURM_TIMES = (
    (r"(\d+)", (60,)),
    (r"(\d+):(\d+)", (60, 1)),
    (r"(\d+):(\d+):(\d+)", (3600, 60, 1)),
    (r"(\d+)-(\d+)", (86400, 3600)),
    (r"(\d+)-(\d+):(\d+)", (86400, 3600, 60)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (86400, 3600, 60, 1)),
)


def slurm_config(cfg: DictConfig) -> SlurmConfig:
    """The validated `slurm` node of a composed configuration; raises ConfigError with key, value, remedy."""
    config = read_node(cfg, "slurm", SlurmConfig())
    time = OmegaConf.select(cfg, "slurm.time")
    if isinstance(time, int):  # YAML counts 12:00:00 in sixties, and sbatch reads 43200 as minutes
        raise ConfigError(
            f"slurm.time={time} is a bare number, and YAML makes one of 12:00:00; put a file's time in "
            "quotes, and give minutes with a colon: slurm.time=90:00"
        )
    if config.gpus_per_node and config.ranks > config.gpus_per_node:
        raise ConfigError(
            f"slurm.ranks_per_node={config.ranks} is more than slurm.gpus_per_node={config.gpus_per_node}: "
            "a rank needs a GPU for itself"
        )
    _check_lines(config)
    if slurm_seconds(config.time) <= config.signal_seconds:
        raise ConfigError(
            f"slurm.time={config.time} is no longer than slurm.signal_seconds={config.signal_seconds}: each "
            "piece would be stopped as it starts; give a longer slurm.time, or a smaller slurm.signal_seconds"
        )
    return config


def _check_lines(config: SlurmConfig) -> None:
    """Raise ConfigError for text that would not stay on its line of a batch script, or in its variable."""
    for name, value in dataclasses.asdict(config).items():
        texts = value if isinstance(value, list) else [value]
        if name != "setup" and any(isinstance(text, str) and not text.isprintable() for text in texts):
            raise ConfigError(f"slurm.{name}={value!r} has characters that do not print; leave them out")
    for flag in config.sbatch:
        if not flag.startswith("-"):
            raise ConfigError(f"slurm.sbatch: {flag!r} is not a flag of sbatch: it has to begin with -")
    for name in config.env or {}:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"slurm.env: {name!r} is not the name of a variable: letters, digits and _, not a digit first"
            )
    for name, text in (config.env or {}).items():
        if "\0" in text:
            raise ConfigError(f"slurm.env.{name} holds a null character, which no variable can")


def slurm_seconds(time: str) -> float:
    """Seconds of a time limit as sbatch reads it: whole minutes, rounded up, and none for 0.

    Raise ConfigError for a value that is not a time.
    """
    for form, units in SLURM_TIMES:
        if match := re.fullmatch(form, time):
            seconds = sum(int(number) * unit for number, unit in zip(match.groups(), units, strict=True))
            return math.ceil(seconds / 60) * 60 or math.inf
    if time.upper() in ("INFINITE", "UNLIMITED"):
        return math.inf
    raise ConfigError(
        f"slurm.time={time} is not a time as sbatch reads it: give MM:SS, HH:MM:SS, D-HH, D-HH:MM or "
        "D-HH:MM:SS, or UNLIMITED"
    )
