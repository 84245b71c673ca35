"""Everything a run works with: data, objective, policy, reference; what training and evaluation share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from enum import Enum
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcpo.config.model import holds_adapter
from rcpo.config.parsing import load_run_config, save_run_config
from rcpo.config.schema import RunConfig
from rcpo.data.batches import GlobalBatches, by_length, row_lengths, split
from rcpo.data.collate import collate_indices
from rcpo.data.dataset import Datasets, load_datasets, writes_date
from rcpo.data.identity import smallest_ids
from rcpo.data.store import PairDataset
from rcpo.data.templates import OWN
from rcpo.engine.backend import refuse_older_deepspeed
from rcpo.engine.load import find_start, load_policy, reference_source
from rcpo.engine.settings import refuse_deepspeed_settings
from rcpo.engine.zero import Engine
from rcpo.errors import ConfigError
from rcpo.method.objectives import Objective
from rcpo.method.types import TokenBatch
from rcpo.models.attention import choose_layout
from rcpo.models.contents import source_hash
from rcpo.models.loading import load_config, load_tokenizer, refuse_quantized
from rcpo.models.policy import compile_layers
from rcpo.reference.cache import Cache, Say
from rcpo.reference.prepare import ReferenceData, ReferencePass, Stop, check_start
from rcpo.runs.folder import CONFIG_FILE, METRICS_FILE, stored_state
from rcpo.system import distributed
from rcpo.system.files import cache_folder
from rcpo.training.ches import within_ches
from rcpo.training.control import ControlPairs, has_fresh_signals, needs_control, set_aside
from rcpo.training.dynamics import check_geometry
from rcpo.training.forward import PairForward
from rcpo.training.limits import refuse_other_tokens, refuse_rows_beyond
from rcpo.training.objective import (
    build_objective,
    refuse_kind,
    refuse_numbers,
    refuse_options,
    refuse_unmeasured,
    scored_sides,
)

log = logging.getLogger(__name__)

# Held-out examples: the standard error of a mean log-ratio is then 6 % of the spread between pairs. To score
# them once costs a forward pass over them, a third of what as many pairs cost in training steps.
TRACKED = 256


class Tracking(Enum):
    """Of which examples the reference's log-probs are known."""

    EVERYTHING = "everything"
    SOME = "some"  # `TRACKED` held-out ones
    NOTHING = "nothing"


