"""One cluster, one network and one run to compare with, for all tests that need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network, hindrance
from slurm import Cluster, missing
from user import TWO_RANKS, User


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        pytest.skip(f"SLURM is not installed ({lacking}): apt-get install slurm-wlm munge")
    with Cluster(tmp_path_factory.mktemp("slurm")) as up:
        yield up


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    hindered = hindrance()
    if hindered:
        pytest.skip(f"no network namespaces here: {hindered}")
    with Network(tmp_path_factory.mktemp("network")) as up:
        yield up


@pytest.fixture
def network(nodes: Network) -> Iterator[Network]:
    """The nodes, whole, and with nothing of the test left on them afterwards."""
    yield nodes
    nodes.clear()
    nodes.heal()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands are typed, with `here`: the run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("place")
    User(folder).rcpo("train", *TWO_RANKS, "launch.processes=2", "hydra.run.dir=here")
    return folder


@pytest.fixture
def user(cluster: Cluster, place: Path) -> Iterator[User]:
    """Who uses the cluster, which has no job of theirs afterwards."""
    yield User(place, cluster.environment)
    cluster.clear()
