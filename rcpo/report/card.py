"""The model card of `final/`: README.md with the hub's metadata, and the curve of training as a picture.

Everything comes from the run's folder and this machine's copy of the base model; no network is asked.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rcpo import __version__
from rcpo.config.changes import flatten
from rcpo.config.parsing import read_tree, structure, to_container
from rcpo.config.schema import RunConfig
from rcpo.evaluation.summary import ROWS, describe, interval, judge_rows
from rcpo.report import figures, panels, tables, theme
from rcpo.report.document import Picture
from rcpo.report.provenance import (
    CARD,
    base_model,
    base_name,
    commands,
    data_names,
    held_out_data,
    hub_sets,
    license_of,
    model_name,
    versions,
)
from rcpo.report.render import as_markdown, save_picture
from rcpo.report.runs import Run, read_run
from rcpo.runs.folder import CONFIG_FILE, DATA_FILE, FINAL, FINISHED_FILE, read_object
from rcpo.system.files import replace_text

log = logging.getLogger(__name__)

CURVE = "training.png"
# the held-out metrics that the hub's metadata list: key, the hub's name of its kind, title
METADATA = (
    ("rewards/accuracies", "accuracy", "Preference accuracy"),
    ("exact_match", "exact_match", "Exact match"),
    ("winner_fell", "winner_fell", "Pairs whose winner fell"),
    ("logratios/chosen", "logratios/chosen", "Winner's mean log-ratio"),
    ("logratios/rejected", "logratios/rejected", "Loser's mean log-ratio"),
)
# where a run was, what it showed and kept: none of it changes the weights or what is measured of them
LOCAL_NODES = (
    *("launch", "wandb", "tracking", "mlflow", "trackio"),
    *("log", "checkpoint", "probe", "watch", "resume", "judge"),
)
ABSOLUTE = r"(?<![\w~./])/(?:[^\s'\",\]/]+/)+"  # the folders of a path of this machine
_SEAL = re.compile(r"\n<!-- written by rcpo: (\w+) -->\n$")


def renew_card(run_dir: Path, say: Callable[[str], None]) -> None:
    """Write the card of a trained run; a card that cannot be written costs a message and nothing else.

    A card that somebody has edited stays as it is.
    """
    card = run_dir / FINAL / CARD
    if not (run_dir / FINISHED_FILE).exists() or not card.parent.is_dir():
        return
    try:
        if card.exists() and not is_own(card.read_text(encoding="utf-8")):
            say(f"{card} was edited and stays as it is; its figures may differ from those of evaluation.json")
            return
        write_card(run_dir)
    except Exception as error:  # the weights and figures are on disk
        log.exception("the model card was not written")
        say(f"warning: {card} was not written: {type(error).__name__}: {error}")


def is_own(text: str) -> bool:
    """Whether a card is as rcpo wrote it."""
    found = _SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def write_card(run_dir: Path) -> None:
    """README.md and training.png in `final/`; raises what reading the run's folder raises."""
    config = structure(read_tree(run_dir / CONFIG_FILE))
    run = read_run(run_dir, run_dir.resolve().name)
    curve = run.has("logps/chosen")
    if curve:
        _draw(run, run_dir / FINAL / CURVE)
    body = as_markdown("card.md.j2", **_facts(config, run, curve=curve))
    text = f"---\n{_metadata(config, run).to_yaml()}\n---\n\n{body.strip()}\n"
    replace_text(run_dir / FINAL / CARD, f"{text}\n<!-- written by rcpo: {_digest(text)} -->\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draw(run: Run, path: Path) -> None:
    """Winner and loser over training, and α where there was calibration."""
    chosen = [panels.sides, *([panels.alpha] if run.has("rc/alpha") else [])]
    with theme.applied():
        save_picture(Picture("training", figures.side_by_side([(run.name, [run])], chosen), ""), path)


def _metadata(config: RunConfig, run: Run) -> ModelCardData:
    """The YAML that the hub reads: what it was made of, and the held-out means."""
    objective = config.objective.name
    measured = held_out_data(config, run.folder)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data_names(config)[0].partition(",")[0],
            dataset_name=measured,
            metric_type=kind,
            metric_name=title,
            metric_value=round(run.evaluation[f"eval/{key}"], 6),
        )
        for key, kind, title in METADATA
        if f"eval/{key}" in run.evaluation
    ]
    return ModelCardData(
        base_model=base_model(config),
        datasets=hub_sets(config) or None,
        license=license_of(config),
        library_name="transformers" if config.adapter.name == "none" else "peft",
        pipeline_tag="text-generation",
        tags=["rcpo", "preference-optimization", objective, *(["reward-calibration"] * config.rc.enabled)],
        model_name=model_name(config) if results else None,
        eval_results=results or None,
    )


