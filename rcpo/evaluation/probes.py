"""A fixed set of examples followed through training: what each winner and loser does, where the mass goes.

Rows go to probes.parquet, some answers to samples.jsonl and wandb. `*_mass` is the policy's log-prob of a
whole answer, in nats: of the chosen and the rejected, of its own greedy answer and of the one that it gave
before training. If winner and loser both fall, the mass went elsewhere, and the greedy answers say where.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcpo.data.identity import example_id, smallest_ids
from rcpo.data.store import PairDataset
from rcpo.evaluation.answers import answer, answer_logps, decoding_of, policy_logps, text_of
from rcpo.evaluation.checkers import checker_of
from rcpo.evaluation.generation import Generated, repetition
from rcpo.evaluation.kl import seed_of
from rcpo.evaluation.probe_file import ProbeFile
from rcpo.method.incentives import incentives
from rcpo.method.logps import sequence_logps
from rcpo.runs.folder import PROBES_FILE, SAMPLES_FILE
from rcpo.runs.jsonl import JsonLines, truncate_after
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training.forward import PairOutput
from rcpo.training.session import Session

log = logging.getLogger(__name__)
Row = dict[str, Any]


class Probe:
    """Measures the probe examples when it is called with a step; every rank makes one and calls it.

    Made while the policy has its starting weights, also in a resumed run: its greedy answers of that moment
    are followed too. `resume_step` is the step that a resumed run continues after, None for a fresh one.
    """

    def __init__(self, session: Session, resume_step: int | None) -> None:
        self._session = session
        self._config = session.config.probe
        held_out = session.datasets.evaluation
        self._dataset = session.datasets.train if held_out is None else held_out
        self._split = "train" if held_out is None else "held out"
        self._forward = session.forward if held_out is None else session.heldout
        self._positions = probe_positions(session, self._dataset, self._config.size)
        self._examples = [self._dataset[position] for position in self._positions]
        self._ids = [example_id(example) for example in self._examples]
        self._prompts = [example.prompt for example in self._examples]
        self._decoding = decoding_of(session, self._dataset)
        session.engine.eval()
        self._first = self._answers() if self._config.generate_every else ([], [])
        self._file: ProbeFile | None = None
        self._samples: JsonLines | None = None
        if distributed.is_main():
            self._file = ProbeFile(session.run_dir / PROBES_FILE, resume_step)
            self._samples = _open_samples(session.run_dir / SAMPLES_FILE, resume_step)

    def __call__(self, step: int, tracker: Tracker) -> None:
        """Measure where this step is due, or is the last one. Collective."""
        last = step == self._session.total_steps
        if not last and step % self._config.every:
            return
        self._session.engine.eval()
        measured = self._measure()
        every = self._config.generate_every
        if every and (last or step % every == 0):
            self._generate(step, measured, tracker)
        if self._file is not None:
            rows = [
                {"step": step, "example_id": identity, "split": self._split, **measured[position]}
                for identity, position in zip(self._ids, self._positions, strict=True)
            ]
            self._file.add(rows)

    def _measure(self) -> dict[int, Row]:
        """Log-probs, log-ratios, incentives and masses, by dataset position; all of them on every rank."""
        found: dict[int, Row] = {}
        for batch in self._session.batches_at(self._dataset, np.asarray(self._positions)):
            with torch.no_grad():
                output = self._forward(batch)
            found |= self._columns(output)
        return {place: row for part in distributed.gather_objects(found) for place, row in part.items()}

    def _columns(self, output: PairOutput) -> dict[int, Row]:
        batch, pairs = output.batch, output.pairs
        if not output.count:
            return {}
        ones = torch.ones_like(output.logps, dtype=torch.float64)
        mass = sequence_logps(output.logps, ones, batch.sequences, len(batch.lengths)).view(
            len(batch.sides), -1
        )
        both = pairs.rejected is not None
        values: dict[str, torch.Tensor | None] = {
            "chosen_length": pairs.chosen_lengths,
            "rejected_length": pairs.rejected_lengths,
            "chosen_logps": pairs.chosen,
            "rejected_logps": pairs.rejected,
            "chosen_logratios": None if pairs.ref_chosen is None else pairs.chosen_logratios,
            "rejected_logratios": None if pairs.ref_rejected is None else pairs.rejected_logratios,
            "chosen_mass": batch.of_real(mass[0]),
            "rejected_mass": batch.of_real(mass[1]) if both else None,
        }
        objective = self._session.objective
        if objective.needs_rejected and not objective.spec.couples_batch:
            values["incentive_chosen"], values["incentive_rejected"] = incentives(objective, pairs)
        columns = {name: value.tolist() for name, value in values.items() if value is not None}
        positions = batch.on_host.indices[batch.on_host.weights > 0].tolist()
        rows = [{name: column[row] for name, column in columns.items()} for row in range(len(positions))]
        for row in rows:  # unpaired data have one side
            lacking = [side for side in ("chosen", "rejected") if row.get(f"{side}_length") == 0]
            for name in [name for name in row for side in lacking if side in name]:
                del row[name]
        tracked = self._session.tracked_positions
        if self._split == "held out" and tracked is not None:
            for position, row in zip(positions, rows, strict=True):
                if position not in tracked:
                    row.pop("chosen_logratios", None)
                    row.pop("rejected_logratios", None)
        return dict(zip(positions, rows, strict=True))

    def _generate(self, step: int, measured: Mapping[int, Row], tracker: Tracker) -> None:
        """Add what the policy answers now, and what it gives the answers of now and of the start."""
        now, samples = self._first if step == 0 else self._answers()
        masses = self._masses([now] if step == 0 else [now, self._first[0]])
        for place, position in enumerate(self._positions):
            measured[position].update(
                greedy_mass=masses[0][place],
                ref_greedy_mass=masses[-1][place],
                greedy_length=len(now[place].whole),
                greedy_repetition=repetition(now[place].tokens),
                sample_length=len(samples[place].whole),
                sample_repetition=repetition(samples[place].tokens),
            )
        if self._samples is not None:
            shown = range(min(self._config.samples, len(now)))
            rows = self._sample_rows(step, [("greedy", now), ("sample", samples)], shown)
            for row in rows:
                self._samples.write(row)
                log.info("sample: %s", json.dumps(row))  # escaped: a row of data must not steer a terminal
            tracker.samples(step, rows)

    def _answers(self) -> tuple[list[Generated], list[Generated]]:
        """The policy's greedy answers to the probe prompts and a sample for each."""
        session, prompts = self._session, self._prompts
        greedy: list[int | None] = [None] * len(prompts)
        drawn = [seed_of(prompt, session.config.seed) for prompt in prompts]
        answers = answer(session, [*prompts, *prompts], self._decoding, [*greedy, *drawn])
        return answers[: len(prompts)], answers[len(prompts) :]

    def _masses(self, followed: Sequence[Sequence[Generated]]) -> list[list[float]]:
        """The policy's log-prob of each whole answer, for each set of answers to the probe prompts."""
        pairs = [
            (prompt, one.whole)
            for answers in followed
            for prompt, one in zip(self._prompts, answers, strict=True)
        ]
        found = answer_logps(self._session, pairs, policy_logps(self._session))
        masses = [float(values.sum()) for values in found]
        size = len(self._prompts)
        return [masses[start : start + size] for start in range(0, len(masses), size)]

    def _sample_rows(
        self, step: int, kinds: Sequence[tuple[str, Sequence[Generated]]], shown: range
    ) -> list[Row]:
        session = self._session
        check = checker_of(session.config.eval, session.datasets.checker)
        rows: list[Row] = []
        for place in shown:
            example = self._examples[place]
            prompt, chosen, rejected = text_of(session, [example.prompt, example.chosen, example.rejected])
            for kind, answers in kinds:
                one = answers[place]
                (text,) = text_of(session, [one.tokens])
                row: Row = {"step": step, "example_id": self._ids[place], "kind": kind, "prompt": prompt}
                row |= {"text": text, "tokens": len(one.whole), "stopped": one.end is not None}
                row["repetition"] = repetition(one.tokens)
                if check is not None:  # of unpaired data an example may have nothing to compare with
                    row["correct"] = check(prompt, chosen, text) if example.chosen else None
                rows.append({**row, "chosen": chosen, "rejected": rejected})
        return rows


def probe_positions(session: Session, dataset: PairDataset, size: int) -> list[int]:
    """Dataset positions of the probe examples, the same for every run on the same data.

    Of what is held out (as far as eval.max_examples goes) those with the smallest ids, which are hashes.
    Where nothing is held out, the first that are trained on: others may have no reference log-probs.
    """
    if dataset is not session.datasets.evaluation:
        found: dict[int, None] = {}
        for step in count():
            found.update(dict.fromkeys(session.batches.indices(step)))
            if len(found) >= min(size, len(dataset)) or step + 1 >= session.total_steps:
                return list(found)[:size]
    known = len(dataset) if (limit := session.config.eval.max_examples) is None else min(limit, len(dataset))
    return smallest_ids(dataset[:known], size)


def _open_samples(path: Path, resume_step: int | None) -> JsonLines:
    if resume_step is None:
        path.unlink(missing_ok=True)
    else:
        truncate_after(path, resume_step)
    return JsonLines(path)
