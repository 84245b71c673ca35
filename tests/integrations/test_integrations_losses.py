"""Losses on the same token log-probs as TRL's own trainers, pair by pair; no model is involved."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.tpo import TPOTrainer

from rcpo.data.collate import collate
from rcpo.data.records import Example
from rcpo.method.logps import length_weights, pair_logps, token_weights
from rcpo.method.objectives import Objective, get_objective
from rcpo.method.types import PairLogps, TokenBatch

PAIRS, LONGEST = 6, 7
CHOSEN = torch.tensor([3, 7, 2, 5, 1, 4])
REJECTED = torch.tensor([5, 2, 2, 6, 4, 7])
LENGTHS = torch.cat([CHOSEN, REJECTED])
SEQUENCES = torch.repeat_interleave(torch.arange(2 * PAIRS), LENGTHS)


def tokens(seed: int) -> Tensor:
    """Log-probs of the response tokens under a made-up policy, (N,) in fp32 as TRL has them."""
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(int(LENGTHS.sum()), generator=generator) * 2.5 - 0.01


POLICY, REFERENCE, SQUARES = tokens(1), tokens(2), tokens(3)


def padded(values: Tensor) -> Tensor:
    """(N,) → (2B, T + 1) as TRL pads them: a prompt's token, then the response, zeros behind."""
    rows = torch.zeros(2 * PAIRS, LONGEST + 1)
    rows[:, 1:][torch.arange(LONGEST) < LENGTHS[:, None]] = values
    return rows


def batch() -> TokenBatch:
    nothing = torch.zeros(len(SEQUENCES), dtype=torch.long)
    return TokenBatch(
        input_ids=nothing[None], position_ids=nothing[None], predictors=nothing,
        labels=nothing, sequences=SEQUENCES, lengths=LENGTHS,
        weights=torch.ones(PAIRS, dtype=torch.float64), indices=torch.arange(PAIRS), example_ids=[""] * PAIRS,
    )  # fmt: skip


def pairs(objective: Objective) -> PairLogps:
    weights = token_weights(POLICY, SEQUENCES, LENGTHS, objective.reduction)
    weights = weights * length_weights(SEQUENCES, LENGTHS, PAIRS, objective.length_alpha)
    return pair_logps(batch(), POLICY, weights, REFERENCE, SQUARES)


class Passed:
    """TRL's accelerator on one process."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda values: values)


def outputs(log_probs: Tensor, squares: Tensor | None = None, **_: Any) -> SimpleNamespace:
    """What TRL's models give, with these log-probs."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(
        log_sum_sq_probs=zeros if squares is None else squares,
        log_probs=log_probs,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        aux_loss=None,
    )


def trainer(**settings: Any) -> SimpleNamespace:
    """What a loss of TRL reads of its trainer."""
    known: dict[str, Any] = {
        "model": SimpleNamespace(training=False), "accelerator": Passed, "aux_loss_enabled": False,
        "precompute_ref_logps": True, "ld_alpha": None, "use_weighting": False, "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0,
        "beta": 0.1, "args": SimpleNamespace(discopop_tau=0.05), "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": {"eval": defaultdict(list), "train": defaultdict(list)},
    }  # fmt: skip
    return SimpleNamespace(**{**known, **settings})


def summed(rows: Tensor, alpha: float | None) -> Tensor:
    """A pair's padded rows (2, T) as its reference's log-probs, tokens beyond the shorter one times alpha."""
    shared = int((rows != 0).sum(1).min())
    return rows[:, :shared].sum(1) + (1.0 if alpha is None else alpha) * rows[:, shared:].sum(1)


def trl_dpo(loss_type: str, **settings: Any) -> Tensor:
    """TRL's loss of each pair by itself, (B,): its trainer gives the mean of a batch."""
    policy, reference = padded(POLICY)[:, 1:], padded(REFERENCE)[:, 1:]
    mask = torch.cat([torch.zeros(2 * PAIRS, 1), (policy != 0).float()], dim=1)
    squares, alpha = padded(SQUARES)[:, 1:], settings.get("ld_alpha")
    losses = []
    for pair in range(PAIRS):
        rows = torch.tensor([pair, PAIRS + pair])
        inputs = {
            "input_ids": torch.ones(2, LONGEST + 1, dtype=torch.long),
            "attention_mask": torch.ones(2, LONGEST + 1),
            "completion_mask": mask[rows].long(),
            "ref_chosen_logps": summed(reference[rows], alpha)[:1],
            "ref_rejected_logps": summed(reference[rows], alpha)[1:],
        }
        own = trainer(loss_types=loss_type.split(","), **settings)
        losses.append(
            DPOTrainer._compute_loss(own, partial(outputs, policy[rows], squares[rows]), inputs, False)
        )
    return torch.stack(losses)


