"""The training loop: from a configuration and a run folder to `final/`.

The optimizer step's loss is Σ w_i ℓ_i / Σ w_i over the global batch, whatever its split into ranks,
accumulation and micro-batches.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rcpo import distributed
from rcpo.config import ConfigError, RunConfig
from rcpo.data.batches import GlobalBatches, split
from rcpo.data.collate import collate_indices
from rcpo.data.dataset import Datasets, load_datasets
from rcpo.data.store import PairDataset
from rcpo.dynamics import StepDynamics
from rcpo.engine import Engine
from rcpo.metrics import StepSums, pair_values, peak_memory
from rcpo.models import DTYPES, Policy, check_head, load_model, load_tokenizer, model_path
from rcpo.objectives import Objective, get_objective
from rcpo.reference import Reference, StoredReference
from rcpo.scoring import Scorer
from rcpo.tracking import Tracker
from rcpo.types import TokenBatch

Evaluate = Callable[["Trainer", int], dict[str, Any]]
"""Held-out evaluation after a step: values with names `eval/…`."""


class Trainer:
    """One run: everything that is loaded, and the loop over optimizer steps."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self.objective = build_objective(config)
        distributed.seed_everything(config.seed, deterministic=config.launch.deterministic)
        path = model_path(config.model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        self.datasets: Datasets = load_datasets(config.data, self.tokenizer, config.seed)
        self.accumulation = config.train.accumulation(distributed.world_size())
        self.batches = GlobalBatches(len(self.datasets.train), config.train.batch_size, config.seed)
        self.total_steps = config.train.max_steps or config.train.epochs * self.batches.steps_per_epoch
        policy = Policy(load_model(path, DTYPES[config.train.dtype]))
        check_head(policy, torch.device("cpu"))
        if config.train.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        frozen = self._frozen_model(policy, path)
        self.engine = Engine(policy, config, self.total_steps)
        self.scorer = Scorer(self.engine, self.objective, None)
        self.heldout = Scorer(self.engine, self.objective, None)
        self.dynamics = StepDynamics(config, self.objective, self.engine)
        self._frozen = frozen
        self.step = 0

    # --- the reference ---------------------------------------------------------------------------------------

    @property
    def tracks_reference(self) -> bool:
        """Whether log-ratios are wanted where the objective itself needs no reference."""
        track = self.config.reference.track
        return self.config.data.name == "sums" if track is None else track

    def _frozen_model(self, policy: Policy, path: str) -> Policy | None:
        """A reference policy of its own, where one is held or read from another folder; else None."""
        reference = self.config.reference
        if not (self.objective.needs_reference or self.tracks_reference):
            return None
        if reference.path is None and reference.mode == "precompute":
            return None
        if reference.path is None:
            return Policy(copy.deepcopy(policy.model).requires_grad_(False))
        return Policy(load_model(reference.path, DTYPES[self.config.train.dtype]).requires_grad_(False))

    def prepare_reference(self) -> None:
        """Sets up the reference's log-probs, and checks that a starting policy's log-ratios are zero."""
        if not (self.objective.needs_reference or self.tracks_reference):
            return
        engine = self.engine if self._frozen is None else Engine(self._frozen, self.config)
        engine.eval()

        def score(batch: TokenBatch) -> torch.Tensor:
            with torch.no_grad():
                return engine.score(batch)[0].detach()

        if self.config.reference.mode == "precompute":
            self.scorer.reference = self._precompute(self.datasets.train, score)
            self.heldout.reference = self._precompute(self.datasets.evaluation, score)
            self._frozen = None
        else:
            self.scorer.reference = self.heldout.reference = score
        if self.config.reference.path is None:
            self._check_start()

    def _precompute(self, dataset: PairDataset, score: Reference) -> Reference:
        """A dataset's log-probs, each rank its share, then shared."""
        store = StoredReference()
        for batch in self.eval_batches(dataset):
            store.add(batch, score(batch))
        store.merge(distributed.gather_objects(store))
        return store

    def _check_start(self) -> None:
        """|u| a token < 1e-5 in fp32 where the reference is the starting policy: else nothing is comparable."""
        if self.config.train.dtype != "fp32":
            return
        with torch.no_grad():
            batch = self.collate(self.datasets.train, self.rank_microbatches(0)[0])
            assert self.scorer.reference is not None
            difference = (self.engine.score(batch)[0] - self.scorer.reference(batch)).abs()
        real = batch.weights.bool()[batch.sequences % batch.num_pairs]
        worst = float(distributed.reduce_max((difference * real).max()))
        if not worst < 1e-5:
            raise RuntimeError(
                f"policy and reference are the same weights, yet a token's log-probs differ by {worst:.2g} "
                "(< 1e-5 expected): dropout, masks or dtype differ between the two"
            )

    # --- batches ---------------------------------------------------------------------------------------------

    def collate(self, dataset: PairDataset, indices: list[int]) -> TokenBatch:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return collate_indices(dataset, indices, pad, sides=self.objective.sides).to(self.engine.device)

    def rank_microbatches(self, step: int) -> list[list[int]]:
        """This rank's dataset positions of a step counted from 0, −1 for fillers."""
        size = self.config.train.micro_batch_size
        return split(self.batches.indices(step), distributed.rank(), distributed.world_size(), size)

    def eval_batches(self, dataset: PairDataset, limit: int | None = None) -> Iterator[TokenBatch]:
        """This rank's share of a dataset in order; all ranks get equally many batches."""
        count = len(dataset) if limit is None else min(limit, len(dataset))
        ranks, size = distributed.world_size(), self.config.eval.batch_size
        for start in range(0, count, ranks * size):
            part = list(range(start, min(start + ranks * size, count)))
            for indices in split(part, distributed.rank(), ranks, min(size, math.ceil(len(part) / ranks))):
                yield self.collate(dataset, indices)

    def _batch_weight(self, indices: list[int]) -> float:
        """Σ w_i of a global batch."""
        if not self.objective.spec.token_weighted:
            return float(len(indices))
        return float(self.datasets.train.lengths[indices, 1].sum())

    # --- the loop --------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics row, equal on all ranks."""
        began = time.perf_counter()
        indices = self.batches.indices(self.step)
        scale = distributed.world_size() / self._batch_weight(indices)
        micro = self.rank_microbatches(self.step)
        self.step += 1
        self.engine.train()
        self.dynamics.begin(self.step)
        sums = StepSums()
        for place, positions in enumerate(micro):
            self._micro_step(self.collate(self.datasets.train, positions), scale, place == len(micro) - 1, sums)
        if self.objective.state is not None:
            self.objective.state.step(distributed.reduce_sum)
        learning_rate = self.engine.learning_rate
        means = sums.means(distributed.reduce_sum)
        measured = self.dynamics.end()
        norm = self.engine.step()
        seconds = time.perf_counter() - began
        tokens = means.pop("real_tokens")
        means.pop("pairs")
        return {
            "step": self.step,
            "epoch": self.step / self.batches.steps_per_epoch,
            "examples_seen": self.batches.examples_seen(self.step),
            "loss": means.pop("loss"),
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": int(distributed.reduce_max(torch.tensor(float(peak_memory())))),
            "step_seconds": seconds,
            **means,
            **measured,
        }

    def _micro_step(self, batch: TokenBatch, scale: float, last: bool, sums: StepSums) -> None:
        scored = self.scorer(batch, self.dynamics.sketch)
        pairs = self.dynamics(scored)
        if scored.count:
            losses = self.objective(pairs) * self.objective.weights(pairs) * scale
            values = pair_values(self.objective, scored.pairs)
            self.objective.observe(scored.pairs)
            sums.add(losses / distributed.world_size(), values, batch.num_tokens, batch.input_ids.numel())
            loss = losses.sum()
        else:  # fillers alone: the ranks still take the same collective steps
            loss = scored.logps.sum() * 0.0
        self.engine.backward(loss, last=last)

    def run(self, tracker: Tracker, evaluate: Evaluate | None) -> None:
        """All remaining steps, with evaluations in between and at the end."""
        every = self.config.eval.every
        while self.step < self.total_steps:
            row = self.train_step()
            finished = self.step == self.total_steps
            if evaluate is not None and (finished or (every and self.step % every == 0)):
                self.engine.eval()
                tracker.evaluation(self.step, evaluate(self, self.step))
            if finished or (self.step - 1) % self.config.log.every == 0:
                tracker.log(row)

    def save_final(self) -> None:
        """`final/`: weights and tokenizer in the hub's format, loadable with transformers alone."""
        weights = self.engine.state_dict()
        if distributed.is_main():
            folder = self.run_dir / "final"
            self.engine.policy.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
        distributed.barrier()


def build_objective(config: RunConfig) -> Objective:
    """The objective of a configuration; refuses calibration where it has no rejected side."""
    settings = config.objective
    try:
        objective = get_objective(
            settings.name,
            reduction=settings.reduction,
            nll_coef=settings.nll_coef,
            module=settings.module,
            **settings.hyperparameters,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"objective={settings.name}: {error}") from error
    if config.rc.enabled and not objective.needs_rejected:
        raise ConfigError(f"rc=on needs a rejected side; objective={settings.name} has none: use rc=off")
    return objective


def train(config: RunConfig, run_dir: Path, evaluate: Evaluate | None = None) -> int:
    """Runs a configuration in its folder; returns the process's exit code."""
    distributed.initialize()
    trainer = Trainer(config, run_dir)
    with Tracker(run_dir, config, trainer.total_steps, distributed.is_main()) as tracker:
        for line in trainer.datasets.report.lines():
            tracker.message(line)
        trainer.prepare_reference()
        trainer.run(tracker, evaluate)
        trainer.save_final()
    return 0
