"""A session's start and an epoch's shares on simulated ranks, one after the other.

Usage: thousand_ranks.py RANKS TRAIN_EXAMPLES OUTPUT
Process groups are torch's fakes, whose collectives do nothing. OUTPUT gets a JSON object: `shares`, for each
rank the positions of each step's micro-batches, and seconds of one core for the `start` and for a rank's
share of a `step`.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from rcpo.config.schema import RunConfig
from rcpo.training.session import Session


def configuration(ranks: int, examples: int) -> RunConfig:
    """One epoch of packaged pairs, two a rank and step."""
    config = RunConfig()
    config.engine.stage = 2
    config.train.batch_size, config.train.micro_batch_size, config.train.epochs = 2 * ranks, 1, 1
    config.train.max_steps, config.data.train_examples = None, examples
    return config


def main() -> None:
    ranks, examples, output = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["LOCAL_RANK"] = "0"
    began = time.process_time()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    session = Session(configuration(ranks, examples), output.parent, training=True)
    started = time.process_time()
    shares = []
    for rank in range(ranks):
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        shares.append([session.rank_microbatches(step) for step in range(session.total_steps)])
    dealt = (time.process_time() - started) / ranks / session.total_steps
    output.write_text(json.dumps({"shares": shares, "start": started - began, "step": dealt}))


if __name__ == "__main__":
    main()
