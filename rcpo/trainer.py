"""The training loop: from a loaded session to `final/`.

The optimizer step's loss is Σ w_i ℓ_i / Σ w_i over the global batch, whatever its split into ranks,
accumulation and micro-batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rcpo import distributed
from rcpo.config import RunConfig
from rcpo.dynamics import StepDynamics
from rcpo.metrics import StepSums, pair_values, peak_memory
from rcpo.session import Session
from rcpo.tracking import Tracker, write_environment
from rcpo.tracking.jsonl import replace_text
from rcpo.types import TokenBatch

Evaluate = Callable[[Session], dict[str, Any]]
"""Held-out evaluation of a session's policy: values with names `eval/…`."""


class Trainer:
    """The loop over optimizer steps of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.objective = session.objective
        self.engine = session.engine
        self.dynamics = StepDynamics(session.config, session.objective, session.engine)
        self.step = 0

    def _batch_weight(self, indices: list[int]) -> float:
        """Σ w_i of a global batch."""
        if not self.objective.spec.token_weighted:
            return float(len(indices))
        return float(self.session.datasets.train.lengths[indices, 1].sum())

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics row, equal on all ranks."""
        began = time.perf_counter()
        session, batches = self.session, self.session.batches
        indices = batches.indices(self.step)
        scale = distributed.world_size() / self._batch_weight(indices)
        micro = session.rank_microbatches(self.step)
        self.step += 1
        self.engine.train()
        self.dynamics.begin(self.step)
        sums = StepSums()
        for place, positions in enumerate(micro):
            batch = session.collate(session.datasets.train, positions)
            self._micro_step(batch, scale, place == len(micro) - 1, sums)
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
            "epoch": self.step / batches.steps_per_epoch,
            "examples_seen": batches.examples_seen(self.step),
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
        scored = self.session.scorer(batch, self.dynamics.sketch)
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
        while self.step < self.session.total_steps:
            row = self.train_step()
            finished = self.step == self.session.total_steps
            if evaluate is not None and (finished or (every and self.step % every == 0)):
                self.engine.eval()
                tracker.evaluation(self.step, evaluate(self.session))
            if finished or (self.step - 1) % self.config.log.every == 0:
                tracker.log(row)

    def save_final(self) -> None:
        """`final/`: weights and tokenizer in the hub's format, loadable with transformers alone."""
        weights = self.engine.state_dict()
        if distributed.is_main():
            folder = self.session.run_dir / "final"
            self.engine.policy.model.save_pretrained(folder, state_dict=weights)
            self.session.tokenizer.save_pretrained(folder)
        distributed.barrier()


def train(config: RunConfig, run_dir: Path, evaluate: Evaluate | None = None) -> int:
    """Runs a configuration in its folder; returns the process's exit code."""
    distributed.initialize()
    session = Session(config, run_dir, training=True)
    if distributed.is_main():
        write_environment(run_dir / "environment.json")
        report = json.dumps(session.datasets.report.as_dict(), indent=2)
        replace_text(run_dir / "data.json", report + "\n")
    with Tracker(run_dir, config, session.total_steps, distributed.is_main()) as tracker:
        for line in session.datasets.report.lines():
            tracker.message(line)
        session.prepare_reference(tracker.message)
        trainer = Trainer(session)
        trainer.run(tracker, evaluate)
        trainer.save_final()
    return 0
