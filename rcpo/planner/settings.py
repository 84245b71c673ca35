"""`plan.*` and `gpu.*`: the settings of `rcpo plan`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from rcpo.config.nodes import read_node
from rcpo.config.validation import Range, check_range


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
