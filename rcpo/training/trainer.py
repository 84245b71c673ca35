"""The training loop: from a loaded session to `final/`.

The optimizer step's loss is Σ w_i ℓ_i / Σ w_i over the global batch, whatever its split into ranks,
accumulation and micro-batches.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rcpo.checkpoint.best import BestStep
from rcpo.checkpoint.read import Checkpoint
from rcpo.checkpoint.resume import (
    find_checkpoint,
    finished_standing,
    other_layout,
    refuse_other_contents,
    shared_inputs,
)
from rcpo.checkpoint.write import CheckpointWriter
from rcpo.config.parsing import save_run_config, to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.method.types import TokenBatch
from rcpo.runs.environment import write_environment
from rcpo.runs.folder import (
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    EVALUATED,
    FINAL,
    FINISHED_FILE,
    checkpoint_folder,
    finished_state,
    locked,
)
from rcpo.runs.inputs import INPUTS
from rcpo.runs.jsonl import clean_row
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.system.distributed import say
from rcpo.system.files import replace_text
from rcpo.system.signals import STOPPED, Stopped, StopRequest
from rcpo.system.text import first_line
from rcpo.training.dynamics import PREVIOUS, StepDynamics
from rcpo.training.export import save_best, save_model
from rcpo.training.metrics import VOTES, StepSums, pair_values
from rcpo.training.objective import restore_objective
from rcpo.training.outlook import Outlook, opening
from rcpo.training.session import Session
from rcpo.training.watch import DivergenceWatch, NonFiniteWatch, tokens_per_winner

log = logging.getLogger(__name__)

USUAL_COLLECTIONS = (700, 10, 10)  # Python's own thresholds; the command line has others while it imports
LAST_ROW = "last_row"  # in finished.json, until the run is evaluated: the last step's row
REFERENCE = "reference"  # the key, in a checkpoint, of the weights of a reference that follows the policy

Evaluate = Callable[[Session], dict[str, Any]]
"""Held-out evaluation of a session's policy: values with names `eval/…`."""
Observe = Callable[[int, Tracker], None]
"""Called with 0 before the first step, then after each one, on all ranks."""
MakeObserver = Callable[[Session, int | None], Observe]
"""Makes one while the policy has its starting weights; gets the step that a resumed run continues after."""


