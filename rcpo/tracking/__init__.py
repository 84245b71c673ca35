"""What a run leaves behind and shows: metrics.jsonl, wandb, the terminal, environment.json."""

from rcpo.tracking.environment import write_environment
from rcpo.tracking.jsonl import truncate_after
from rcpo.tracking.tracker import Tracker

__all__ = ["Tracker", "truncate_after", "write_environment"]