class Session:
    """A configuration, loaded. With `training` False there is no optimizer and nothing can be learned.

    `final` is the folder of the run's trained weights, for its evaluation: the policy is then what is there,
    and the reference, where the configuration names no other, the policy that training started from.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, training: bool, final: Path | None = None
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.training = training
        self.objective = build_objective(config)
        refuse_older_deepspeed()
        refuse_deepspeed_settings(config)
        distributed.seed_everything(config.seed, deterministic=config.launch.deterministic)
        self.start = find_start(config, run_dir)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(final or self.start.tokenizer, config.model)
        if config.data.date is None and writes_date(config.data, self.tokenizer):
            config.data.date = first_day(run_dir)
            if training and distributed.is_main():
                record_date(run_dir, config.data.date)
        self.datasets: Datasets = load_datasets(config.data, self.tokenizer, config.seed)
        if not training:
            refuse_other_split(config, run_dir, self.datasets)
        refuse_kind(self.objective, self.datasets.train.kind)
        if self.objective.spec.needs_mismatched:
            for dataset in filter(None, (self.datasets.train, self.datasets.evaluation)):
                _ = dataset.partners  # refuses data with a single prompt before any weights load
        refuse_options(self.objective, self.datasets.train.kind)
        refuse_numbers(self.objective, self.datasets)
        if training and config.checkpoint.best is not None and self.datasets.evaluation is None:
            raise ConfigError(
                f"checkpoint.best={config.checkpoint.best}: nothing is held out; set data.eval_path, or "
                "data.eval_fraction above 0"
            )
        if self.datasets.template is not None and config.data.template not in (None, OWN):
            # final/ generates as it was trained
            self.tokenizer.chat_template = self.datasets.template.source
        changes = training or final is not None or (run_dir / METRICS_FILE).exists()
        self.tracking = tracking(config, self.objective, self.datasets, changes=changes)
        if training and self.datasets.evaluation is not None:
            compared, kind = self.tracking is not Tracking.NOTHING, self.datasets.evaluation.kind
            refuse_unmeasured(config, self.objective, kind, compared=compared)
        if config.reference.sync_every and self.tracking is not Tracking.EVERYTHING:
            raise ConfigError(
                f"reference.sync_every={config.reference.sync_every}: objective={self.objective.name} needs "
                "no reference; set reference.track=true to compare with one, or reference.sync_every=0"
            )
        config.train.accumulation(distributed.world_size())
        self._refuse_what_does_not_fit(final)
        self._split = self.datasets.split
        if training:
            self.datasets = within_ches(self.datasets, config, self.start, self.tokenizer, log.info)
        self.fresh_signals = has_fresh_signals(config, compared=self.tracking is Tracking.EVERYTHING)
        if needs_control(config, self.fresh_signals, len(self.datasets.train)):
            self.datasets = set_aside(self.datasets, config)
        self.batches = GlobalBatches(len(self.datasets.train), config.train.batch_size, config.seed)
        self.total_steps = config.train.max_steps or config.train.epochs * self.batches.steps_per_epoch
        policy = load_policy(config, self.start, final)
        if config.train.gradient_checkpointing:
            policy.recompute_activations()
        if training and config.train.compile:
            compile_layers(policy)
        if self.tracking is Tracking.SOME:  # too few to hold a second model for
            config = replace(config, reference=replace(config.reference, mode="precompute"))
        wanted = self.tracking is not Tracking.NOTHING
        self._reference = ReferencePass(config, policy, self.start, final) if wanted else None
        scoring = [policy.model.config]
        if self._reference is not None and self._reference.other is not None:
            scoring.append(load_config(self._reference.other.base, config.model))
        self.layout = choose_layout(config.data.layout, scoring)
        log.info("layout of the rows: %s", self.layout)
        self.engine = Engine(policy, config, self.total_steps if training else None)
        if training:
            check_geometry(config, self.objective, policy)
        self.held_reference: Engine | None = None
        self.forward = PairForward(self.engine, self.objective, None)
        self.heldout = PairForward(self.engine, self.objective, None)

    def _refuse_what_does_not_fit(self, final: Path | None) -> None:
        """Raise ConfigError, before weights load, where the data are not for the policy or its reference."""
        config = self.config
        if self.training and config.adapter.name == "none":
            refuse_quantized(self.start.base, config.model)
        models = [("the policy", self.start.base if final is None or holds_adapter(final) else final)]
        reference = reference_source(config)
        if reference is not None:
            name = f"reference.path={config.reference.path}"
            refuse_other_tokens(self.tokenizer, load_tokenizer(reference.tokenizer, config.model), name)
            models.append((name, reference.base))
        for name, folder in models:
            settings = load_config(folder, config.model)
            for dataset in filter(None, (self.datasets.train, self.datasets.evaluation)):
                refuse_rows_beyond(name, settings, dataset, self._sides(dataset))

    @cached_property
    def tracked_positions(self) -> frozenset[int] | None:
        """The held-out examples that have reference log-probs; None: all that this run uses."""
        if self.tracking is not Tracking.SOME or self.datasets.evaluation is None:
            return None
        dataset = self.datasets.evaluation
        return frozenset(smallest_ids(dataset[: self._held_out_count(dataset)], TRACKED))

    @property
    def scores_any_tokens(self) -> bool:
        """Whether the reference is a model at hand, which can score what was not in the data."""
        everything = self.tracking is Tracking.EVERYTHING and self.config.reference.mode == "model"
        return everything and self.heldout.reference is not None

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of what a run that goes on has to find unchanged, by names for people. Collective."""
        config = self.config
        found = {"the training examples": self.datasets.train.fingerprint, **self._split}
        if distributed.is_main():
            memo = Cache(cache_folder(config.reference.cache), log.info).memo
            found["the model it starts from"] = source_hash(self.start, config.seed, memo)
            reference = reference_source(config)
            if reference is not None:
                found["the reference model"] = source_hash(reference, config.seed, memo)
        return distributed.broadcast_object(found)

    def control_pairs(self) -> ControlPairs | None:
        """The pairs that `rc=loop` set aside, scored by the policy with its starting weights. Collective.

        None where it set none aside.
        """
        pairs = self.datasets.control
        return None if pairs is None else ControlPairs(self.config, self.engine, pairs, self.batches_at)

    def prepare_reference(self, say: Say = log.info, stop: Stop = lambda: False) -> None:
        """Set up the reference's log-probs, and check that a starting policy's log-ratios are zero.

        A resumed run calls it before it loads its checkpoint: the policy then still has the weights that it
        started from, and they are the reference. `say` takes lines for the user, on rank 0. Collective.
        Raises Stopped on all ranks where `stop` says on any that the run is to end.
        """
        if self._reference is None:
            return
        data = self._reference_data()
        references = self._reference.prepare(self.engine, data, say, stop)
        self.held_reference = self._reference.held
        if self.config.reference.sync_every:
            refuse_other_parameters(self.config, self.engine, self.held_reference)
        self._reference = None
        for part, reference in zip(data, references):
            forward = self.forward if part.dataset is self.datasets.train else self.heldout
            forward.reference = reference
        starts_equal = self.config.reference.path is None
        if self.training and starts_equal and self.forward.reference is not None:
            batch = self.collate(self.datasets.train, self.rank_microbatches(0)[0])
            check_start(self.engine, self.forward.reference, batch, self.config.train.dtype)

    def _reference_data(self) -> list[ReferenceData]:
        """What the reference scores: of each split the examples that this run uses."""
        data = []
        if self.training and self.tracking is Tracking.EVERYTHING:
            visited = None
            if self.total_steps < self.batches.steps_per_epoch:
                steps = map(self.batches.indices, range(self.total_steps))
                visited = np.unique(np.fromiter(chain.from_iterable(steps), dtype=np.int64))
            data.append(self._data_of("train", self.datasets.train, visited))
        if self.datasets.evaluation is not None:
            dataset = self.datasets.evaluation
            count = self._held_out_count(dataset)
            positions = None if count == len(dataset) else np.arange(count)
            if self.tracked_positions is not None:
                positions = np.array(sorted(self.tracked_positions))
            data.append(self._data_of("held out", dataset, positions))
        return data

    def _held_out_count(self, dataset: PairDataset) -> int:
        """How many held-out examples an evaluation uses: the first ones."""
        limit = self.config.eval.max_examples
        return len(dataset) if limit is None else min(limit, len(dataset))

    def _data_of(self, name: str, dataset: PairDataset, positions: np.ndarray | None) -> ReferenceData:
        everything = np.arange(len(dataset)) if positions is None else positions
        return ReferenceData(
            name,
            dataset,
            self._sides(dataset),
            positions,
            self.layout,
            lambda: self.batches_at(dataset, everything),
            partial=self.tracking is Tracking.SOME,
        )

    def collate(
        self, dataset: PairDataset, indices: list[int], sides: tuple[str, ...] | None = None
    ) -> TokenBatch:
        """A batch on the engine's device, with these sides, or else with those that the objective needs."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        batch = collate_indices(
            dataset, indices, pad, sides=sides or self.objective.sides, layout=self.layout
        )
        return batch.to(self.engine.device)

    def rank_microbatches(self, step: int) -> list[list[int]]:
        """This rank's dataset positions of a step counted from 0, −1 for fillers."""
        ranks = distributed.world_size()
        size = self.config.train.microbatch(ranks)
        indices = self.batches.indices(step)
        if self.config.groups_by_length(self.objective.spec.couples_batch):
            lengths = self._train_row_lengths[indices]
            indices = by_length(indices, lengths, ranks, size, packed=self.layout == "shared")
        return split(indices, distributed.rank(), ranks, size)

    @cached_property
    def _train_row_lengths(self) -> np.ndarray:
        return self._row_lengths(self.datasets.train, self.objective.sides)

    def _row_lengths(self, dataset: PairDataset, sides: tuple[str, ...]) -> np.ndarray:
        return row_lengths(dataset.lengths[:, 0], dataset.response_lengths(sides), self.layout)

    def eval_batches(self, dataset: PairDataset, limit: int | None = None) -> Iterator[TokenBatch]:
        """This rank's share of a dataset, or of its first `limit` examples; see `batches_at`."""
        count = len(dataset) if limit is None else min(limit, len(dataset))
        return self.batches_at(dataset, np.arange(count))

    def _sides(self, dataset: PairDataset) -> tuple[str, ...]:
        return scored_sides(self.objective, dataset)

    def batches_at(self, dataset: PairDataset, positions: np.ndarray) -> Iterator[TokenBatch]:
        """This rank's share of the examples at `positions`, both sides of each, in as many batches as any.

        The longest pairs come first: neighbours in length share a batch.
        """
        sides = self._sides(dataset)
        ranks, size = distributed.world_size(), self.config.eval.batch_size
        longest_first = np.argsort(-self._row_lengths(dataset, sides)[positions], kind="stable")
        positions = positions[longest_first]
        for start in range(0, len(positions), ranks * size):
            part = positions[start : start + ranks * size].tolist()
            for indices in split(part, distributed.rank(), ranks, min(size, math.ceil(len(part) / ranks))):
                yield self.collate(dataset, indices, sides)


