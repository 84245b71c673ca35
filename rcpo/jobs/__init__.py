"""One command line, one run or many."""

from rcpo.jobs.commands import evaluate, train

__all__ = ["evaluate", "train"]
