"""Options that go with any objective: pairs weighted by likelihood, tokens by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama
from torch import Tensor

from rcpo import PairLogps, get_objective
from rcpo.config.schema import AdapterConfig, ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.method.geometry import Passes
from rcpo.method.incentives import incentives
from rcpo.method.logps import length_weights, log_squares, log_squares_of
from rcpo.method.objectives import names, specification
from rcpo.system import distributed
from rcpo.training.objective import refuse_options
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_tokens_beyond_the_shorter_response_by_hand() -> None:
    # two pairs: 2 and 3 tokens, 4 and 1; the third side counts in full
    lengths = torch.tensor([2, 4, 3, 1, 3, 2])
    sequences = torch.repeat_interleave(torch.arange(6), lengths)
    found = length_weights(sequences, lengths, 2, 0.25)
    expected = [1, 1, *(1, 0.25, 0.25, 0.25), *(1, 1, 0.25), 1, *(1, 1, 1), *(1, 1)]
    assert found.tolist() == expected


def test_squares_of_the_head_are_those_of_its_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator).double() for shape in ((5, 3), (7, 3), (7,))
    )
    probabilities = torch.softmax(hidden @ head.T + bias, dim=1)
    expected = (probabilities**2).sum(1).log()
    ours = log_squares(hidden, head, bias=bias, passes=Passes(2 * len(head)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_squares_of(hidden @ head.T + bias), expected, rtol=1e-12, atol=0)
    assert log_squares(hidden[:0], head).shape == (0,)


def test_likelihoods_weight_losses_and_incentives_but_not_the_supervised_term() -> None:
    logps = PairLogps(
        *(vector(-1.2, -3.1), vector(-2.5, -0.7), vector(-1.6, -2.2), vector(-2.1, -1.0)),
        chosen_lengths=vector(4, 2),
        rejected_lengths=vector(3, 5),
        chosen_likelihoods=vector(0.5, 2.0),
        rejected_likelihoods=vector(0.4, 0.1),
    )
    weighted, plain = (get_objective("dpo", beta=1.0, weighting=name) for name in ("wpo", None))
    weights = vector(0.2, 0.2)
    torch.testing.assert_close(weighted(logps), weights * plain(logps), rtol=1e-12, atol=0)
    for one, other in zip(incentives(weighted, logps), incentives(plain, logps), strict=True):
        torch.testing.assert_close(one, weights * other, rtol=1e-12, atol=0)
    supervised = get_objective("dpo", beta=1.0, weighting="wpo", nll_coef=0.5)
    expected = weights * plain(logps) - 0.5 * vector(-0.3, -1.55)
    torch.testing.assert_close(supervised(logps), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"weighting": "vpo"}, r"objective\.weighting='vpo'; choose one of wpo"),
        ("aot", {"weighting": "wpo"}, r"weights pairs, and objective=aot sorts the pairs"),
        ("sft", {"weighting": "wpo"}, r"weights pairs, and objective=sft has no rejected side"),
        ("simpo", {"length_alpha": 0.5}, r"length_alpha=0\.5 is defined for the summed log-probs"),
        ("sft", {"length_alpha": 0.5}, r"length_alpha=0\.5 is defined for the summed log-probs"),
        ("dpo", {"length_alpha": 0.5, "nll_coef": 1.0}, r"length_alpha=0\.5 and objective\.nll_coef"),
        (
            "mix",
            {"length_alpha": 0.5, "parts": [{"name": "dpo"}, {"name": "simpo"}]},
            r"is defined for the summed",
        ),
        (
            "mix",
            {"parts": [{"name": "dpo", "length_alpha": 0.5}]},
            r"parts\[0\]\.length_alpha: set objective",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_objective(name, **options)


@pytest.mark.parametrize(
    ("options", "key"), [({"weighting": "wpo"}, "weighting"), ({"length_alpha": 0.5}, "length_alpha")]
)
def test_single_completions_are_no_pairs_to_compare(options: dict[str, Any], key: str) -> None:
    objective = get_objective("kto", **options)
    refuse_options(objective, "pairs")
    with pytest.raises(ConfigError, match=rf"objective\.{key} needs pairs"):
        refuse_options(objective, "unpaired")


def test_a_batch_is_scored_with_the_options(tmp_path: Path) -> None:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 4)
    config.train.batch_size = config.train.micro_batch_size = 4
    config.objective = ObjectiveConfig(name="dpo", weighting="wpo", length_alpha=0.25)
    distributed.initialize()
    session = Session(config, tmp_path / "run", training=True)
    found = session.forward(session.collate(session.datasets.train, [0, 1, 2, 3])).pairs
    for place, example in enumerate(session.datasets.train):
        shared = min(len(example.chosen), len(example.rejected))
        for z, likelihood, response in (
            (found.chosen, found.chosen_likelihoods, example.chosen),
            (found.losers, found.rejected_likelihoods, example.rejected),
        ):
            ids = torch.tensor([example.prompt + response])
            logits = session.engine.policy.model(ids).logits[0, len(example.prompt) - 1 : -1].detach()
            logs = torch.log_softmax(logits.double(), dim=1)
            own = logs[torch.arange(len(response)), torch.tensor(response)]
            expected = own[:shared].sum() + 0.25 * own[shared:].sum()
            assert z[place].item() == pytest.approx(expected.item(), rel=1e-5)
            mean = (own - (logs.exp() ** 2).sum(1).log()).mean().exp()
            assert likelihood is not None and likelihood[place].item() == pytest.approx(mean.item(), rel=1e-5)


OPTIONS = {"weighting": "wpo", "length_alpha": 0.5}
COMPOSED: dict[str, dict[str, Any]] = {
    "divergence, loop, moving reference": {
        "objective": {"name": "dpo", "hyperparameters": {"divergence": "js", "beta": 0.5}, **OPTIONS},
        "rule": "loop",
        "sync": 1,
    },
    "mixture with gold answers, a weight for each pair, adapters": {
        "objective": {
            "name": "mix",
            "hyperparameters": {
                "parts": [
                    {"name": "dpo", "divergence": "forward_kl", "weight": 0.7},
                    {"name": "tpo", "weighting": "wpo", "beta": 0.3},
                    {"name": "bco", "weight": 0.2},
                ]
            },
            **OPTIONS,
        },
        "scope": "pair",
        "adapter": "lora",
    },
}


@pytest.mark.parametrize("case", COMPOSED)
def test_options_compose_under_any_split(tmp_path: Path, case: str) -> None:
    wanted = COMPOSED[case]
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    count = 90 if "rule" in wanted else 10  # the loop sets control pairs aside, for its reference moves
    config.data.path = sums_file(tmp_path / "pairs.jsonl", count, weighted=True, gold=True)
    config.objective = ObjectiveConfig(**wanted["objective"])
    config.rc.enabled, config.rc.sketch = True, 32
    config.rc.control.every = 1
    config.rc.rule, config.rc.scope = wanted.get("rule", "center"), wanted.get("scope", "batch")
    config.adapter = AdapterConfig(name=wanted.get("adapter", "none"))
    config.reference.cache, config.reference.mode = "off", "model"
    config.reference.sync_every, config.reference.mixup = wanted.get("sync", 0), 0.5
    config.train.batch_size, config.train.max_steps, config.optim.warmup_ratio = 4, 2, 0.0
    config.optim.lr = 1e-2
    distributed.initialize()
    runs = []
    for micro, layout in ((4, "shared"), (1, "separate")):
        config.train.micro_batch_size, config.data.layout = micro, layout
        session = Session(config, tmp_path / "run", training=True)
        session.prepare_reference()
        trainer = Trainer(session)
        rows = [trainer.train_step() for _ in range(2)]
        runs.append([[row[name] for name in ("loss", "grad_norm", "rc/alpha")] for row in rows])
        assert rows[1]["loss"] != rows[0]["loss"]
        if wanted.get("sync"):  # the reference is half the policy: the winner's log-ratio halves with it
            moved = session.forward(session.collate(session.datasets.train, [0, 1, 2, 3])).pairs
            assert moved.chosen_logratios.abs().max() > 0
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=2e-4)


PLAIN = [
    name
    for name in names()
    if name != "mix" and specification(name).needs_rejected and not specification(name).sorts_batch
]


@pytest.mark.parametrize("name", PLAIN)
def test_any_objective_on_pairs_is_weighted_by_likelihood(name: str) -> None:
    z = vector(-1.2, -3.1)
    logps = PairLogps(
        *(z, vector(-2.5, -0.7), vector(-1.6, -2.2), vector(-2.1, -1.0), vector(4, 2), vector(3, 5)),
        kl_chosen=z,
        ref_kl_chosen=z,
        margins=vector(0.2, 0.4),
        gold_means=z,
        chosen_likelihoods=vector(0.5, 2.0),
        rejected_likelihoods=vector(0.4, 0.3),
    )
    weighted, plain = (get_objective(name, weighting=weighting) for weighting in ("wpo", None))
    weights = vector(0.2, 0.6)
    torch.testing.assert_close(weighted(logps), weights * plain(logps), rtol=1e-12, atol=0)
    for one, other in zip(incentives(weighted, logps), incentives(plain, logps), strict=True):
        torch.testing.assert_close(one, weights * other, rtol=1e-12, atol=0)
