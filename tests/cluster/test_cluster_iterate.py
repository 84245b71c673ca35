"""Rounds as a chain of jobs on a real SLURM of two nodes: the same pairs and weights as on one machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm import Cluster
from user import PATIENCE, User

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = [
    *("rounds=2", "sample.prompts=64", "sample.n=4", "sample.batch_size=32", "train.batch_size=4"),
    *("train.micro_batch_size=2", "train.max_steps=2", "data.train_examples=128", "data.eval_fraction=0.01"),
    *("eval.generate_examples=8", "eval.kl_examples=0", "probe.size=0", "wandb.mode=disabled"),
    *("reference.cache=off", f"launch.meeting_seconds={PATIENCE:g}"),
]
SAME = [
    *("round-1/sample/pairs.jsonl", "round-2/sample/pairs.jsonl"),
    *("round-1/train/final/model.safetensors", "round-2/train/final/model.safetensors"),
    *("round-0/evaluate/evaluation.json", "round-2/evaluate/evaluation.json"),
]


def test_a_chain_over_two_nodes_ends_with_one_machine_s_pairs_and_bits(
    cluster: Cluster, tmp_path: Path
) -> None:
    user = User(tmp_path, cluster.environment)
    try:
        said = user.rcpo("submit", "iterate", *SMALL, "slurm.nodes=2", "hydra.run.dir=chain")
        jobs = re.findall(r"round \d, \w+: job (\d+)", said)
        assert len(jobs) == 7
        again = user.rcpo("submit", "iterate", *SMALL, "slurm.nodes=2", "hydra.run.dir=chain", code=2)
        assert "already; wait for it" in again
        for rounds in ("rounds=1", "rounds=2"):  # the second call adds a round
            user.rcpo("iterate", rounds, *SMALL[1:], "launch.processes=2", "hydra.run.dir=here")
        for job in jobs:
            words = [path.read_text()[-2000:] for path in tmp_path.glob("chain/*/*/slurm-*.out")]
            assert cluster.wait_for_end(job) == "COMPLETED", "\n".join(words)
        for name in SAME:
            assert (tmp_path / "chain" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
        assert "DONE" in user.rcpo("submit", "status", "chain") or "COMPLETED" in user.rcpo(
            "submit", "status", "chain"
        )
        done = user.rcpo("submit", "iterate", *SMALL, "slurm.nodes=2", "hydra.run.dir=chain")
        assert "nothing is left to run" in done
        assert "exact match" in user.rcpo("iterate", *SMALL, "hydra.run.dir=chain")
    finally:
        cluster.clear()
