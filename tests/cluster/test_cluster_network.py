"""Ranks on two nodes with a network between them, by torchrun and DeepSpeed's launcher; the link fails."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest
from network import ADDRESSES, NAMES, Network, Started
from user import ONE_STEP, PATIENCE, STEPS, TWO_RANKS, User

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
RCPO = [sys.executable, "-m", "rcpo.cli"]
AGENT = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes=2",
    "--nproc-per-node=1",
    "--max-restarts=9",
]


def torchrun(node: int, *arguments: str) -> list[str]:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=rcpo"]
    return [*AGENT, *meeting, f"--local-addr={ADDRESSES[node]}", "--no-python", *RCPO, *arguments]


def test_a_cut_link_is_found_and_the_restarted_ranks_end_with_the_same_bits(
    network: Network, place: Path
) -> None:
    user = User(place)
    keys = [*TWO_RANKS, "hydra.run.dir=cut", "resume=auto", "launch.lost_after=6"]
    agents = [network.start(node, torchrun(node, "train", *keys), place, user.variables) for node in (0, 1)]

    def both_say(words: tuple[str, str]) -> bool:
        return all(word in agent.words for word, agent in zip(words, agents, strict=True))

    user.wait_for_step("cut", 5, lambda: all(agent.runs for agent in agents))
    network.cut()
    rows = len(user.rows("cut"))
    end = time.monotonic() + PATIENCE
    while not both_say(("node-a: rank 1 on node-b fell silent", "node-b: rank 0 fell silent")):
        assert time.monotonic() < end, [agent.words for agent in agents]
        time.sleep(0.1)
    network.heal()
    assert rows < STEPS
    assert [agent.end(PATIENCE) for agent in agents] == [0, 0], [agent.words for agent in agents]
    user.same("cut", "here")


def test_deepspeed_s_launcher_with_a_hostfile_gives_the_same_numbers(network: Network, place: Path) -> None:
    user = User(place)
    (place / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    # its remote shell, for a machine without one: each host's command runs on its node
    pdsh = place / "pdsh"
    lines = [f'  {network_words(network, node)} "${{line//%n/{node}}}" &' for node in (0, 1)]
    pdsh.write_text("#!/bin/bash\nshift 5  # -S -f 1024 -w HOSTS\nline=$*\n" + "\n".join(lines) + "\nwait\n")
    pdsh.chmod(0o755)
    program = place / "rcpo"
    program.write_text("from rcpo.cli import main\n\nmain()\n")
    launcher = "from deepspeed.launcher.runner import main; main()"
    where = ["--hostfile=hosts", "--no_ssh_check", f"--master_addr={ADDRESSES[0]}"]
    command = [sys.executable, "-c", launcher, *where, str(program), "train", *TWO_RANKS]
    variables = {**user.variables, "PATH": f"{place}:{user.variables['PATH']}"}
    started = network.start(0, [*command, "hydra.run.dir=deepspeed"], place, variables)
    assert started.end(PATIENCE) == 0, started.words
    user.same("deepspeed", "here")


def network_words(network: Network, node: int) -> str:
    return shlex.join([*network.command(node), "bash", "-c"])


def ranks(
    network: Network, place: Path, port: int, run: str, second: dict[str, str], first: str = "true"
) -> list[Started]:
    """A rank on each node; the second node has environment and a line of shell of its own."""
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port)}
    started = []
    for node, (own, line) in enumerate((({}, "true"), (second, first))):
        variables = {**User(place).variables, **meeting, "RANK": str(node), **own}
        command = [*RCPO, "train", *ONE_STEP, f"hydra.run.dir={run}"]
        started.append(network.start(node, command, place, variables, line))
    return started


def test_nodes_that_differ_are_named_on_all_ranks(network: Network, place: Path) -> None:
    newer = place / "newer" / "numpy-99.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 99.0\n")
    path = f"{newer.parent}:{User(place).variables['PYTHONPATH']}"
    other = ranks(network, place, 29501, "other", {"PYTHONPATH": path})
    (place / "blind").mkdir()
    empty = f"mount -t tmpfs none {place / 'blind'}"  # in the folder's place
    blind = ranks(network, place, 29502, "blind/run", {}, empty)
    for started, message in (
        (other, "node-b (rank 1) has numpy 99.0, node-a (rank 0) has "),
        (blind, "node-b (rank 1) does not see what rank 0 writes in"),
    ):
        assert [rank.end(PATIENCE) for rank in started] == [2, 2], [rank.words for rank in started]
        for rank in started:
            assert rank.words.count("rcpo: ") == 1 and message in rank.words, rank.words
