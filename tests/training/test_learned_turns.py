"""Training on responses with several turns: what is said between the answers carries no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import tiny_llama
from workers import turns

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.records import Example
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '=' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
END = 2


def row(n: int) -> dict[str, Any]:
    """One pair: two answers on the chosen side, up to three on the other, a question after each."""

    def talk(*answers: str) -> list[dict[str, str]]:
        said: list[dict[str, str]] = []
        for number, answer in enumerate(answers):
            said.append({"role": "assistant", "content": answer})
            said.append({"role": "user", "content": f"{n + number}+{number}"})
        return said[:-1]

    rejected = ("9", "it is 8", "77")[: 1 + n % 3]
    return {
        "prompt": [{"role": "user", "content": f"{10 + n}+{99 - n}"}],
        "chosen": talk("it is 109", f"{n}"),
        "rejected": talk(*rejected),
    }


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(12)))
    (tmp_path / "turns.jinja").write_text(TEMPLATE)
    config.data.name, config.data.path = "pairs", str(tmp_path / "pairs.jsonl")
    config.data.eval_fraction, config.data.learn = 0.0, "all"
    config.data.template = str(tmp_path / "turns.jinja")
    config.reference.cache = config.data.cache = str(tmp_path / "cache")
    config.objective = ObjectiveConfig(name="dpo", hyperparameters={"beta": 0.5, "epsilon": 0.0})
    config.rc.enabled, config.rc.sketch = True, None
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 12, 4, 3
    distributed.initialize()
    return config


def session_of(config: RunConfig, folder: Path) -> Session:
    session = Session(config, folder, training=True)
    session.prepare_reference()
    return session


def learned_places(response: list[int], question: int) -> list[int]:
    """Places of the answers' tokens: from the beginning or a question's end, `=`, to an end of turn."""
    found, answering = [], True
    for place, token in enumerate(response):
        if answering:
            found.append(place)
            answering = token != END
        else:
            answering = token == question
    return found


def plain_logps(model: Any, example: Example, response: list[int], question: int) -> torch.Tensor:
    """The learned tokens' log-probs, from the model's own logits for this sequence alone."""
    logits = model(torch.tensor([example.prompt + response])).logits[0, len(example.prompt) - 1 : -1]
    every = torch.log_softmax(logits.double(), 1)[torch.arange(len(response)), response]
    return every[learned_places(response, question)]


@pytest.mark.parametrize("layout", ["separate", "shared"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probs_are_those_of_the_answers_tokens(
    config: RunConfig, tmp_path: Path, layout: str, reduction: str
) -> None:
    config.data.layout, config.objective.reduction = layout, reduction
    session = session_of(config, tmp_path / "run")
    question = session.tokenizer("=", add_special_tokens=False)["input_ids"][-1]
    scored = session.forward(session.collate(session.datasets.train, list(range(12))))
    ref = {"chosen": scored.pairs.ref_chosen, "rejected": scored.pairs.ref_rejected}
    for place in range(12):
        example = session.datasets.train[place]
        for side in ("chosen", "rejected"):
            response = getattr(example, side)
            with torch.no_grad():
                tokens = plain_logps(session.engine.policy.model, example, response, question)
            if "it is" in session.tokenizer.decode(response) or side == "chosen":
                assert len(tokens) < len(response)
            expected = (tokens.sum() if reduction == "sum" else tokens.mean()).item()
            assert getattr(scored.pairs, side)[place].item() == pytest.approx(expected, abs=1e-4)
            assert ref[side][place].item() == pytest.approx(expected, abs=1e-4)  # the policy is its own
            assert getattr(scored.pairs, f"{side}_lengths")[place] == len(tokens)


def test_the_geometry_is_the_gradient_of_the_answers_log_probs(config: RunConfig, tmp_path: Path) -> None:
    config.objective.reduction = "mean"
    session = session_of(config, tmp_path / "run")
    model, question = session.engine.policy.model, session.tokenizer("=", add_special_tokens=False)
    mean = torch.stack(
        [
            plain_logps(model, one, one.chosen, question["input_ids"][-1]).mean()
            for one in session.datasets.train
        ]
    ).mean()
    [gradient] = torch.autograd.grad(mean, [model.lm_head.weight])
    step = Trainer(session).train_step()
    assert step["dynamics/score_norm_chosen"] == pytest.approx(gradient.norm().item(), rel=1e-4)


NAMES = ("loss", "grad_norm", "dynamics/incentive_ratio", "rc/alpha", "logps/rejected", "rewards/margins")


def steps(config: RunConfig, folder: Path, micro: int, layout: str) -> list[dict[str, float]]:
    config.train.micro_batch_size, config.data.layout = micro, layout
    trainer = Trainer(session_of(config, folder))
    return [named(trainer.train_step()) for _ in range(3)]


def named(step: dict[str, Any]) -> dict[str, float]:
    return {name: step[name] for name in NAMES}


def test_splits_and_layouts_agree(config: RunConfig, tmp_path: Path) -> None:
    expected = steps(config, tmp_path / "run", 12, "separate")
    assert expected[-1]["rc/alpha"] != 1
    for micro, layout in ((4, "shared"), (1, "separate")):
        for found, base in zip(steps(config, tmp_path / "run", micro, layout), expected, strict=True):
            assert found == pytest.approx(base, rel=1e-4), (micro, layout)


@pytest.mark.slow
def test_two_ranks_agree_with_one(config: RunConfig, tmp_path: Path) -> None:
    expected = steps(config, tmp_path / "run", 12, "separate")
    config.train.micro_batch_size = 2
    on_ranks(2, turns.take_steps, config, tmp_path / "run", tmp_path / "rows.json")
    for found, base in zip(json.loads((tmp_path / "rows.json").read_text()), expected, strict=True):
        assert named(found) == pytest.approx(base, rel=1e-4)


def test_the_last_answer_alone_is_other_data_to_every_cache(config: RunConfig, tmp_path: Path) -> None:
    every = session_of(config, tmp_path / "run").datasets.train
    config.data.learn = "last"
    session = session_of(config, tmp_path / "run")
    last = session.datasets.train
    assert [one.parts for one in every] == [one.parts for one in last]
    assert every.fingerprint != last.fingerprint
    assert len(list((tmp_path / "cache" / "reference").glob("*.logps"))) == 2
    scored = session.forward(session.collate(last, [0]))
    answer = session.tokenizer.decode(last[0].chosen).split("=")[-1]
    assert scored.pairs.chosen_lengths is not None
    assert scored.pairs.chosen_lengths[0] == len(
        session.tokenizer(answer, add_special_tokens=False)["input_ids"]
    )


def test_imitation_weighs_the_learned_tokens(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in map(row, range(12))]
    Path(str(config.data.path)).write_text("".join(json.dumps(one) + "\n" for one in rows))
    config.objective, config.rc.enabled = (
        ObjectiveConfig(name="sft", reduction="mean", hyperparameters={}),
        False,
    )
    session = session_of(config, tmp_path / "run")
    question = session.tokenizer("=", add_special_tokens=False)["input_ids"][-1]
    model = session.engine.policy.model
    with torch.no_grad():
        tokens = [plain_logps(model, one, one.chosen, question) for one in session.datasets.train]
    assert Trainer(session).train_step()["loss"] == pytest.approx(-torch.cat(tokens).mean().item(), rel=1e-5)