SAME: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("dpo", {}, "sigmoid", {}),
    ("dpo", {"beta": 0.5}, "sigmoid", {"beta": 0.5}),
    ("dpo", {"divergence": "forward_kl"}, "sigmoid", {"f_divergence_type": "forward_kl"}),
    ("dpo", {"divergence": "js"}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    # TRL's coefficient is one less the paper's α
    (
        "dpo",
        {"divergence": "alpha", "divergence_alpha": 0.3},
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    ("hinge", {}, "hinge", {}),
    ("exo", {}, "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", {}, "nca_pair", {}),
    ("robust", {"epsilon": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("bco", {}, "bco_pair", {}),
    ("sppo", {}, "sppo_hard", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {}, "discopop", {}),
    ("ipo", {"tau": 0.2}, "ipo", {"beta": 0.2}),
    ("dpo", {"length_alpha": 0.4}, "sigmoid", {"ld_alpha": 0.4}),
    ("hinge", {"length_alpha": 0.0}, "hinge", {"ld_alpha": 0.0}),
    ("dpo", {"weighting": "wpo"}, "sigmoid", {"use_weighting": True}),
    (
        "apo_zero",
        {"weighting": "wpo", "length_alpha": 0.7},
        "apo_zero",
        {"use_weighting": True, "ld_alpha": 0.7},
    ),
    (
        "mix",
        {"parts": [{"name": "dpo", "weight": 0.8}, {"name": "nca", "weight": 0.2}, {"name": "sft"}]},
        "sigmoid,nca_pair,sft",
        {"loss_weights": [0.8, 0.2, 1.0]},
    ),
    ("sft", {}, "sft", {}),
]


@pytest.mark.parametrize(("name", "own", "loss_type", "settings"), SAME)
def test_losses_of_trl(name: str, own: dict[str, Any], loss_type: str, settings: dict[str, Any]) -> None:
    objective = get_objective(name, **own)
    losses = objective(pairs(objective))
    torch.testing.assert_close(losses.float(), trl_dpo(loss_type, **settings), rtol=1e-6, atol=1e-6)


def test_apo_zero_unpaired_of_trl() -> None:
    policy, reference = padded(POLICY)[:, 1:], padded(REFERENCE)[:, 1:]
    losses = []
    for row in range(2 * PAIRS):  # the first half wanted
        inputs = {
            "input_ids": torch.ones(1, LONGEST + 1, dtype=torch.long),
            "attention_mask": torch.ones(1, LONGEST + 1),
            "completion_mask": torch.ones(1, LONGEST + 1, dtype=torch.long),
            "label": torch.tensor([row < PAIRS]),
            "ref_logps": reference[row : row + 1].sum(1),
        }
        own = trainer(
            loss_type="apo_zero_unpaired", calculate_KL=False, desirable_weight=2.0, undesirable_weight=3.0,
            _compute_kl_logps=lambda *_: None,
        )  # fmt: skip
        losses.append(KTOTrainer._compute_loss(own, partial(outputs, policy[row : row + 1]), inputs, False))
    trl = torch.stack(losses).view(2, PAIRS)
    objective = get_objective("apo_zero_unpaired", lambda_chosen=2.0, lambda_rejected=3.0)
    whole = pairs(objective)
    none = torch.zeros(PAIRS)
    for side, one in enumerate((whole.replace(rejected_lengths=none), whole.replace(chosen_lengths=none))):
        torch.testing.assert_close(objective(one).float(), trl[side], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "loss_type"),
    [
        ({"beta": 0.3, "lambda_nll": 0.7}, "sigmoid"),
        ({"beta": 2.0, "gamma": 0.5, "lambda_nll": 0.7, "reduction": "mean"}, "tpo-l"),
    ],
)
def test_tpo_of_trl(own: dict[str, Any], loss_type: str) -> None:
    # the logits after a token are its row of a table
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(4))
    examples = [
        Example("a", [1, 2], [3, 4, 5, 6], [7, 8], [3, 3, 4]),
        Example("b", [2], [5], [6, 7, 1], [8, 1, 2, 7, 6]),
    ]
    objective = get_objective("tpo", **own)
    found, expected = [], []
    for example in examples:  # alone: TRL takes the mean over the gold answers' tokens, rcpo over the answers
        batch = collate([example], 0, sides=objective.sides)
        logits = table[batch.input_ids]
        logps = torch.log_softmax(logits.flatten(0, 1)[batch.predictors], -1)
        logps = logps[torch.arange(len(logps)), batch.labels]
        weights = token_weights(logps, batch.sequences, batch.lengths, objective.reduction)
        found.append(objective(pair_logps(batch, logps, weights, None)))
        completion = torch.zeros_like(batch.input_ids).flatten()
        completion[batch.predictors + 1] = 1
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": (batch.input_ids != 0).long(),
            "completion_mask": completion.view_as(batch.input_ids),
        }
        trl = trainer(loss_type=loss_type, beta=own["beta"], tpo_alpha=0.7, tpo_l_gamma=own.get("gamma", 0.0))
        model = partial(outputs_of, logits)
        expected.append(TPOTrainer._compute_loss(trl, model, inputs, False))
    torch.testing.assert_close(torch.cat(found).float(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def outputs_of(logits: Tensor, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)