class Trainer:
    """The loop over optimizer steps of a session, with checkpoints; `stop` is asked at each step."""

    def __init__(self, session: Session, stop: StopRequest | None = None) -> None:
        self.session = session
        self.config = session.config
        self.objective = session.objective
        self.engine = session.engine
        self.dynamics = StepDynamics(
            session.config,
            session.objective,
            session.engine,
            session.batches,
            fresh_signals=session.fresh_signals,
            control=session.control_pairs(),
        )
        self.watch = NonFiniteWatch(session.run_dir, session.config.train)
        tokens = tokens_per_winner(session.objective.reduction, session.datasets.train.learned[:, 1])
        self.divergence = DivergenceWatch(session.config, tokens, paired=session.objective.needs_rejected)
        self.checkpoints = CheckpointWriter(session.run_dir, session.config)
        self.best = BestStep(session.config.checkpoint)
        self.inputs = shared_inputs(session.config)
        self.step = 0
        self.outlook = Outlook()
        self.votes = dict.fromkeys(VOTES, 0)  # ranks that gave each in the last step: the same on all of them
        self._stop = stop

    def _batch_weight(self, indices: list[int]) -> float:
        """Σ w_i of a global batch."""
        train = self.session.datasets.train
        lengths = train.learned[indices, 1] if self.objective.spec.token_weighted else 1
        return float((train.weights[indices] * lengths).sum())

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics row, equal on all ranks."""
        began = time.perf_counter()
        session, batches = self.session, self.session.batches
        indices = batches.indices(self.step)
        scale = distributed.world_size() / self._batch_weight(indices)
        micro = session.rank_microbatches(self.step)
        self.dynamics.begin(self.step, len(micro))
        self.step += 1
        self.engine.train()
        sums = StepSums()
        for place, positions in enumerate(micro):
            batch = session.collate(session.datasets.train, positions)
            self._micro_step(batch, scale, place == len(micro) - 1, sums)
        self._vote(sums)
        learning_rate = self.engine.learning_rate
        measured = self.dynamics.end()
        update = self.engine.step()
        means = sums.means(distributed.reduce_sum, distributed.reduce_max, self.engine.device)
        self.votes = {name: int(means.pop(name)) for name in VOTES}
        bad = means.pop("nonfinite") > 0
        if self.objective.state is not None:  # what a step that changed no weight saw does not count
            self.objective.state.step(distributed.reduce_sum, keep=update.applied and not bad)
        self.objective.progress = self.step / session.total_steps
        self._sync_reference()
        bad = bad or not (update.applied or update.rescaled)
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
            "peak_memory_bytes": int(means.pop("peak_memory_bytes")),
            "step_seconds": seconds,
            **means,
            **measured,
        }
        self.watch.judge(bad, row)
        return row | self.watch.metrics()

    def _micro_step(self, batch: TokenBatch, scale: float, last: bool, sums: StepSums) -> None:
        output = self.session.forward(batch, self.dynamics.sketch)
        sums.computed(batch.num_tokens, batch.input_ids.numel())
        pairs = self.dynamics(output)
        if output.count:
            losses = self.objective(pairs) * self.objective.weights(pairs) * scale
            values = pair_values(self.objective, output.pairs)
            self.objective.observe(output.pairs)
            self.watch.keep(batch, output.pairs)
            # a step is left out where its gradient is not finite, so make it that on every rank
            loss = losses.sum() * sums.add(losses / distributed.world_size(), values)
        else:  # fillers alone: the ranks still take the same collective steps
            loss = output.logps.sum() * 0.0
        self.engine.backward(loss, last=last)

    def _sync_reference(self) -> None:
        """Move the reference towards the policy, where it is due. Collective."""
        reference, held = self.config.reference, self.session.held_reference
        if held is not None and reference.sync_every and self.step % reference.sync_every == 0:
            held.follow(self.engine, reference.mixup)

    def _vote(self, sums: StepSums) -> None:
        if self._stop:
            sums.vote("stop")
        if distributed.is_main() and self.checkpoints.clock.due:
            sums.vote("save")
        if self.checkpoints.written:
            sums.vote("written")

    def run(self, tracker: Tracker, evaluate: Evaluate | None, observe: Observe | None = None) -> None:
        """All remaining steps, with evaluations and checkpoints, until a stop signal or the whole end.

        At the end `final/` is written before anything that can fail: evaluation, the last probe, `best/`.
        Whatever ends the run, a checkpoint that is being written is finished.
        """
        every = self.config.eval.every
        row = None
        with self.checkpoints.finishing():
            if observe is not None and self.step == 0:
                observe(0, tracker)
            gc.freeze()  # what was loaded stays
            gc.set_threshold(*USUAL_COLLECTIONS)
            self.checkpoints.clock.start()
            while not self.finished and not self.stopping:
                row = self.train_step()
                if (ahead := self.outlook.after(row, self.session.total_steps - self.step)) is not None:
                    tracker.message(ahead)
                for line in self.divergence.look(row):
                    tracker.warning(line)
                if self.finished:
                    break
                improved = bool(every and self.step % every == 0) and self._evaluate(tracker, evaluate)
                if (self.step - 1) % self.config.log.every == 0:
                    tracker.log(row)
                if observe is not None:
                    observe(self.step, tracker)
                if self.votes["written"] == distributed.world_size():
                    self.checkpoints.finish()
                if improved or self._save_due():
                    self.save(tracker)
            if self.finished:
                self._conclude(row, tracker, evaluate, observe)

    def _evaluate(self, tracker: Tracker, evaluate: Evaluate | None) -> bool:
        """A held-out evaluation after this step; returns whether it is the best so far."""
        if evaluate is None:
            return False
        self.engine.eval()
        values = evaluate(self.session)
        tracker.evaluation(self.step, values)
        return self.best.improved(self.step, values)

    def _conclude(
        self,
        row: dict[str, Any] | None,
        tracker: Tracker,
        evaluate: Evaluate | None,
        observe: Observe | None,
    ) -> None:
        """The end: weights, then evaluation. `row` is the last step's, None where it was logged before.

        Raises RunError, with the command that evaluates again, where anything but the weights fails.
        """
        self.save_final(row)
        try:
            self.checkpoints.finish()  # best/ may be made of it, should the run be killed from here on
            try:
                improved = self._evaluate(tracker, evaluate)
            finally:
                if row is not None:
                    tracker.log(row)
            if observe is not None and row is not None:
                observe(self.step, tracker)
            if row is not None and (improved or self._save_due()):
                self.save(tracker)
            self.checkpoints.finish()
            write_best(self.session, self.best, self.step, tracker.message)
        except Exception as error:
            raise RunError(unevaluated(self.session.run_dir, error)) from error
        self._write_finished(evaluated=True)

    def _save_due(self) -> bool:
        every = self.config.checkpoint.every
        if self.votes["save"] or (every and self.step % every == 0):
            return True
        return self.stopping and not self.finished

    @property
    def stopping(self) -> bool:
        """Whether some rank was asked to stop."""
        return self.votes["stop"] > 0

    @property
    def finished(self) -> bool:
        return self.step >= self.session.total_steps

    def save(self, tracker: Tracker) -> None:
        """Start to save a checkpoint after this step; its metrics are on disk before. Collective."""
        tracker.flush()
        held, synced = self.session.held_reference, self.config.reference.sync_every
        shares = held.shares(REFERENCE) if held is not None and synced else {}
        self.checkpoints.save(
            self.engine, self.state_dict(), self.best.steps, self.dynamics.tensors(), shares
        )

    def state_dict(self) -> dict[str, Any]:
        """What is not in the engine, ready for JSON; the same on all ranks."""
        state = self.objective.state
        return {
            "step": self.step,
            "examples_seen": self.session.batches.examples_seen(self.step),
            "contents": self.session.contents,
            "world_size": distributed.world_size(),
            "config": to_container(self.config),
            "dynamics": self.dynamics.state_dict(),
            "progress": self.objective.progress,
            "objective": None if state is None else state.state_dict(),
            "nonfinite": self.watch.state_dict(),
            "divergence": self.divergence.state_dict(),
            "best": self.best.state_dict(),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint of the same data and models. Collective."""
        checkpoint.load(self.engine)
        state = checkpoint.state
        self.step = state["step"]
        held, before = self.session.held_reference, state["config"]
        if held is not None and self.config.reference.sync_every and before["reference"].get("sync_every"):
            held.take_shares(checkpoint.tensors, REFERENCE)  # else it has not moved so far
        self.dynamics.load_state_dict(state["dynamics"], checkpoint.extra(PREVIOUS), before["rc"])
        restore_objective(self.objective, state)
        self.objective.progress = min(1.0, self.step / self.session.total_steps)  # which may have changed
        self.watch.load_state_dict(state["nonfinite"])
        self.divergence.load_state_dict(state["divergence"])
        self.best.load_state_dict(state["best"])

    def save_final(self, row: Mapping[str, Any] | None = None) -> None:
        """`final/`; the run is then trained, though not evaluated. Collective."""
        save_model(self.session, FINAL)
        self._write_finished(evaluated=False, row=row)

    def _write_finished(self, *, evaluated: bool, row: Mapping[str, Any] | None = None) -> None:
        """Record that the run is trained; `row` waits for the last evaluation. Collective."""
        last = None if row is None else clean_row(row)
        state = {**self.state_dict(), INPUTS: self.inputs, LAST_ROW: last}
        write_finished(self.session.run_dir, state, evaluated=evaluated)


