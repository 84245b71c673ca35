"""One command line, one run or many."""

from rcpo.jobs.commands import evaluate, train
from rcpo.jobs.sweep import sweep

__all__ = ["evaluate", "sweep", "train"]
