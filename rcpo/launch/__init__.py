"""From a validated configuration to processes that train: this one, several, or an outer launcher's.

`python -m rcpo.launch RUN_DIR` trains what RUN_DIR/config.yaml says; it is what local ranks and the jobs of a
multirun are. torch is imported when a process is about to compute, not before.
"""

from rcpo.launch.checks import check
from rcpo.launch.logs import LOG_FILE, configure_log
from rcpo.launch.outcomes import DONE, FAILED, REFUSED
from rcpo.launch.pool import run_process
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.launch.run import failed, launch, refused, run_here

__all__ = [
    "DONE",
    "FAILED",
    "LOG_FILE",
    "REFUSED",
    "check",
    "configure_log",
    "external_ranks",
    "failed",
    "launch",
    "refused",
    "run_here",
    "run_process",
    "world_size",
]
