"""What a preference dataset may do to a policy: pairs that are alike, longer winners, and CHES.

CHES (centred hidden embedding similarity, Razin et al. 2024, arXiv 2410.08847) ranks pairs by how far
training on them is expected to displace the winner's likelihood: ⟨h̄_w, h̄_l⟩ − ‖h̄_w‖², of the hidden states
that predict each response's tokens. Here they are means over the tokens, as the authors take them to filter
real data.

Axes: n pairs, N response tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rcpo.data.collate import collate_indices
from rcpo.data.store import PairDataset

if TYPE_CHECKING:
    from rcpo.models.policy import Policy

ALIKE = 0.1  # of a pair's longer response: two that differ in fewer tokens are called nearly the same
SAMPLED = 512  # pairs that are looked at one by one, evenly through the dataset
WORST = 10
BATCH = 8  # pairs in a forward pass
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def sampled(dataset: PairDataset, limit: int = SAMPLED) -> np.ndarray:
    """At most so many positions, evenly through the dataset."""
    return np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64))


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Insertions, deletions and substitutions between two token lists (Levenshtein 1966).

    >>> edit_distance([1, 2, 3, 4], [1, 3, 4, 5])
    2
    """
    tokens, places = np.asarray(other), np.arange(len(other) + 1)
    row = places
    for number, token in enumerate(one, start=1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (tokens != token))
        # an insertion goes on from the best place to its left
        row = np.minimum.accumulate(np.concatenate([[number], kept]) - places) + places
    return int(row[-1])


def responses(dataset: PairDataset) -> list[str]:
    """Lines on how the two responses of the pairs differ: in length, and in tokens."""
    chosen, rejected = dataset.lengths[:, 1], dataset.lengths[:, 2]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    lines = [
        f"length: the chosen response is longer in {longer:.1%} of the pairs and as long in {equal:.1%}; "
        f"{chosen.mean():.1f} and {rejected.mean():.1f} tokens on average"
    ]
    places = sampled(dataset)
    pairs = (dataset[place] for place in places.tolist())
    shares = [
        edit_distance(pair.chosen, pair.rejected) / max(len(pair.chosen), len(pair.rejected))
        for pair in pairs
    ]
    alike = float(np.mean(np.asarray(shares) <= ALIKE))
    lines.append(
        f"alike: {alike:.1%} of {len(places):,} pairs differ in at most {ALIKE:.0%} of their tokens "
        f"(edit distance); the median differs in {np.median(shares):.0%}"
    )
    return lines


def ches(hidden: Tensor, sequences: Tensor, lengths: Tensor) -> Tensor:
    """⟨h̄_w, h̄_l⟩ − ‖h̄_w‖² of each pair, (n,) in fp64.

    hidden (N, D) predict the response tokens, `sequences` (N,) says whose they are: the chosen ones are
    0..n−1, the rejected n..2n−1; `lengths` (2n,).

    >>> states = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0]])  # two tokens of a winner, one of a loser
    >>> ches(states, torch.tensor([0, 0, 1]), torch.tensor([2, 1]))  # ⟨(2, 0), (2, 5)⟩ − 4
    tensor([0.], dtype=torch.float64)
    """
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float64)
    sums.index_add_(0, sequences, hidden.double())
    chosen, rejected = (sums / lengths[:, None].double()).chunk(2)
    return (chosen * rejected).sum(1) - chosen.square().sum(1)


def ches_of(policy: Policy, dataset: PairDataset, places: np.ndarray, pad_id: int) -> np.ndarray:
    """CHES of the pairs at some positions, in their order."""
    found = []
    from rcpo.models.policy import policy_inputs  # takes seconds to import, and only models need it

    policy.eval()
    for start in range(0, len(places), BATCH):
        batch = collate_indices(dataset, places[start : start + BATCH].tolist(), pad_id)
        with torch.no_grad():
            hidden = policy(**policy_inputs(batch))[1]
        found.append(ches(hidden, batch.sequences, batch.lengths).numpy())
    return np.concatenate(found)


def ches_lines(scores: np.ndarray, places: np.ndarray, name: Callable[[int], str]) -> list[str]:
    """The scores' quantiles, and the pairs with the highest; `name` gives a position's id."""
    values = np.quantile(scores, QUANTILES)
    parts = ", ".join(f"{share:.0%} {value:.4g}" for share, value in zip(QUANTILES, values, strict=True))
    lines = [f"CHES of {len(scores):,} pairs, the higher the likelier the winner falls; quantiles: {parts}"]
    for place in np.argsort(-scores, kind="stable")[:WORST].tolist():
        lines.append(f"  {scores[place]:.4g}  {name(int(places[place]))}")
    return lines
