"""The steps of `rcpo iterate`, each in a folder of its own; what each needs is known before the first one.

round-N/sample: answers of the model so far, and their pairs. round-N/train: a run on those pairs.
round-N/evaluate: its weights on the data's own held-out pairs; of round 0, the model before all rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rcpo.config.changes import FREE_NODES, flatten
from rcpo.config.data import DataConfig
from rcpo.config.onpolicy import ROUND, IterateConfig, OnPolicyConfig, as_tree
from rcpo.config.parsing import read_tree, save_run_config, to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.local import run_command
from rcpo.models.loading import model_folder
from rcpo.onpolicy.pairs import PAIRS, finished_pairs
from rcpo.onpolicy.settings import Settings
from rcpo.onpolicy.start import sample_command
from rcpo.report.rounds import SETTINGS_FILE
from rcpo.runs.folder import CONFIG_FILE, EVALUATION, EVALUATION_FILE, FINAL
from rcpo.runs.inputs import completed
from rcpo.system.files import replace_text

SAMPLE, TRAIN, EVALUATE = "sample", "train", "evaluate"
# what may differ when a call continues: it changes no number
_FREE = (
    *(
        f"sample.{key}"
        for key in ("batch_size", "base_url", "api_key_env", "concurrency", "timeout", "retries")
    ),
    *("sample.backoff", "sample.price_in", "sample.price_out", "score.batch_size", "rounds", "config.resume"),
)


@dataclass(frozen=True)
class Step:
    """One step of a round; `kind` is sample, train or evaluate."""

    number: int
    kind: str
    folder: Path

    @property
    def name(self) -> str:
        return f"round {self.number}, {self.kind}"

    @property
    def label(self) -> str:
        return f"round-{self.number}-{self.kind}"

    @property
    def command(self) -> list[str]:
        """The process that does it, or what is left of it."""
        return sample_command(self.folder) if self.kind == SAMPLE else run_command(self.folder, self.kind)

    @property
    def done(self) -> bool:
        if self.kind == SAMPLE:
            return finished_pairs(self.folder) is not None
        return completed(self.folder) if self.kind == TRAIN else (self.folder / EVALUATION_FILE).is_file()


@dataclass(frozen=True)
class Iteration:
    """`rounds` of sampling, training and evaluation, from one configuration, in one folder."""

    config: RunConfig
    nodes: OnPolicyConfig
    settings: IterateConfig
    rounds: int
    folder: Path

    def steps(self) -> Iterator[Step]:
        """All steps in their order."""
        yield Step(0, EVALUATE, self.evaluate(0))
        for number in range(1, self.rounds + 1):
            yield Step(number, SAMPLE, self.sample(number))
            yield Step(number, TRAIN, self.train(number))
            yield Step(number, EVALUATE, self.evaluate(number))

    def sample(self, number: int) -> Path:
        return self.folder / f"round-{number}" / SAMPLE

    def train(self, number: int) -> Path:
        return self.folder / f"round-{number}" / TRAIN

    def evaluate(self, number: int) -> Path:
        return self.folder / f"round-{number}" / EVALUATE

    def check(self) -> None:
        """Raise ConfigError for what rounds rule out, and for a folder of another iteration."""
        config = self.config
        if config.reference.path is not None:
            raise ConfigError(
                f"reference.path={config.reference.path}: rcpo iterate takes its reference from the rounds; "
                "choose iterate.reference=round or iterate.reference=first"
            )
        if config.model.init == "random":
            raise ConfigError(
                "model.init=random: rcpo iterate compares every round with the first model, whose weights "
                "have to be in a folder; train it first, and give model=local model.path=…/final"
            )
        if config.adapter.merge:
            raise ConfigError(
                "adapter.merge=true makes a new base model, and rounds share one: merge it first, with "
                "adapter.save_merged=true, and give model.path=…/final/merged"
            )
        if config.resume not in (None, "auto"):
            raise ConfigError(f"resume={config.resume}: give the iteration's folder: hydra.run.dir=DIR")
        for key, value in (("checkpoint.best", config.checkpoint.best), ("eval.every", config.eval.every)):
            if value:
                raise ConfigError(
                    f"{key}={value} needs held-out pairs while training, and rcpo iterate evaluates between "
                    "rounds; leave it out"
                )
        data = config.data
        if data.eval_path is None and data.eval_split is None and not data.eval_fraction:
            raise ConfigError(
                "rcpo iterate evaluates each round on held-out pairs; set data.eval_path, or "
                "data.eval_fraction above 0"
            )
        self._refuse_other()

    def _refuse_other(self) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            return
        before: Any = OmegaConf.to_container(read_tree(path))
        old, new = flatten(before), flatten(self._tree())
        free = tuple(f"config.{node}." for node in FREE_NODES)
        changed = [
            f"{key}: {old.get(key)} -> {value}"
            for key, value in new.items()
            if key not in _FREE and not key.startswith(free) and old.get(key) != value
        ]
        if changed:
            shown = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(
                f"{self.folder} holds another iteration:\n{shown}\n"
                "give the same values, or another folder: hydra.run.dir=DIR"
            )

    def _tree(self) -> dict[str, object]:
        return {
            "rounds": self.rounds,
            "iterate": vars(self.settings),
            **as_tree(self.nodes),
            "config": to_container(self.config),
        }

    def write(self, processes: int) -> None:
        """Write what each step reads; `processes` are the ranks of each. Collect nothing, load nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / SETTINGS_FILE, OmegaConf.to_yaml(OmegaConf.create(self._tree())))
        evaluated = copy.deepcopy(self.config)
        # nothing is trained, so the global batch need not fit this number of processes
        evaluated.train.batch_size = (evaluated.train.micro_batch_size or 1) * processes
        for number in range(self.rounds + 1):
            folder = self.evaluate(number) / EVALUATION
            folder.mkdir(parents=True, exist_ok=True)
            save_run_config(self.after(evaluated, number), folder / CONFIG_FILE)
        for number in range(1, self.rounds + 1):
            nodes = replace(self.nodes, sample=replace(self.nodes.sample, round=number))
            run = self.train(number - 1) if number > 1 else None
            Settings(evaluated, nodes, run).write(self.sample(number))
            self.train(number).mkdir(exist_ok=True)
            save_run_config(self.training(number), self.train(number) / CONFIG_FILE)

    def training(self, number: int) -> RunConfig:
        """The configuration of a round's training: its pairs, from the weights of the round before."""
        config = copy.deepcopy(self.config)
        config.resume = "auto"
        config.data = round_data(config.data, self.sample(number) / PAIRS)
        if number == 1:
            return config
        config = self.after(config, number - 1)
        if self.settings.reference == ROUND:
            config.reference.path = None
        return config

    def after(self, config: RunConfig, number: int) -> RunConfig:
        """The same with the weights that a round ended with, and the first model as its reference."""
        if number == 0:
            return config
        config = copy.deepcopy(config)
        final = str(self.train(number) / FINAL)
        config.reference.path = config.adapter.path or str(model_folder(self.config.model))
        if config.adapter.name == "none":
            config.model = replace(config.model, name="local", path=final, revision=None, init="pretrained")
        else:
            config.adapter.path = final
        return config


def round_data(data: DataConfig, pairs: Path) -> DataConfig:
    """What a round trains on: its pairs, all of them, tokenised as the data is.

    How the data's own rows are read, and which of their scores are wanted, does not concern these pairs. One
    that the limits make unusable is left out and counted: it was made here, and cannot be corrected.
    """
    return replace(
        data,
        name="pairs",
        path=str(pairs),
        subset=None,
        data_dir=None,
        split="train",
        revision=None,
        streaming=False,
        sources=[],
        columns={},
        format=None,
        format_module=None,
        labels={},
        min_margin=None,
        max_margin=None,
        eval_path=None,
        eval_split=None,
        eval_fraction=0.0,
        max_examples=None,
        on_bad="drop",
    )
