"""`plan.*` and `gpu.*`: the settings of `rcpo plan`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from rcpo.config.fields import key
from rcpo.config.nodes import read_node


@dataclass(kw_only=True)
class PlanConfig:
    """What `rcpo plan` is told beside a run's keys. Lengths are mean tokens."""

    gpus: int | None = key(None, "GPUs of the run, one process each; null: launch.processes", at_least=1)
    architecture: str | None = key(
        None, "shapes to plan with: a shipped name, or a config.json; null: the model's", path=True
    )
    pairs: int | None = key(None, "training pairs; null: counted", at_least=1)
    prompt_tokens: int | None = key(None, "tokens of a prompt; null: counted", at_least=1)
    response_tokens: int | None = key(None, "tokens of a response; null: counted", at_least=1)
    efficiency: float = key(0.45, "share of the GPU's FLOP/s that training reaches", above=0, at_most=1)
    start_seconds: float = key(4e-5, "seconds in which the host starts an operation", at_least=0)
    link_efficiency: float = key(0.8, "share of the links' bandwidth that is reached", above=0, at_most=1)
    headroom: float = key(0.1, "share of the GPU's memory to leave free", at_least=0, below=1)


@dataclass(kw_only=True)
class GpuConfig:
    """A GPU's figures: bytes, FLOP/s of dense products, bytes/s in one direction."""

    name: str = key("unknown", "what the plan calls it")
    memory: float = key(0.0, "bytes of memory", above=0)
    bf16: float = key(0.0, "FLOP/s in bf16", above=0)
    fp16: float = key(0.0, "FLOP/s in fp16", above=0)
    fp32: float = key(0.0, "FLOP/s in fp32", above=0)
    bandwidth: float = key(0.0, "bytes/s of its memory", above=0)
    link: float = key(0.0, "bytes/s to the other GPUs of its node", above=0)
    network: float = key(0.0, "bytes/s to other nodes, its share", above=0)
    host: float = key(0.0, "bytes/s to the host's memory", above=0)
    host_bandwidth: float = key(0.0, "bytes/s of the host's memory, its share", above=0)
    host_memory: float = key(0.0, "bytes of the host's memory, its share", above=0)
    per_node: int = key(8, "GPUs that share links and network", above=0)


def plan_config(cfg: DictConfig) -> tuple[PlanConfig, GpuConfig | None]:
    """The validated `plan` and `gpu` nodes, None where no GPU is chosen; raises ConfigError."""
    config = read_node(cfg, "plan", PlanConfig())
    if OmegaConf.select(cfg, "gpu") is None:
        return config, None
    return config, read_node(cfg, "gpu", GpuConfig())
