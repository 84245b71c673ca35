"""The training loop: from a loaded session to `final/`.

The optimizer step's loss is Σ w_i ℓ_i / Σ w_i over the global batch, whatever its split into ranks,
accumulation and micro-batches.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from rcpo import distributed
from rcpo.checkpoint import Checkpoint, Checkpoints
from rcpo.config import ConfigError, RunConfig, to_container
from rcpo.config.changes import changes, refuse_changes, refuse_other_run
from rcpo.divergence import DivergenceWatch
from rcpo.dynamics import StepDynamics
from rcpo.metrics import StepSums, pair_values, peak_memory
from rcpo.nonfinite import NonFiniteWatch
from rcpo.runfolder import FINISHED_FILE, finished_state, locked
from rcpo.session import Session
from rcpo.signals import STOPPED, StopRequest
from rcpo.start import MERGED, write_merged
from rcpo.tracking import Tracker, write_environment
from rcpo.tracking.jsonl import replace_text
from rcpo.types import TokenBatch

FINAL = "final"

log = logging.getLogger(__name__)

Evaluate = Callable[[Session], dict[str, Any]]
"""Held-out evaluation of a session's policy: values with names `eval/…`."""


class Trainer:
    """The loop over optimizer steps of a session, with checkpoints; `stop` is asked at each step."""

    def __init__(self, session: Session, stop: StopRequest | None = None) -> None:
        self.session = session
        self.config = session.config
        self.objective = session.objective
        self.engine = session.engine
        self.dynamics = StepDynamics(session.config, session.objective, session.engine)
        self.watch = NonFiniteWatch(session.run_dir, session.config.train)
        tokens = float(session.datasets.train.lengths[:, 1].mean())
        self.divergence = DivergenceWatch(session.config, tokens)
        self.checkpoints = Checkpoints(session.run_dir, session.config.checkpoint.keep)
        self.step = 0
        self.stopping = False  # some rank was asked to stop: the same on all of them
        self._stop = stop

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
        if self._stop:
            sums.ask_to_stop()
        means = sums.means(distributed.reduce_sum)
        self.stopping = means.pop("stop") > 0
        bad = means.pop("nonfinite") > 0
        if self.objective.state is not None:
            self.objective.state.step(distributed.reduce_sum, keep=not bad)
        learning_rate = self.engine.learning_rate
        measured = self.dynamics.end()
        update = self.engine.step()
        bad = bad or not (update.applied or self.config.train.dtype == "fp16")
        seconds = time.perf_counter() - began
        tokens = means.pop("real_tokens")
        means.pop("pairs")
        row = {
            "step": self.step,
            "epoch": self.step / batches.steps_per_epoch,
            "examples_seen": batches.examples_seen(self.step),
            "loss": means.pop("loss"),
            "learning_rate": learning_rate,
            "grad_norm": update.grad_norm if update.applied else None,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": int(distributed.reduce_max(torch.tensor(float(peak_memory())))),
            "step_seconds": seconds,
            **means,
            **measured,
        }
        self.watch.judge(bad, row)
        return row | self.watch.metrics()

    def _micro_step(self, batch: TokenBatch, scale: float, last: bool, sums: StepSums) -> None:
        scored = self.session.scorer(batch, self.dynamics.sketch)
        sums.computed(batch.num_tokens, batch.input_ids.numel())
        pairs = self.dynamics(scored)
        if scored.count:
            losses = self.objective(pairs) * self.objective.weights(pairs) * scale
            values = pair_values(self.objective, scored.pairs)
            self.objective.observe(scored.pairs)
            self.watch.keep(batch, scored.pairs)
            finite = sums.add(losses / distributed.world_size(), values)
            # a step is left out where its gradient is not finite, so make it that on every rank
            loss = losses.sum() if finite else losses.sum() * math.nan
        else:  # fillers alone: the ranks still take the same collective steps
            loss = scored.logps.sum() * 0.0
        self.engine.backward(loss, last=last)

    def run(self, tracker: Tracker, evaluate: Evaluate | None) -> None:
        """All remaining steps, with evaluations and checkpoints, until the end or a stop signal."""
        every, save_every = self.config.eval.every, self.config.checkpoint.every
        while self.step < self.session.total_steps and not self.stopping:
            row = self.train_step()
            for line in self.divergence.look(row):
                tracker.warning(line)
            finished = self.step == self.session.total_steps
            if evaluate is not None and (finished or (every and self.step % every == 0)):
                self.engine.eval()
                tracker.evaluation(self.step, evaluate(self.session))
            if finished or (self.step - 1) % self.config.log.every == 0:
                tracker.log(row)
            if (self.stopping and not finished) or (save_every and self.step % save_every == 0):
                self.save(tracker)

    @property
    def finished(self) -> bool:
        return self.step >= self.session.total_steps

    def save(self, tracker: Tracker) -> Path:
        """Saves a checkpoint after this step; its metrics are on disk before. Collective."""
        tracker.flush()
        return self.checkpoints.save(self.engine, self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed's shards do not hold, ready for JSON; the same on all ranks."""
        state, data = self.objective.state, self.session.datasets.train
        return {
            "step": self.step,
            "examples_seen": self.session.batches.examples_seen(self.step),
            "data": data.fingerprint,
            "world_size": distributed.world_size(),
            "config": to_container(self.config),
            "dynamics": self.dynamics.state_dict(),
            "objective": None if state is None else state.state_dict(),
            "nonfinite": self.watch.state_dict(),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues after a checkpoint. Collective; raises ConfigError where the data are others."""
        state = checkpoint.state
        if state["data"] != self.session.datasets.train.fingerprint:
            found = ["the training examples (by their content)"]
            refuse_changes(found, str(checkpoint.folder), self.config)
        checkpoint.load(self.engine)
        self.step = state["step"]
        self.dynamics.load_state_dict(state["dynamics"])
        if self.objective.state is not None and state["objective"] is not None:
            self.objective.state.load_state_dict(state["objective"])
        self.watch.load_state_dict(state["nonfinite"])

    def save_final(self) -> None:
        """`final/`: weights, or the adapter, and tokenizer in the hub's format, which transformers loads."""
        weights = self.engine.state_dict()
        if distributed.is_main():
            final = self.session.run_dir / FINAL
            scratch = final.with_name(f".{FINAL}.new")
            shutil.rmtree(scratch, ignore_errors=True)
            self.engine.policy.model.save_pretrained(scratch, state_dict=weights)
            self.session.tokenizer.save_pretrained(scratch)
            if self.config.adapter.save_merged:
                write_merged(self.session.start.base, scratch, scratch / MERGED, self.config)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            state = json.dumps(self.state_dict(), allow_nan=False)
            replace_text(self.session.run_dir / FINISHED_FILE, state + "\n")
        distributed.barrier()


def train(config: RunConfig, run_dir: Path, evaluate: Evaluate | None = None) -> int:
    """Runs, or continues, a configuration in its folder; returns the process's exit code.

    Raises ConfigError for a folder in use or a checkpoint of another run, RunError for what ends a run.
    """
    distributed.initialize()
    with StopRequest() as stop, _alone_in(run_dir):
        if config.resume is not None and is_complete(config, run_dir):
            _say(f"the run in {run_dir} is complete: there is nothing to continue")
            return 0
        checkpoint = find_checkpoint(config, run_dir)
        session = Session(config, run_dir, training=True)
        if distributed.is_main():
            write_environment(run_dir / "environment.json")
            report = json.dumps(session.datasets.report.as_dict(), indent=2)
            replace_text(run_dir / "data.json", report + "\n")
        resume_step = None if checkpoint is None else checkpoint.step
        is_main, total = distributed.is_main(), session.total_steps
        with Tracker(run_dir, config, total, is_main, resume_step=resume_step) as tracker:
            for line in session.datasets.report.lines():
                tracker.message(line)
            session.prepare_reference(tracker.message)
            trainer = Trainer(session, stop)
            if checkpoint is not None:  # only now: the reference is the policy that training started from
                trainer.resume(checkpoint)
                tracker.message(f"continues after step {trainer.step}, from {checkpoint.folder}")
            trainer.run(tracker, evaluate)
            if not trainer.finished:
                tracker.message(f"stopped after step {trainer.step}; resume={run_dir} continues")
                tracker.close(STOPPED)
                return STOPPED
            trainer.save_final()
    return 0


def is_complete(config: RunConfig, run_dir: Path) -> bool:
    """Whether the folder's run came to its end as configured. Collective.

    Raises ConfigError where it ended otherwise and left no checkpoint to go on from.
    """
    state = distributed.broadcast_object(finished_state(run_dir))
    if state is None:
        return False
    found = changes(state["config"], config)
    if found and not Checkpoints(run_dir, config.checkpoint.keep).exist():
        raise ConfigError(
            f"resume={config.resume}: the run in {run_dir} came to its end and left no checkpoint to go on "
            f"from with {'; '.join(found)}"
        )
    return not found


def find_checkpoint(config: RunConfig, run_dir: Path) -> Checkpoint | None:
    """The verified checkpoint that a run continues from; None for a fresh start. Collective.

    Raises ConfigError where it belongs to a run of another configuration, number of processes or stage, and
    where a fresh run would write over it.
    """
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep)
    if config.resume is None:
        if checkpoints.exist():
            raise ConfigError(f"{run_dir} holds checkpoints; resume=auto continues them")
        return None
    checkpoint = checkpoints.newest(_warn)
    if checkpoint is not None:
        refuse_other_run(checkpoint.state, str(checkpoint.folder), config, distributed.world_size())
    return checkpoint


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Rank 0 holds the folder's lock; raises ConfigError on all ranks where another run has it."""
    with ExitStack() as stack:
        problem = None
        if distributed.is_main():
            try:
                stack.enter_context(locked(run_dir))
            except ConfigError as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)
        if problem is not None:
            raise ConfigError(problem)
        yield


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _warn(line: str) -> None:
    if distributed.is_main():
        log.warning(line)
