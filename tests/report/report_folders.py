"""Run folders made by hand: a linear model under plain SGD, whose every number is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# z_w = A·θ and z_l = B·θ: the scores are A and B themselves, whatever θ is
A, B = np.array([1.0, 0.0]), np.array([1.2, 1.6])
COSINE = 0.6  # (1·1.2) / (1·2)
D_W, D_L = 0.5, 0.25
LEARNING_RATE = 0.1


def settings(objective: str = "dpo", rc: bool = False, seed: int = 1, **more: Any) -> dict[str, Any]:
    """A configuration in the layout of config.yaml; `more` are dotted keys with `__` for the dot."""
    tree: dict[str, Any] = {
        "seed": seed,
        "train": {"epochs": 1, "max_steps": None, "max_grad_norm": None},
        "optim": {"name": "sgd", "lr": LEARNING_RATE, "momentum": 0.0},
        "objective": {"name": objective, "reduction": "mean", "beta": 0.1},
        "rc": {"enabled": rc, "geometry": "parameters", "ema": None},
    }
    for key, value in more.items():
        node, _, leaf = key.partition("__")
        tree[node][leaf] = value
    return tree


def rows(count: int, alpha: float | None = None) -> list[dict[str, Any]]:
    """The metrics of `count` steps of θ ← θ + η (α d_w A − d_l/α B), each measured before its step."""
    used = 1.0 if alpha is None else alpha
    theta = np.zeros(2)
    found = []
    for step in range(1, count + 1):
        found.append(_row(step, count, A @ theta, B @ theta, alpha))
        theta = theta + LEARNING_RATE * (used * D_W * A - D_L / used * B)
    return found


def _row(step: int, count: int, winner: float, loser: float, alpha: float | None) -> dict[str, Any]:
    ratio, center = D_W / D_L, 2.0
    row = {
        "step": step,
        "epoch": step / count,
        "loss": 0.7,
        "learning_rate": LEARNING_RATE,
        "grad_norm": 1.0,
        "logps/chosen": winner,
        "logps/rejected": loser,
        "logratios/chosen": winner,
        "logratios/rejected": loser,
        "dynamics/incentive_chosen": D_W,
        "dynamics/incentive_rejected": D_L,
        "dynamics/score_norm_chosen": 1.0,
        "dynamics/score_norm_rejected": 2.0,
        "dynamics/score_cosine": COSINE,
        "dynamics/incentive_ratio": ratio,
        "dynamics/band_center": center,
        "dynamics/band_lower": COSINE * center,
        "dynamics/band_upper": center / COSINE,
        "dynamics/in_band": True,
    }
    if alpha is None:
        return row
    after = alpha**2 * ratio
    inside = COSINE * center <= after <= center / COSINE
    return row | {
        "rc/alpha": alpha,
        "rc/calibrated_ratio": after,
        "rc/in_band": inside,
        "rc/skipped": 0,
        "rc/clamped": 0,
    }


def write_run(
    folder: Path,
    tree: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluation: dict[str, float | None] | None = None,
    finished: bool = True,
) -> Path:
    """A run's folder with what is given."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    environment = {"python": "3.11.7", "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if finished:
        (folder / "finished.json").write_text("{}")
    return folder


def evaluation(winner: float, loser: float, exact_match: float = 0.9) -> dict[str, float | None]:
    """An evaluation.json whose intervals are ± 0.02."""
    found: dict[str, float | None] = {"eval/examples": 100}
    for name, value in (
        ("logratios/chosen", winner),
        ("logratios/rejected", loser),
        ("token_logratios/chosen", winner),  # the reduction is the mean
        ("token_logratios/rejected", loser),
        ("rewards/accuracies", 0.8),
        ("exact_match", exact_match),
    ):
        found |= {f"eval/{name}": value, f"eval/{name}/low": value - 0.02, f"eval/{name}/high": value + 0.02}
    return found


def write_sweep(folder: Path, seeds: int = 3, steps: int = 20) -> Path:
    """DPO and SimPO without and with calibration: 4 `seeds` runs, in which calibration keeps the winner."""
    for objective, fallen in (("dpo", -0.5), ("simpo", -0.2)):
        for rc in (False, True):
            for seed in range(1, seeds + 1):
                winner = (-0.03 if rc else fallen) + 0.01 * seed
                write_run(
                    folder / f"{objective}_rc-{rc}_seed-{seed}",
                    settings(objective, rc, seed),
                    rows(steps, 1.1 if rc else None),
                    evaluation(winner, -0.6, 0.9 if rc else 0.6),
                )
    return folder
