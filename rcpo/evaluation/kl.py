"""KL(π ‖ π_ref) of the policy's own answers, by the k3 estimator on sampled tokens.

With y drawn from π and r_t = π_ref(y_t | …) / π(y_t | …), r_t − 1 − log r_t is never negative and its mean is
the token's KL exactly (Schulman, "Approximating KL divergence", 2020); an answer's KL is the sum over its
tokens. A mean of log π/π_ref over *given* responses is not a KL: they were not drawn from π.

The variance grows with the distance: where the reference finds a sampled token far more probable than the
policy does, one token can carry the estimate, and the bootstrap interval says so.
"""

from __future__ import annotations

import hashlib

import numpy as np

from rcpo.data.store import PairDataset
from rcpo.evaluation.answers import answer, answer_logps, decoding_of, policy_logps
from rcpo.evaluation.preference import Floats
from rcpo.training.session import Session


def kl_columns(session: Session, dataset: PairDataset, count: int) -> dict[str, Floats]:
    """`kl` (nats an answer) and `kl_per_token` of `count` prompts' sampled answers, for bootstrapped means.

    An answer counts as far as eval.max_new_tokens lets it go. The session's reference has to be one that
    scores any tokens: reference.mode=model. Collective.
    """
    reference = session.heldout.reference
    assert reference is not None and session.scores_any_tokens
    prompts = distinct_prompts(dataset, count)
    seeds = [seed_of(prompt, session.config.seed) for prompt in prompts]
    answers = answer(session, prompts, decoding_of(session, dataset), seeds)
    pairs = [(prompt, found.whole) for prompt, found in zip(prompts, answers, strict=True)]
    own = answer_logps(session, pairs, policy_logps(session))
    other = answer_logps(session, pairs, reference)
    totals = np.array([k3(p, r).sum() for p, r in zip(own, other, strict=True)])
    return {"kl": totals, "kl_per_token": totals / np.array([len(tokens) for _, tokens in pairs])}


def k3(own: Floats, other: Floats) -> Floats:
    """Token log-probs of policy and reference, (N,) each → the estimates of the tokens' KL, (N,)."""
    log_ratio = other - own
    return np.expm1(log_ratio) - log_ratio


def distinct_prompts(dataset: PairDataset, count: int | None) -> list[list[int]]:
    """The first `count` prompts of a dataset (None: all), each once, in its order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for example in dataset:
        if len(found) == count:
            break
        found.setdefault(tuple(example.prompt), example.prompt)
    return list(found.values())


def seed_of(prompt: list[int], seed: int) -> int:
    """A seed of a prompt's own: its draws do not depend on its place, its batch or its rank."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
