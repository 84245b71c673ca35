"""A session's answers, their log-probs and their KL, against transformers and sums over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import sums_file, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rcpo.config.schema import RunConfig
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.evaluation.answers import answer, answer_logps, decoding_of, policy_logps, positions_of, stop_ids
from rcpo.evaluation.generation import Decoding, generate
from rcpo.evaluation.heldout import evaluate
from rcpo.evaluation.kl import distinct_prompts, k3, kl_columns, seed_of
from rcpo.system import distributed
from rcpo.training.session import Session

Make = Callable[..., Session]


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Policy, reference and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    policy, reference = tiny_llama(folder / "policy"), tiny_llama(folder / "reference")
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig.from_pretrained(policy)).save_pretrained(reference)
    return policy, reference, sums_file(folder / "pairs.jsonl", 7)


@pytest.fixture
def make(folders: tuple[str, str, str], tmp_path: Path) -> Make:
    def session(**settings: Any) -> Session:
        config = RunConfig()
        config.model.name, config.model.path, config.reference.path = "local", *folders[:2]
        config.data.name, config.data.path, config.data.eval_path = "pairs", folders[2], folders[2]
        config.reference.mode, config.reference.cache = "model", "off"
        config.eval.batch_size, config.eval.max_new_tokens, config.eval.kl_examples = 3, 6, 5
        for name, value in settings.items():
            setattr(config.eval, name, value)
        made = Session(config, tmp_path, training=False)
        made.prepare_reference()
        return made

    return session


def held_out(session: Session) -> PairDataset:
    assert session.datasets.evaluation is not None
    return session.datasets.evaluation


@torch.no_grad()
def by_hand(folder: str, prompt: list[int], tokens: list[int]) -> list[float]:
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt + tokens])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(rows, tokens, strict=True)]


def test_log_probs_of_answers_come_in_the_answers_order(make: Make, folders: tuple[str, str, str]) -> None:
    session = make()
    prompts = distinct_prompts(held_out(session), None)
    lengths = [4, 1, 6, 2, 5, 3, 6]
    pairs = [(prompt, [7 + place for place in range(n)]) for prompt, n in zip(prompts, lengths, strict=True)]
    assert session.heldout.reference is not None
    for score, folder in ((policy_logps(session), folders[0]), (session.heldout.reference, folders[1])):
        found = answer_logps(session, pairs, score)
        for values, (prompt, tokens) in zip(found, pairs, strict=True):
            assert values.tolist() == pytest.approx(by_hand(folder, prompt, tokens), abs=1e-5)


def test_k3_on_draws_is_the_exact_kl() -> None:
    """4,000 draws of one token from a model over 19 tokens: the sum over the vocabulary of p log(p / q)."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.4,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(config).double(), LlamaForCausalLM(config).double()
    prompt, count = [4, 9, 2], 4000
    seeds = list(range(count))
    drawn = generate(policy, [prompt] * count, Decoding(1, (), 0), batch_size=count, seeds=seeds)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(m(torch.tensor([prompt])).logits[0, -1], -1).numpy()
            for m in (policy, reference)
        )
    exact = float((np.exp(p) * (p - q)).sum())
    tokens = [one.tokens[0] for one in drawn]
    values = k3(p[tokens], q[tokens])
    assert values.min() >= 0 and exact > 0.05
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / count**0.5)


def test_kl_of_a_session(make: Make, folders: tuple[str, str, str]) -> None:
    session = make()
    dataset = held_out(session)
    found = kl_columns(session, dataset, 5)
    prompts = distinct_prompts(dataset, 5)
    seeds = [seed_of(prompt, session.config.seed) for prompt in prompts]
    answers = answer(session, prompts, decoding_of(session, dataset), seeds)
    for place, (prompt, one) in enumerate(zip(prompts, answers, strict=True)):
        own, other = (np.array(by_hand(folder, prompt, one.whole)) for folder in folders[:2])
        total = float((np.exp(other - own) - 1 - (other - own)).sum())
        assert found["kl"][place] == pytest.approx(total, rel=1e-3)
        assert found["kl_per_token"][place] == pytest.approx(total / len(one.whole), rel=1e-3)
    record = evaluate(session)
    assert record["eval/kl"] == pytest.approx(found["kl"].mean(), rel=1e-6)
    assert record["eval/kl/low"] < record["eval/kl"] < record["eval/kl/high"]
    assert "eval/kl" not in evaluate(make(kl_examples=0))


def test_a_number_in_the_answer_is_checked_where_the_user_says_so(make: Make) -> None:
    """The pairs' own sums are all 109; a random model does not say so."""
    record = evaluate(make(scorer="number", kl_examples=0))
    assert record["eval/exact_match"] == 0.0
    record = evaluate(make(scorer="pattern", answer_pattern="()", kl_examples=0))
    assert record["eval/exact_match"] == 1.0  # the empty group is in every text


def test_answers_end_as_tokenizer_model_and_template_say(make: Make) -> None:
    session = make()
    model, tokenizer = session.engine.policy.model, session.tokenizer
    dataset = held_out(session)
    assert stop_ids(tokenizer, model, dataset) == (tokenizer.eos_token_id,) == (2,)
    model.generation_config.eos_token_id = [2, 50]
    assert stop_ids(tokenizer, model, dataset) == (2, 50)
    model.generation_config.eos_token_id = None
    # a template whose turns end with a token of its own; plain text at the end is not a stop
    turns = PairDataset.of([Example("", [1, 5], [6, tokenizer.bos_token_id], [7, 8]) for _ in range(3)])
    assert stop_ids(tokenizer, model, turns) == (1, 2)
    text = PairDataset.of([Example("", [1, 5], [6, 9], [7, 8]) for _ in range(3)])
    assert stop_ids(tokenizer, model, text) == (2,)


def test_an_answer_may_be_as_long_as_the_longest_chosen_one(make: Make) -> None:
    assert decoding_of(make(), held_out(make())).max_new_tokens == 6
    # "it is 109" and the end token
    assert decoding_of(make(max_new_tokens=None), held_out(make())).max_new_tokens == 10


def test_prompt_and_answer_are_as_long_as_the_model_takes(make: Make) -> None:
    session = make()
    model = session.engine.policy.model
    assert decoding_of(session, held_out(session)).positions == positions_of(model, []) == 64
    assert session.held_reference is not None  # which scores the answers too
    session.held_reference.policy.model.config.max_position_embeddings = 40
    assert decoding_of(session, held_out(session)).positions == 40
    assert positions_of(model, [("x.jsonl:1", [5] * 63)]) == 64
    with pytest.raises(
        ConfigError, match=r"x\.jsonl:2: the prompt has 64 tokens, and the model takes 64 with"
    ):
        positions_of(model, [("x.jsonl:1", [5]), ("x.jsonl:2", [5] * 64)])


@pytest.mark.parametrize(
    ("scorer", "pattern", "words"),
    [
        ("pattern", None, "goes with a regular"),
        ("number", "a", "goes with"),
        ("pattern", "(", "not a regular"),
    ],
)
def test_a_scorer_that_cannot_work_is_refused(scorer: str, pattern: str | None, words: str) -> None:
    from rcpo.config.validation import validate

    config = RunConfig()
    config.eval.scorer, config.eval.answer_pattern = scorer, pattern
    with pytest.raises(ConfigError, match=words):
        validate(config)
