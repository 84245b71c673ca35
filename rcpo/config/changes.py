"""What differs between the configuration of a checkpoint and that of the run that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcpo.config.parsing import to_container
from rcpo.config.schema import ConfigError, RunConfig

# What a run shows, keeps and where it runs: none of it touches a weight. Data files are compared by content.
FREE_NODES = ("log", "eval", "judge", "probe", "checkpoint", "wandb", "launch", "engine", "dynamics", "watch")
FREE_KEYS = (
    "resume",
    "resume_changed",
    "train.on_nonfinite",
    "train.max_nonfinite",
    "data.path",
    "data.eval_path",
    "data.sources",
    "data.streaming",
    "data.cache",
    "data.workers",
)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """`key: old -> new` for each key that changes what is trained; one that `old` lacks had its default."""
    before = flatten(to_container(RunConfig())) | flatten(old)
    after = flatten(to_container(new))
    if "objective.name" in after and before["objective.name"] != after["objective.name"]:
        return [f"objective: {before['objective.name']} -> {after['objective.name']}"]
    return [
        f"{key}: {before.get(key)} -> {value}"
        for key, value in after.items()
        if key not in FREE_KEYS and key.partition(".")[0] not in FREE_NODES and before.get(key) != value
    ]


def refuse_changes(found: list[str], where: str, config: RunConfig) -> None:
    """Raises ConfigError with the differences, unless `resume_changed=allow`."""
    if found and config.resume_changed == "refuse":
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
            f"resume={config.resume}: this is not the run that {where} holds:\n{lines}\n"
            "give the same values, or resume_changed=allow to go on with the new ones"
        )


def refuse_other_run(state: Mapping[str, Any], where: str, config: RunConfig, processes: int) -> None:
    """Raises ConfigError where a run of `processes` ranks is not the one that a checkpoint's `state` is of.

    The ranks' number may change, except where a result depends on what one micro-batch of each rank holds.
    """
    found = changes(state["config"], config)
    if config.rc.enabled and config.rc.update == "microbatch" and state["world_size"] != processes:
        found.append(f"launch.processes: {state['world_size']} -> {processes} (rc.update=microbatch)")
    refuse_changes(found, where, config)
