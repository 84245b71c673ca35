"""What a run's result depends on: its settings and, by content, the data and models that it reads. No torch.

A finished run keeps both in finished.json, and `rcpo evaluate` keeps its own in evaluation/settings.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.config.changes import changes, evaluation_changes, recorded_changes, refuse_changes
from rcpo.config.data import SourceSpec, eval_sources, train_sources
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.data.sources import find_source
from rcpo.errors import ConfigError
from rcpo.models import hub
from rcpo.models.contents import source_hash, tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.runs.folder import EVALUATED, FINISHED_FILE, checkpoint_folders, finished_state, read_object
from rcpo.system.files import cache_folder, replace_text

log = logging.getLogger(__name__)

INPUTS = "inputs"  # in finished.json
EVALUATION_SETTINGS = "evaluation/settings.json"
PAIRS, TASKS, JUDGE = "pairs", "tasks", "judge"  # what an evaluation may consist of
HELD_OUT = "the held-out data"
Inputs = dict[str, str]


def read_inputs(config: RunConfig) -> Inputs:
    """A hash of each thing that the configuration reads, by names for people.

    Hashes of files are remembered. Raises ConfigError for data or a model that cannot be had.
    """
    found = {}
    if config.data.name != "sums":
        training = _data_hash(config, train_sources(config.data))
        held_out = eval_sources(config.data)
        found["the training data"] = training
        found[HELD_OUT] = _data_hash(config, held_out) if held_out else training
    if config.model.path is not None:
        folder = hub.folder("model.path", config.model.path, config.model.revision)
        found["the model"] = _model_hash(config, ModelSource(folder, config.model.init))
    if config.adapter.path is not None and config.adapter.name != "none":
        base = Path() if config.model.path is None else folder
        given = hub.folder("adapter.path", config.adapter.path)
        found["the adapter"] = _model_hash(config, ModelSource(base, adapter=given))
    if config.reference.path is not None:
        source = hub.source("reference.path", config.reference.path, hub.folder)
        found["the reference model"] = _model_hash(config, source)
    return found


def _data_hash(config: RunConfig, specs: Sequence[SourceSpec]) -> str:
    folder = cache_folder(config.data.cache)
    memo = None if folder is None else folder / "hashes"
    keys = [[find_source(spec, memo, log.info).key, spec.weight] for spec in specs]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _model_hash(config: RunConfig, source: ModelSource) -> str:
    folder = cache_folder(config.reference.cache)
    memo = None if folder is None else folder / "files"
    parts = f"{source_hash(source, config.seed, memo)} {tokenizer_hash(source.tokenizer, memo)}"
    return hashlib.sha256(parts.encode()).hexdigest()


@dataclass(frozen=True)
class Standing:
    """How a finished run stands to a configuration: `trained` and `evaluated` hold what differs."""

    trained: list[str]
    evaluated: list[str]

    @property
    def complete(self) -> bool:
        return not (self.trained or self.evaluated)


def standing(run_dir: Path, state: Mapping[str, Any], config: RunConfig, inputs: Inputs) -> Standing:
    """Compare the finished run in a folder, of that `state`, with a configuration and what it reads."""
    if not isinstance(state.get("config"), dict):
        raise ConfigError(f"{run_dir / FINISHED_FILE} is damaged, it holds no configuration: remove it")
    trained = changes(state["config"], config) + recorded_changes(state["config"], config)
    trained += _other_contents(state.get(INPUTS, {}), {k: v for k, v in inputs.items() if k != HELD_OUT})
    made = read_object(run_dir / EVALUATION_SETTINGS).get(PAIRS) or state
    evaluated = evaluation_changes(made["config"], config)
    if HELD_OUT in inputs:
        evaluated += _other_contents(made.get(INPUTS, {}), {HELD_OUT: inputs[HELD_OUT]})
    if not state.get(EVALUATED, True):
        evaluated.append("the evaluation at the end of training did not succeed")
    return Standing(trained, evaluated)


def completed(run_dir: Path, config: RunConfig | None = None) -> bool:
    """Whether the run in a folder is trained and evaluated, as `config` says; raises ConfigError."""
    state = finished_state(run_dir)
    if state is None or config is None:
        return state is not None and bool(state.get(EVALUATED, True))
    return standing(run_dir, state, config, read_inputs(config)).complete


def _other_contents(before: Mapping[str, str], now: Inputs) -> list[str]:
    return [f"{what} (by content)" for what, content in now.items() if before.get(what) != content]


def refuse_other_training(run_dir: Path, found: Standing, config: RunConfig) -> None:
    """Raise ConfigError where a finished run is not the one configured and cannot become it."""
    refuse_changes(found.trained, str(run_dir), config)
    if found.trained and not checkpoint_folders(run_dir):
        raise ConfigError(
            f"resume={config.resume}: the finished run in {run_dir} left no checkpoint to continue from "
            f"with {'; '.join(found.trained)}"
        )


def write_evaluation_settings(run_dir: Path, config: RunConfig, part: str) -> None:
    """Record what a part of evaluation.json was made with."""
    path = run_dir / EVALUATION_SETTINGS
    record = {**read_object(path), part: {"config": to_container(config), INPUTS: read_inputs(config)}}
    replace_text(path, json.dumps(record) + "\n")
