"""Keys of the commands around a run: `sweep.*`, `plan.*`, `gpu.*`. No run's config.yaml holds them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rcpo.config.parsing import describe
from rcpo.config.schema import ConfigError
from rcpo.config.validation import Range, check_choice, check_range, unknown_key

Node = TypeVar("Node")
# the nodes and groups that a run does not know, and the commands that read them
COMMAND_NODES = {
    "sweep": "rcpo sweep and rcpo train -m",
    "study": "rcpo sweep",
    "plan": "rcpo plan",
    "gpu": "rcpo plan",
    "slurm": "rcpo submit",
    "sample": "rcpo sample and rcpo iterate",
    "score": "rcpo sample and rcpo iterate",
    "pairing": "rcpo sample and rcpo iterate",
    "iterate": "rcpo iterate",
    "rounds": "rcpo iterate",
}


@dataclass(kw_only=True)
class SweepConfig:
    """How many runs at a time (`parallel` None: one a GPU), and what a search looks for (`sweep.*`).

    `settings` are a study's values by the objective's name, for its interpolations.
    """

    parallel: int | None = 1
    search: str = "grid"
    trials: int = 20
    metric: str = "eval/rewards/accuracies"
    direction: str = "maximize"
    sampler_seed: int = 0
    pruner: str = "none"
    pruner_startup: int = 5
    settings: dict[str, Any] = field(default_factory=dict)


SWEEP_CHOICES = {
    "search": ("grid", "optuna"),
    "direction": ("maximize", "minimize"),
    "pruner": ("none", "median", "hyperband"),
}
SWEEP_RANGES: dict[str, Range] = {
    "parallel": (1, math.inf, True, False),
    "trials": (1, math.inf, True, False),
    "sampler_seed": (0, 2**32 - 1, True, True),
    "pruner_startup": (0, math.inf, True, False),
}


@dataclass(kw_only=True)
class PlanConfig:
    """What `rcpo plan` is told beside a run's keys (`plan.*`); lengths are mean tokens, None is counted."""

    gpus: int | None = None
    architecture: str | None = None
    pairs: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    efficiency: float = 0.4
    link_efficiency: float = 0.8
    headroom: float = 0.1


PLAN_RANGES: dict[str, Range] = {
    "gpus": (1, math.inf, True, False),
    "pairs": (1, math.inf, True, False),
    "prompt_tokens": (1, math.inf, True, False),
    "response_tokens": (1, math.inf, True, False),
    "efficiency": (0, 1, False, True),
    "link_efficiency": (0, 1, False, True),
    "headroom": (0, 1, True, False),
}


@dataclass(kw_only=True)
class GpuConfig:
    """A GPU's figures (`gpu.*`): bytes, FLOP/s of dense products by dtype, bytes/s.

    `bandwidth` is its memory's, `link` goes to the other GPUs of its node of `per_node`, `network` to other
    nodes, `host` to the host's memory, each in one direction; `host_bandwidth` and `host_memory` are a GPU's
    share of the host's own.
    """

    name: str = "unknown"
    memory: float = 0.0
    bf16: float = 0.0
    fp16: float = 0.0
    fp32: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    host: float = 0.0
    host_bandwidth: float = 0.0
    host_memory: float = 0.0
    per_node: int = 8


def plan_config(cfg: DictConfig) -> tuple[PlanConfig, GpuConfig | None]:
    """The validated `plan` and `gpu` nodes, None where no GPU is chosen; raises ConfigError."""
    config = read_node(cfg, "plan", PlanConfig())
    for key, bounds in PLAN_RANGES.items():
        check_range(f"plan.{key}", getattr(config, key), bounds)
    if OmegaConf.select(cfg, "gpu") is None:
        return config, None
    gpu = read_node(cfg, "gpu", GpuConfig())
    for figure in dataclasses.fields(gpu):
        if figure.name != "name":
            check_range(f"gpu.{figure.name}", getattr(gpu, figure.name), (0, math.inf, False, False))
    return config, gpu


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

    Raises ConfigError for what is no time.
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


def sweep_config(cfg: DictConfig) -> SweepConfig:
    """The validated `sweep` node of a composed configuration; raises ConfigError with key, value, remedy."""
    config = read_node(cfg, "sweep", SweepConfig())
    check_node("sweep", config, SWEEP_CHOICES, SWEEP_RANGES)
    return config


def check_node(
    name: str, config: Any, choices: Mapping[str, tuple[str, ...]], ranges: Mapping[str, Range]
) -> None:
    """Raises ConfigError for the first value of a node that is no choice, or out of range."""
    for key, known in choices.items():
        check_choice(f"{name}.{key}", getattr(config, key), known)
    for key, bounds in ranges.items():
        check_range(f"{name}.{key}", getattr(config, key), bounds)


def read_node(cfg: DictConfig, name: str, default: Node) -> Node:
    """A node's dataclass; a primary configuration of the user's own may lack the node. Raises ConfigError."""
    given = OmegaConf.select(cfg, name, default={})
    known = {f"{name}.{field.name}" for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    for key in given:
        if f"{name}.{key}" not in known:
            raise ConfigError(unknown_key(f"{name}.{key}", known))
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}.{describe(error)}") from error
    assert isinstance(config, type(default))
    return config


def refuse_command_keys(overrides: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Raises ConfigError for keys that the command at hand does not read."""
    for override in overrides:
        node = override.lstrip("+~").partition("=")[0].partition(".")[0]
        if node in COMMAND_NODES and node not in allowed:
            raise ConfigError(f"{override}: {node} is read by {COMMAND_NODES[node]} alone")
