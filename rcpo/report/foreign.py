"""Logs of other tools, under rcpo's names: trainer_state.json of TRL and LLaMA-Factory, and HALOs' metrics.

Each has a mean a logged row: nothing of single pairs, and no gradients.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rcpo.errors import ConfigError
from rcpo.runs.folder import CONFIG_FILE, read_object, read_settings

TRAINER_STATE = "trainer_state.json"
HALOS_METRICS = "metrics.json"
TRANSFORMERS, LLAMA_FACTORY, HALOS = "TRL or another Trainer of transformers", "LLaMA-Factory", "HALOs"
PROPORTIONAL = 1e-3  # rewards that are log-probs times a constant agree with it to their printed digits
_STATS = re.compile(r"train stats after (\d+) examples: (\{.*\})")
_EVALUATED = re.compile(r"eval after (\d+): (\{.*\})")


@dataclass(frozen=True)
class Foreign:
    """A log of another tool: `rows` by rcpo's names, the last evaluation.

    `planned` steps and those `taken` are None where the log does not tell; rows may lack the last ones taken.
    """

    origin: str
    rows: list[dict[str, Any]]
    evaluation: dict[str, float]
    planned: int | None = None
    taken: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def origin_of(folder: Path) -> str | None:
    """The tool that trained in a folder; None for a run of rcpo's and for no run at all."""
    if _state_file(folder) is not None:
        return LLAMA_FACTORY if (folder / "trainer_log.jsonl").exists() else TRANSFORMERS
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return HALOS if re.search(r"^local_run_dir:", text, re.MULTILINE) else None


def read_foreign(folder: Path) -> Foreign:
    """The log of a folder that has an origin."""
    origin = origin_of(folder)
    assert origin is not None
    return _halos(folder) if origin == HALOS else _transformers(folder, origin)


def _state_file(folder: Path) -> Path | None:
    """The folder's own trainer_state.json, or that of its last checkpoint."""
    own = folder / TRAINER_STATE
    if own.is_file():
        return own
    found = {
        int(match[1]): path
        for path in folder.glob(f"checkpoint-*/{TRAINER_STATE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    return found[max(found)] if found else None


def _transformers(folder: Path, origin: str) -> Foreign:
    path = _state_file(folder)
    assert path is not None
    state = read_object(path)
    history = state.get("log_history")
    logged = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    rows: dict[int, dict[str, Any]] = {}
    for row in logged:
        step = row.get("step")
        if isinstance(step, int) and "train_runtime" not in row:
            rows.setdefault(step, {"step": step}).update(_renamed(row))
    planned, taken = (
        value if isinstance(value := state.get(key), int) else None for key in ("max_steps", "global_step")
    )
    return replace(_log(origin, rows.values(), {}), planned=planned, taken=taken)


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """`eval_rewards/chosen` as `eval/rewards/chosen`; the other names are rcpo's own."""
    return {re.sub(r"^eval_", "eval/", key): value for key, value in row.items() if key != "step"}


def _halos(folder: Path) -> Foreign:
    """What HALOs printed, where a log of it is in the folder, and the metrics.json of its checkpoints."""
    settings: dict[str, Any] = {}
    with suppress(ConfigError):
        settings = read_settings(folder / CONFIG_FILE)
    batch = settings.get("model.batch_size")
    size = batch if isinstance(batch, int) and batch > 0 else 1
    rows: dict[int, dict[str, Any]] = {}
    for examples, values in [*_printed(folder), *_saved(folder)]:
        step = max(1, round(examples / size))
        rows.setdefault(step, {"step": step}).update(_of_halos(values))
    return _log(HALOS, [rows[step] for step in sorted(rows)], settings)


def _printed(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for path in sorted([*folder.glob("*.log"), *folder.glob("*.out"), *folder.glob("*.txt")]):
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (_STATS, _EVALUATED):
            for match in pattern.finditer(text):
                try:
                    values = ast.literal_eval(match[2])
                except (ValueError, SyntaxError):  # a line that another process wrote into
                    continue
                yield int(match[1]), values


def _saved(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for path in sorted(folder.glob(f"*/{HALOS_METRICS}")):
        values = read_object(path)
        if isinstance(values.get("counter"), int):
            yield values["counter"], values


def _of_halos(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rewards_train/chosen` as `rewards/chosen`, `logps_eval/chosen` as `eval/logps/chosen`, and so on."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if not math.isfinite(number):
            continue
        if match := re.fullmatch(r"(rewards|logps)_(train|eval)/(\w+)", key):
            key = f"{'eval/' if match[2] == 'eval' else ''}{match[1]}/{match[3]}"
        elif match := re.fullmatch(r"loss/(train|eval)", key):
            key = "eval/loss" if match[1] == "eval" else "loss"
        found[key] = number
    return found


def _log(origin: str, rows: Any, settings: dict[str, Any]) -> Foreign:
    """The log with margins where a tool gives both sides alone, and the last value of each held-out key."""
    kept = list(rows)
    for row in kept:
        sides = row.get("rewards/chosen"), row.get("rewards/rejected")
        if "rewards/margins" not in row and all(isinstance(side, int | float) for side in sides):
            row["rewards/margins"] = sides[0] - sides[1]
    last: dict[str, float] = {}
    for row in kept:
        last |= {k: float(v) for k, v in row.items() if k.startswith("eval/") and isinstance(v, int | float)}
    return Foreign(origin, kept, last, settings=settings)


def has_reference(rows: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether rewards compare with a reference; they do not where they are log-probs times a constant.

    None where the log does not tell.
    """
    factors = [
        row[f"rewards/{side}"] / row[f"logps/{side}"]
        for row in rows
        for side in ("chosen", "rejected")
        if isinstance(row.get(f"rewards/{side}"), int | float) and row.get(f"logps/{side}")
    ]
    if len(factors) < 4:
        return None
    middle = sorted(factors)[len(factors) // 2]
    return not all(abs(factor - middle) <= PROPORTIONAL * abs(middle) for factor in factors)
