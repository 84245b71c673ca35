"""The band before the first step, as `rcpo data show` prints it, is the one that training begins with."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from tiny import sums_file, tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.diagnosis import BATCH
from rcpo.method.band import Dynamics
from rcpo.method.geometry import ScoreGeometry, Sketch
from rcpo.method.samples import SampleGeometry
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.start_band import _in_words, band_lines, start_dynamics
from rcpo.training.trainer import Trainer


def test_a_batch_at_the_start_is_the_first_step_of_training(tmp_path: Path) -> None:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 89, weighted=True)
    config.objective = ObjectiveConfig(name="dpop", hyperparameters={"beta": 0.5})
    config.reference.cache, config.rc.sketch = "off", 32
    config.train.batch_size, config.train.micro_batch_size = BATCH + 4, 4
    distributed.initialize()
    session = Session(config, tmp_path / "run", training=True)
    session.prepare_reference()
    policy = copy.deepcopy(session.engine.policy)
    pad = session.tokenizer.pad_token_id
    assert isinstance(pad, int)
    row = Trainer(session).train_step()
    sketch = Sketch(policy.vocabulary, 32, config.rc.sketch_seed)
    batches = [np.array(session.batches.indices(step)) for step in range(2)]
    first, second = start_dynamics(policy, session.objective, session.datasets.train, batches, sketch, pad)
    band = first.band
    assert band is not None
    for name, value in {
        "incentive_ratio": first.incentive_ratio, "band_lower": band.lower, "band_upper": band.upper
    }.items():  # fmt: skip
        assert value == pytest.approx(row[f"dynamics/{name}"], rel=1e-4), name
    assert first.samples is None and second.samples is not None and second.samples.products == 1
    [line, *across] = band_lines(policy, session.objective, session.datasets.train, config, pad)
    # 89 pairs are nine batches of 9
    assert line.startswith("band of a batch of 9 at the start: ") and line.endswith(" of 9 batches")
    assert f"r = {first.incentive_ratio:.3g}" in line  # u = 0 for all pairs: every batch has this ratio
    assert len(across) == 1 and across[0].startswith("band across samples")
    [few] = band_lines(policy, session.objective, session.datasets.train.take(np.arange(8)), config, pad)
    assert few == "the band at the start needs 9 pairs; 8 are there"


def dynamics(ratio: float, cross: float) -> Dynamics:
    """W = 4 and L = 1, clear of noise; a batch's own band is ¼ to 4 around 1."""
    samples = SampleGeometry(4.0, 1.0, cross, 0.1, 0.1, 0.1, None, 20)
    return Dynamics(ratio, 1.0, ScoreGeometry(1.0, 1.0, 0.25), samples)


@pytest.mark.parametrize(
    ("ratio", "where"),
    [
        (0.48, "is inside"),
        (0.4, "is below, so the winner of other text falls"),
        (1.0, "is above, so the loser of other text rises"),
    ],
)
def test_lines_by_hand(ratio: float, where: str) -> None:
    own, across = _in_words([dynamics(ratio, 1.9)], 32)
    assert own == (
        "band of a batch of 32 at the start: 0.25 ≤ r ≤ 4 (medians); "
        f"r = {ratio:g}, inside in 100% of 1 batches"
    )
    # X/W = 1.9/4 and L/X = 1/1.9
    assert across == f"band across samples at the start: 0.475 ≤ r ≤ 0.5263; r = {ratio:g} {where}"


def test_noise_is_no_band() -> None:
    samples = SampleGeometry(4.0, 1.0, 1.9, 2.0, 0.1, 0.1, None, 20)
    found = Dynamics(1.0, 1.0, ScoreGeometry(1.0, 1.0, 0.25), samples)
    assert _in_words([found], 32)[1] == (
        "band across samples: not clear of its noise over 1 batches: ‖S_w‖² = 4 ± 2, ‖S_l‖² = 1 ± 0.1"
    )
    flat = Dynamics(0.0, 1.0, ScoreGeometry(1.0, 1.0, 0.25))
    assert _in_words([flat], 32) == ["the band at the start is not defined: a side has no positive incentive"]
