"""`slurm.*`: what `rcpo submit` asks of the cluster."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from omegaconf import DictConfig

from rcpo.config.nodes import check_node, read_node
from rcpo.config.validation import Range
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class SlurmConfig:
    """What `rcpo submit` asks of SLURM (`slurm.*`); None leaves the choice to the cluster.

    `ranks_per_node` None is one for each GPU, or one. `tasks` are what srun starts: each rank, or each node's
    launcher. `after` is a job id or the folder of a submitted run.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    tasks: str = "rank"
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str = "01:00:00"
    name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = 120
    requeue: bool = True
    array_parallel: int | None = None
    after: str | None = None
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] | None = None
    python: str | None = None
    wrap: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


# the forms of a time limit in sbatch's manual, and the seconds that each of their numbers counts
SLURM_TIMES = (
    (r"(\d+)", (60,)),
    (r"(\d+):(\d+)", (60, 1)),
    (r"(\d+):(\d+):(\d+)", (3600, 60, 1)),
    (r"(\d+)-(\d+)", (86400, 3600)),
    (r"(\d+)-(\d+):(\d+)", (86400, 3600, 60)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (86400, 3600, 60, 1)),
)


SLURM_CHOICES = {"tasks": ("rank", "node")}


SLURM_RANGES: dict[str, Range] = {
    "nodes": (1, math.inf, True, False),
    "gpus_per_node": (0, math.inf, True, False),
    "ranks_per_node": (1, math.inf, True, False),
    "cpus_per_task": (1, math.inf, True, False),
    "signal_seconds": (1, 65535, True, True),  # sbatch's own limit
    "array_parallel": (1, math.inf, True, False),
}


def slurm_config(cfg: DictConfig) -> SlurmConfig:
    """The validated `slurm` node of a composed configuration; raises ConfigError with key, value, remedy."""
    config = read_node(cfg, "slurm", SlurmConfig())
    check_node("slurm", config, SLURM_CHOICES, SLURM_RANGES)
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
    """Raises ConfigError for text that would not stay on its line of a batch script, or in its variable."""
    for key, value in dataclasses.asdict(config).items():
        texts = value if isinstance(value, list) else [value]
        if key != "setup" and any(isinstance(text, str) and not text.isprintable() for text in texts):
            raise ConfigError(f"slurm.{key}={value!r} has characters that do not print; leave them out")
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
        f"slurm.time={time} is not a time as sbatch reads it: give MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or "
        "D-HH:MM:SS, or UNLIMITED"
    )