def write_finished(run_dir: Path, state: dict[str, Any], *, evaluated: bool) -> None:
    """Rank 0 writes the state of a trained run. Collective."""
    if distributed.is_main():
        text = json.dumps({**state, EVALUATED: evaluated}, allow_nan=False)
        replace_text(run_dir / FINISHED_FILE, text + "\n")
    distributed.barrier()


def unevaluated(run_dir: Path, error: Exception) -> str:
    """The message for a trained run whose last evaluation, probe or best/ failed."""
    where = shlex.quote(f"run={run_dir}")
    return (
        f"training is over and the weights are in {run_dir / FINAL}, but what comes after it failed: "
        f"{type(error).__name__}: {first_line(error)}. Evaluate again: rcpo evaluate {where}"
    )


def train(
    config: RunConfig,
    run_dir: Path,
    evaluate: Evaluate | None = None,
    make_observer: MakeObserver | None = None,
) -> int:
    """Run, or continue, a configuration in its folder; return the process's exit code.

    Raises ConfigError for a folder in use or a checkpoint of another run, RunError for what ends a run.
    """
    distributed.initialize()
    with StopRequest() as stop, alone_in(run_dir):
        if distributed.is_main():  # another command may have written its own before this one had the lock
            save_run_config(config, run_dir / CONFIG_FILE)
        finished = None if config.resume is None else finished_standing(config, run_dir)
        if finished is not None and not finished.trained:
            _complete(config, run_dir, finished.evaluated, evaluate)
            return 0
        checkpoint = find_checkpoint(config, run_dir)
        session = _load(config, run_dir, checkpoint)
        if finished is not None and distributed.is_main():  # another run from here on, which can start
            (run_dir / FINISHED_FILE).unlink(missing_ok=True)
        step, is_main = None if checkpoint is None else checkpoint.step, distributed.is_main()
        with Tracker(run_dir, config, session.total_steps, is_main, resume_step=step) as tracker:
            try:
                trainer, observe = _prepare(session, checkpoint, tracker, make_observer, stop)
                trainer.run(tracker, evaluate, observe)
                if not trainer.finished:
                    raise Stopped(f"stopped after step {trainer.step}; resume={run_dir} continues")
            except Stopped as stopped:
                tracker.message(str(stopped))
                tracker.close(STOPPED)
                return STOPPED
    return 0