def _facts(config: RunConfig, run: Run, *, curve: bool) -> dict[str, Any]:
    """What the template writes."""
    adapted = config.adapter.name != "none"
    sides = {"eval/logratios/chosen", "eval/logps/chosen"} & set(run.evaluation)
    return {
        "name": model_name(config),
        "base": base_model(config) or base_name(config),
        "objective": config.objective.name,
        "calibrated": config.rc.enabled,
        "adapted": adapted,
        "merged": adapted and config.adapter.save_merged,
        "headline": describe(run.evaluation, config.objective.reduction) if sides else "",
        "curve": CURVE if curve else None,
        "training": _training(config, run),
        "measured": held_out_data(config, run.folder),
        "examples": run.evaluation.get("eval/examples"),
        "held_out": _figures(run.evaluation),
        "settings": _settings(config),
        "commands": commands(run.environment),
        "versions": versions(run.environment),
        "license": license_of(config),
        "version": __version__,
    }


def _figures(evaluation: Mapping[str, float]) -> list[tuple[str, str]]:
    """Held-out means with their intervals, then the judge's and the harness's."""
    known = [row for row in ROWS if f"eval/{row[1]}" in evaluation]
    own = [(title, interval(evaluation, key, unit)) for title, key, unit in known]
    tasks = [(row[0], row[1]) for table in tables.scores(evaluation) for row in table.rows]
    return [*own, *judge_rows(evaluation), *tasks]


def _training(config: RunConfig, run: Run) -> list[tuple[str, str]]:
    """What was done, a fact a row."""
    counts = read_object(run.folder / DATA_FILE)
    pairs = ", ".join(
        f"{counts[key]:,} {what}"
        for key, what in (("train", "to train on"), ("evaluation", "held out"))
        if isinstance(counts.get(key), int)
    )
    dropped = sum(counts.get("dropped", {}).values())
    pairs += f", {dropped:,} dropped as unusable" if dropped else ""
    tokens = run.column("tokens_per_second") * run.column("step_seconds")
    seen = int(run.column("examples_seen")[-1]) if run.has("examples_seen") else 0
    rows = [
        ("base model", base_model(config) or base_name(config)),
        ("data", ", ".join(data_names(config))),
        ("pairs", pairs),
        ("objective", f"{config.objective.name}: {_values(config.objective.hyperparameters)}"),
        ("log-probs of a response", str(config.objective.reduction or "the objective's own")),
        ("reward calibration", f"rule {config.rc.rule}" if config.rc.enabled else "off"),
        ("steps", f"{run.last_step:,} of {config.train.batch_size} pairs; {seen:,} pairs seen"),
        ("learning rate", f"{config.optim.lr:g}, {config.optim.schedule}"),
        ("optimizer", config.optim.name),
        ("precision", config.train.dtype),
        ("weights", _weights(config)),
        ("engine", f"DeepSpeed ZeRO stage {config.zero_stage}"),
        ("seed", str(config.seed)),
    ]
    if config.log.every == 1 and len(tokens) and tokens[-1] == tokens[-1]:
        rows.insert(7, ("tokens", f"{tokens[tokens == tokens].sum():,.0f}"))
    return [(title, value) for title, value in rows if value]


def _weights(config: RunConfig) -> str:
    adapter = config.adapter
    if adapter.name == "none":
        return "all are trained"
    frozen = f" on {adapter.quantization} weights" if adapter.quantization else ""
    return f"{adapter.name} of rank {adapter.r}, α {adapter.alpha}{frozen}"


def _values(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings of its own"


def _settings(config: RunConfig) -> list[tuple[str, str]]:
    """The settings that differ from the defaults, without those that concern this machine alone."""
    default = flatten(to_container(RunConfig()))
    return [
        (key, re.sub(ABSOLUTE, "", str(value)))
        for key, value in flatten(to_container(config)).items()
        if key.partition(".")[0] not in LOCAL_NODES and (key not in default or default[key] != value)
    ]
