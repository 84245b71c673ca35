"""What differs between the configuration of a checkpoint and that of the run that continues it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError

DATA_FREE = ("data.streaming", "data.cache", "data.workers")  # how data are read, but not which
# What a run shows, keeps and where it runs: none of it touches a weight. Data files are compared by content.
FREE_NODES = (
    *("log", "eval", "judge", "probe", "checkpoint", "launch", "engine", "dynamics", "watch"),
    *("tracking", "wandb", "mlflow", "trackio"),
)
FREE_KEYS = (
    "resume",
    "resume_changed",
    "train.on_nonfinite",
    "train.max_nonfinite",
    "data.path",
    "data.eval_path",
    "data.sources",
    *DATA_FREE,
)
DATE = "data.date"  # null: whatever it was, the day on which the run began
# what a run writes down while it trains, which no later evaluation can make up for
RECORDED_NODES = ("log", "dynamics", "probe")
RECORDED_KEYS = ("eval.every", "checkpoint.best", "checkpoint.best_mode")
# of eval.*: how fast an evaluation is, or when and of which weights one is made, but not what it gives
EVALUATION_FREE = ("eval.every", "eval.batch_size", "eval.task_batch_size", "eval.checkpoints")
# of eval.*: what `rcpo evaluate` alone reads, and the evaluation at the end of training does not
EVALUATE_ONLY = tuple(
    f"eval.{name}"
    for name in ("parameters_geometry", "preferences", "tasks", "limit", "chat_template", "judge")
)
# of judge.*: where and how patiently the judge is asked, but not what
JUDGE_FREE = tuple(
    f"judge.{name}"
    for name in (
        *("base_url", "api_key_env", "concurrency", "timeout", "retries", "backoff"),
        *("price_in", "price_out"),
    )
)


def shapes_evaluation(key: str) -> bool:
    """Whether a key changes what an evaluation gives for the same weights."""
    return key.partition(".")[0] == "eval" and key not in EVALUATION_FREE


def _shapes_end(key: str) -> bool:
    """Whether a key changes what the evaluation at the end of training gives."""
    return shapes_evaluation(key) and key not in EVALUATE_ONLY


def shapes_training(key: str) -> bool:
    """Whether a key changes the weights that come out."""
    return key not in FREE_KEYS and key.partition(".")[0] not in FREE_NODES


def shapes_judgement(key: str) -> bool:
    """Whether a key changes what a judge is asked."""
    return key.partition(".")[0] == "judge" and key not in JUDGE_FREE


def shapes_result(key: str) -> bool:
    """Whether a key changes a run's weights or what is measured of them.

    Other files are other data, until somebody shows that they are not.
    """
    if key.startswith("data."):
        return key not in DATA_FREE
    return shapes_training(key) or shapes_evaluation(key) or shapes_judgement(key)


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
    if before["objective.name"] != after["objective.name"]:
        return [f"objective: {before['objective.name']} -> {after['objective.name']}"]
    return _differences(before, after, shapes_training)


def recorded_changes(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """The same for each key that changes what a run writes down while it trains."""
    before = flatten(to_container(RunConfig())) | flatten(old)
    wanted = {key for key in before if key in RECORDED_KEYS or key.partition(".")[0] in RECORDED_NODES}
    return _differences(before, flatten(to_container(new)), wanted.__contains__)


def evaluation_changes(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """The same for each key that changes what the evaluation at the end gives."""
    before = flatten(to_container(RunConfig())) | flatten(old)
    return _differences(before, flatten(to_container(new)), _shapes_end)


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], wanted: Callable[[str], bool]
) -> list[str]:
    return [
        f"{key}: {before.get(key)} -> {value}"
        for key, value in after.items()
        if wanted(key) and before.get(key) != value and not (key == DATE and value is None)
    ]


def refuse_changes(found: list[str], where: str, config: RunConfig) -> None:
    """Raise ConfigError with the differences, unless `resume_changed=allow`."""
    if found and config.resume_changed == "refuse":
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
            f"resume={config.resume}: this is not the run that {where} holds:\n{lines}\n"
            "give the same values, or resume_changed=allow to continue with the new ones"
        )


def refuse_other_run(state: Mapping[str, Any], where: str, config: RunConfig, processes: int) -> None:
    """Raise ConfigError where a run of `processes` ranks is not the one that a checkpoint's `state` is of.

    The ranks' number may change, except where a result depends on what one micro-batch of each rank holds.
    """
    found = changes(state["config"], config)
    if config.rc.enabled and config.rc.update == "microbatch" and state["world_size"] != processes:
        found.append(f"launch.processes: {state['world_size']} -> {processes} (rc.update=microbatch)")
    refuse_changes(found, where, config)