def _complete(config: RunConfig, run_dir: Path, differences: list[str], evaluate: Evaluate | None) -> None:
    """A run whose training is over: evaluates its weights where that failed or was done otherwise."""
    if not differences or evaluate is None:
        say(f"the run in {run_dir} is complete: there is nothing to continue")
        return
    say(f"the run in {run_dir} is trained; its weights are evaluated again: {'; '.join(differences)}")
    state = distributed.broadcast_object(finished_state(run_dir))
    state |= {"config": to_container(config), INPUTS: shared_inputs(config)}
    write_finished(run_dir, state, evaluated=False)
    try:
        session = Session(config, run_dir, training=False, final=run_dir / FINAL)
        session.prepare_reference(say)
        restore_objective(session.objective, state)
        values = evaluate(session)
        if state.get(LAST_ROW) is not None:
            state |= _catch_up(session, state, values)
    except Exception as error:
        raise RunError(unevaluated(run_dir, error)) from error
    write_finished(run_dir, state, evaluated=True)


def _catch_up(session: Session, state: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Write what a run that ended in its last evaluation lacks: that step's row, and `best/`. Collective.

    Return what changes in its state.
    """
    step, best = state["step"], BestStep(session.config.checkpoint)
    best.load_state_dict(state["best"])
    best.improved(step, values)
    is_main = distributed.is_main()
    with Tracker(session.run_dir, session.config, step, is_main, resume_step=step - 1) as tracker:
        tracker.evaluation(step, values)
        tracker.log(state[LAST_ROW])
        write_best(session, best, step, tracker.message)
    return {"best": best.state_dict(), LAST_ROW: None}


def write_best(session: Session, best: BestStep, step: int, tell: Callable[[str], None]) -> None:
    """Write `best/`, where `checkpoint.best` is set; the policy has the weights after `step`. Collective."""
    if best.step is not None:
        checkpoint = checkpoint_folder(session.run_dir, best.step)
        problem = save_best(session, checkpoint, best.step == step)
        tell(f"best/ is step {best.step}, with {best}" if problem is None else problem)


def _load(config: RunConfig, run_dir: Path, checkpoint: Checkpoint | None) -> Session:
    """Load data and models, and record both and the environment; raise ConfigError for another run's."""
    session = Session(config, run_dir, training=True)
    log.info("hashed now, for a checkpoint may be in a hurry: %s", session.contents)
    if checkpoint is not None:
        refuse_other_contents(
            checkpoint, session.contents, config, couples_batch=session.objective.spec.couples_batch
        )
    if distributed.is_main():
        write_environment(run_dir / ENVIRONMENT_FILE, resumed=checkpoint is not None)
        report = json.dumps(session.datasets.report.as_dict(), indent=2)
        replace_text(run_dir / DATA_FILE, report + "\n")
    return session


def _prepare(
    session: Session,
    checkpoint: Checkpoint | None,
    tracker: Tracker,
    make_observer: MakeObserver | None,
    stop: StopRequest,
) -> tuple[Trainer, Observe | None]:
    """Compute the reference and restore the checkpoint; raise Stopped on all ranks where one is asked to."""
    for line in session.datasets.report.lines():
        tracker.message(line)
    if session.config.train.micro_batch_size is None:
        ranks = distributed.world_size()
        size, parts = session.config.train.microbatch(ranks), session.config.train.accumulation(ranks)
        tracker.message(f"train.micro_batch_size=null: {size} pairs per process, {parts} times per step")
    if any(distributed.gather_objects(bool(stop))):
        raise Stopped("stopped before the first step")
    session.prepare_reference(tracker.message, stop.__bool__)
    resume_step = None if checkpoint is None else checkpoint.step
    observe = None if make_observer is None else make_observer(session, resume_step)
    trainer = Trainer(session, stop)
    if checkpoint is not None:  # only now: the reference is the policy that training started from
        trainer.resume(checkpoint)
        if (layout := other_layout(checkpoint, session.config)) is not None:
            tracker.message(layout)
        tracker.message(f"continues after step {trainer.step}, from {checkpoint.folder}")
    batches, train = session.batches, session.datasets.train
    size, steps = session.config.train.batch_size, session.total_steps
    tracker.message(opening(train.lengths, size, steps, batches.steps_per_epoch))
    return trainer, observe


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
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