def tracking(config: RunConfig, objective: Objective, datasets: Datasets, *, changes: bool) -> Tracking:
    """What is compared with the reference: everything where the loss needs it, else what `track` asks for.

    Left alone, that is everything for the embedded data, and some held-out examples of other data where there
    is something to compare with: a named model, or the start of a policy that `changes`.
    """
    track = config.reference.track
    if objective.needs_reference or track or (track is None and config.data.name == "sums"):
        return Tracking.EVERYTHING
    comparable = datasets.evaluation is not None and (changes or config.reference.path is not None)
    return Tracking.SOME if track is None and comparable else Tracking.NOTHING


def first_day(run_dir: Path) -> str:
    """The day on which a folder's run began, which its template writes as today's date. Collective."""
    day = None
    if distributed.is_main():
        try:
            state = stored_state(run_dir)
        except ConfigError:  # damaged: the trainer reports it
            state = None
        known = None if state is None else state["config"]["data"].get("date")
        day = known or date.today().isoformat()
    return str(distributed.broadcast_object(day))


def record_date(run_dir: Path, day: str) -> None:
    """Write a run's day into its config.yaml, for an evaluation on another one."""
    path = run_dir / CONFIG_FILE
    if path.exists():
        config = load_run_config(path)
        config.data.date = day
        save_run_config(config, path)


