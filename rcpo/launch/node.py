"""`python -m rcpo.launch.node RANKS RUN_DIR`: a SLURM task that starts the ranks of its whole node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rcpo.launch.local import Node, launch_workers, run_command
from rcpo.launch.ranks import meeting_point
from rcpo.system import terminal


def this_node(environment: Mapping[str, str] = os.environ) -> Node:
    """The node's place in its job step, from SLURM's variables."""
    rank, count = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    return Node(rank, count, ":".join(meeting_point(environment)))


def main(arguments: list[str]) -> int:
    """Return the exit code of this node's ranks."""
    terminal.prepare()
    ranks, run_dir = int(arguments[0]), Path(arguments[1])
    return launch_workers(ranks, run_command(run_dir), this_node())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
