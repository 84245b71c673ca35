"""`python scripts/study/unseen.py [OVERRIDES…]`: which band is right about text that is not in the batch?

Trains with constant α, each of `--alphas` under each of `--optimizers`. Every `--every` steps it estimates,
from held-out pairs, the edges of eight bands: those of batches (their own norms) and those across samples
(products of different batches), for the output head and for all parameters, plain or preconditioned as AdamW
preconditions its updates, D = 1/(√v̂ + ε), in the products ⟨·, D·⟩. A verdict on the winner is right where
held-out winners rose over the following steps if r ≥ the lower edge, and fell if not; on the loser where
held-out losers fell if r ≤ the upper edge, and rose if not; r = α² d_w/d_l. The table shows how often each
band is right over the next 1, 5 and 20 steps, and how often the winner rose and the loser fell: always
giving the more frequent answer scores that, or 1 minus it.

Engine zero0, one process; run from a folder with the inputs of study=hh.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from rcpo.config.composition import compose
from rcpo.config.parsing import parse
from rcpo.method.geometry import Sketch
from rcpo.system import distributed
from rcpo.training.forward import PairOutput
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

OPTIMIZERS = {"adamw": ("optim=adamw", "optim.lr=1e-4"), "sgd": ("optim=sgd", "optim.lr=0.1")}
BASE = ("experiment=hh", "objective=dpo_mean", "objective.beta=1", "train.batch_size=16")
BASE += ("train.micro_batch_size=16", "rc=fixed", "rc.geometry=parameters", "eval.batch_size=32")
BASE += ("probe.size=0", "wandb.mode=disabled")
AHEAD = (1, 5, 20)
OUTCOME = "what happened: winner rose, loser fell"
SIZE = 8  # pairs of a held-out batch


@dataclass(frozen=True)
class Edges:
    """The ratios between which a band has the winner rise and the loser fall."""

    lower: float
    upper: float


class Products:
    """Sums of ⟨a_i, b_j⟩ over batches i, j of scores (2, …) of winners and losers.

    >>> products = Products()
    >>> products.add(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> products.add(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> products.across()  # W = 1·2, L = 0 + 1, X = ½(0 + 2)
    Edges(lower=0.5, upper=1.0)
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._own = torch.zeros(2, 2, dtype=torch.float64)
        self._count = 0

    def add(self, scores: Tensor) -> None:
        flat = scores.reshape(2, -1).double()
        self._sum = flat.clone() if self._sum is None else self._sum + flat
        self._own += flat @ flat.T
        self._count += 1

    def own(self) -> Edges:
        """Of batches by themselves."""
        return self._edges(self._own)

    def across(self) -> Edges:
        """Of different batches: all pairs of them."""
        assert self._sum is not None
        return self._edges(self._sum @ self._sum.T - self._own)

    @staticmethod
    def _edges(products: Tensor) -> Edges:
        winner, loser, cross = (float(products[i]) for i in ((0, 0), (1, 1), (0, 1)))
        return Edges(cross / winner, loser / cross)


class Watch:
    """Looks at held-out pairs between the steps of a run."""

    def __init__(self, session: Session, pairs: int) -> None:
        self.session = session
        self.pairs = pairs
        model = session.engine.policy.model
        self._head = model.get_output_embeddings().weight
        self._sketch = Sketch(session.engine.policy.vocabulary, None)

    def means(self) -> tuple[float, float]:
        """Mean z_w and z_l of the held-out pairs."""
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for first in range(0, self.pairs, 32):
                scored = self._score(first, 32).pairs
                sums += torch.stack([scored.chosen.double().sum(), scored.losers.double().sum()])
        winner, loser = (sums / self.pairs).tolist()
        return winner, loser

    def edges(self, scales: dict[int, Tensor]) -> dict[str, Edges]:
        """All bands; `scales` are AdamW's D by parameter, and without them nothing is preconditioned."""
        found: dict[str, Products] = defaultdict(Products)
        trainable = self.session.engine.trainable
        roots = {key: scale.sqrt() for key, scale in scales.items()}
        whole = torch.cat([roots[id(p)].flatten() for p in trainable]) if roots else None
        for first in range(0, self.pairs, SIZE):
            scored = self._score(first, SIZE, self._sketch)
            head = scored.head_scores().detach()
            everything = scored.parameter_scores(trainable).detach()
            found["head"].add(head)
            found["parameters"].add(everything)
            if whole is not None:
                found["head, preconditioned"].add(head * roots[id(self._head)])
                found["parameters, preconditioned"].add(everything * whole)
        own = {f"batch: {name}": products.own() for name, products in found.items()}
        return own | {f"samples: {name}": products.across() for name, products in found.items()}

    def _score(self, first: int, count: int, sketch: Sketch | None = None) -> PairOutput:
        dataset = self.session.datasets.evaluation
        assert dataset is not None
        self.session.engine.eval()
        positions = list(range(first, min(first + count, self.pairs)))
        return self.session.heldout(self.session.collate(dataset, positions), sketch)


def scales_of(session: Session) -> dict[int, Tensor]:
    """AdamW's D of each parameter; empty before the first step and for SGD."""
    optimizer = session.engine._engine.basic_optimizer
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                found[id(parameter)] = 1 / (corrected.sqrt() + group["eps"])
    return found


@dataclass(frozen=True)
class Moment:
    """A step at which the bands were estimated: r that the next step used, and the edges."""

    step: int
    ratio: float
    bands: dict[str, Edges]


Means = dict[int, tuple[float, float]]
"""Held-out means of z_w and z_l after so many steps."""


def follow(overrides: list[str], steps: int, every: int, pairs: int) -> tuple[list[Moment], Means]:
    """Trains; returns the moments, and the held-out means then and where the verdicts are judged."""
    distributed.initialize()
    with tempfile.TemporaryDirectory() as folder:
        config = parse(compose([*overrides, f"train.max_steps={steps}"]))
        session = Session(config, Path(folder), training=True)
        session.prepare_reference(lambda line: None, lambda: False)
        trainer, watch = Trainer(session), Watch(session, pairs)
        moments, means = [], {0: watch.means()}
        wanted = {start + ahead for start in range(every, steps, every) for ahead in (0, *AHEAD)} | {steps}
        while not trainer.finished:
            due = trainer.step % every == 0 and trainer.step > 0
            bands = watch.edges(scales_of(session)) if due else {}
            row = trainer.train_step()
            if trainer.step in wanted:
                means[trainer.step] = watch.means()
            ratio = row["rc/calibrated_ratio"]
            if due and ratio is not None:
                moments.append(Moment(trainer.step - 1, ratio, bands))
        return moments, means


def verdicts(moments: Iterable[Moment], means: Means, ahead: int) -> dict[str, list[tuple[bool, bool]]]:
    """By band: (winner's verdict right, loser's verdict right) for each moment, and what happened."""
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for moment in moments:
        if moment.step + ahead not in means:
            continue
        before, after = means[moment.step], means[moment.step + ahead]
        rose, fell = after[0] >= before[0], after[1] <= before[1]
        found[OUTCOME].append((rose, fell))
        for name, edges in moment.bands.items():
            found[name].append(((moment.ratio >= edges.lower) == rose, (moment.ratio <= edges.upper) == fell))
    return found


def shares(values: list[tuple[bool, bool]]) -> list[float]:
    """Of the winners' and the losers' verdicts."""
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--alphas", default="1,1.25,1.5")
    parser.add_argument("--optimizers", default="adamw,sgd")
    parser.add_argument("--out", type=Path, default=Path("outputs/unseen.jsonl"))
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, int], dict[str, list[tuple[bool, bool]]]] = defaultdict(lambda: defaultdict(list))
    for optimizer, alpha in product(arguments.optimizers.split(","), arguments.alphas.split(",")):
        settings = [*BASE, *OPTIMIZERS[optimizer], f"rc.alpha={alpha}", *arguments.overrides]
        moments, means = follow(settings, arguments.steps, arguments.every, arguments.pairs)
        moved = [after - before for before, after in zip(means[0], means[arguments.steps], strict=True)]
        print(f"{optimizer} α {alpha}: winner {moved[0]:+.3f}, loser {moved[1]:+.3f}", flush=True)
        for ahead in AHEAD:
            for name, values in verdicts(moments, means, ahead).items():
                found[optimizer, ahead][name] += values
    with arguments.out.open("w", encoding="utf-8") as file:
        for (optimizer, ahead), bands in found.items():
            for name, values in bands.items():
                winner, loser = shares(values)
                row = {"optimizer": optimizer, "ahead": ahead, "band": name, "winner": winner, "loser": loser}
                line = json.dumps({**row, "moments": len(values)}, ensure_ascii=False)
                file.write(line + "\n")
                print(line)


if __name__ == "__main__":
    main()