def refuse_other_parameters(config: RunConfig, engine: Engine, held: Engine | None) -> None:
    """Raise ConfigError for a reference that cannot follow the policy: it is of another shape."""
    if held is None or held.weight_shapes() != engine.weight_shapes():
        raise ConfigError(
            f"reference.sync_every={config.reference.sync_every} mixes the reference's weights with the "
            f"policy's, and reference.path={config.reference.path} has others; give a model of the same shape"
        )


def refuse_other_split(config: RunConfig, run_dir: Path, datasets: Datasets) -> None:
    """Raise ConfigError where a trained run would be evaluated on pairs that it may have been trained on.

    Held-out data that the evaluation names itself (`data.eval_path`, `data.eval_split`) are as they are.
    """
    state = stored_state(run_dir)
    if state is None:
        return
    data = state["config"]["data"]
    if (config.data.eval_path, config.data.eval_split) != (data["eval_path"], data["eval_split"]):
        return
    known = state["contents"]
    changed = [what for what, content in datasets.split.items() if known.get(what, content) != content]
    if changed:
        raise ConfigError(
            f"run={run_dir}: {' and '.join(changed)} are not those of the run, so it may have been "
            "trained on what would be held out: its data, the seed, or a key of data has changed; restore "
            "them, or name the pairs to evaluate on: data.eval_path=FILE"
        )
