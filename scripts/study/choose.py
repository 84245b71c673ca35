"""`python scripts/study/choose.py SWEEP_DIR METRIC [--fall NATS]`: each objective's settings for a study.

SWEEP_DIR holds runs without calibration. Of an objective's runs whose loser fell by NATS a token or more,
the one with the highest METRIC (a key of evaluation.json) is chosen; where none fell so far, the one with the
lowest loser. Printed are lines for `sweep.settings`: what varied, and what the choice rests on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rcpo.runs.comparison import RunSummary, summarise_run
from rcpo.runs.folder import FINISHED_FILE

LOSER = "eval/token_logratios/rejected"
CHOSEN = {"optim.lr": "lr", "objective.beta": "beta", "objective.tau": "tau"}


def choose(runs: Iterable[RunSummary], metric: str, fall: float) -> RunSummary:
    """The run that the rule takes."""
    runs = list(runs)
    fallen = [run for run in runs if run.values[LOSER] <= -fall]
    if fallen:
        return max(fallen, key=lambda run: run.values[metric])
    return min(runs, key=lambda run: run.values[LOSER])


def number(value: float) -> str:
    """As YAML reads a float."""
    return f"{value:g}" if value >= 1e-2 else f"{value:.1e}".replace("e-0", "e-")


def line(runs: list[RunSummary], metric: str, fall: float) -> str:
    """`NAME_REDUCTION: {lr: …}  # …` for an objective's runs."""
    run = choose(runs, metric, fall)
    varied = [key for key in CHOSEN if len({other.settings.get(key) for other in runs}) > 1]
    settings = ", ".join(f"{CHOSEN[key]}: {number(run.settings[key])}" for key in varied)
    name = f"{run.settings['objective.name']}_{run.settings['objective.reduction']}"
    reason = f"of {len(runs)}: {run.values[metric]:.1%}, loser {run.values[LOSER]:+.2f}"
    return f"{name}: {{{settings}}}  # {reason}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("metric")
    parser.add_argument("--fall", type=float, default=0.1)
    arguments = parser.parse_args()
    groups: dict[tuple[str, str], list[RunSummary]] = {}
    for path in sorted(arguments.folder.glob(f"*/{FINISHED_FILE}")):
        run = summarise_run(path.parent)
        if run.settings["rc.enabled"]:
            raise SystemExit(f"choose: {path.parent} is calibrated; the choice is made without calibration")
        key = (str(run.settings["objective.name"]), str(run.settings["objective.reduction"]))
        groups.setdefault(key, []).append(run)
    for runs in groups.values():
        print(line(runs, arguments.metric, arguments.fall))


if __name__ == "__main__":
    main()
