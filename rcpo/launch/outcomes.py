"""How a run ends: exit codes, and one message on standard error for each reason."""

from __future__ import annotations

import logging
import os
import sys

from rcpo.config import ConfigError

DONE, FAILED, REFUSED = 0, 1, 2
# set in the environment of the ranks that `launch_workers` starts
WORKER = "RCPO_WORKER"

log = logging.getLogger(__name__)


def report_refusal(error: ConfigError) -> None:
    """One message on standard error from each node, and to the local launcher where there is one."""
    if os.environ.get(WORKER) == "1":
        tell_agent(error)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"rcpo: {error}", file=sys.stderr)
    log.info("refused: %s", error)


def report_failure(error: Exception) -> None:
    """One message on standard error from rank 0, or by the local launcher where there is one."""
    if os.environ.get(WORKER) == "1":
        tell_agent(error)
    elif os.environ.get("RANK", "0") == "0":
        print(f"rcpo: {error}", file=sys.stderr)


def tell_agent(error: BaseException) -> None:
    """Leaves the message where the elastic agent that started this rank finds it."""
    if os.environ.get(WORKER) == "1":
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
