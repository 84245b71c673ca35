"""How a run ends: exit codes, and one message on standard error for each reason."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rcpo.errors import ConfigError
from rcpo.runs.folder import LOG_FILE, OUTCOME_FILE, read_record
from rcpo.system.files import replace_text
from rcpo.system.signals import STOPPED, signal_name
from rcpo.system.text import text_lines

DONE, FAILED, REFUSED = 0, 1, 2
# set in the environment of the ranks that `launch_workers` starts
WORKER = "RCPO_WORKER"

_RECORD = re.compile(r"\[[^]]*\]\[[^]]*\]\[[A-Z]+\] - ")  # how configure_log begins a record

_TRACEBACK = "Traceback (most recent call last):"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended: its exit code and, for all but 0, the reason in one line."""

    code: int
    reason: str | None = None

    def write(self, run_dir: Path) -> None:
        """Leave it in the run's folder, for those who did not wait."""
        replace_text(run_dir / OUTCOME_FILE, json.dumps(asdict(self), ensure_ascii=False) + "\n")


def read_outcome(run_dir: Path) -> Outcome | None:
    """What `Outcome.write` left in a folder; None where it left nothing."""
    path = run_dir / OUTCOME_FILE
    try:
        record = read_record(path, "the run's rcpo.log says how it ended")
    except ConfigError as error:
        return Outcome(FAILED, str(error))
    if record is None:
        return None
    code, reason = record.get("code"), record.get("reason")
    if not isinstance(code, int) or not isinstance(reason, str | None):
        return Outcome(FAILED, f"{path} is damaged, it holds no outcome")
    return Outcome(code, reason)


def outcome_of(code: int, run_dir: Path, since: int = 0) -> Outcome:
    """What the exit code of a run's process means, with the reason from the run's log.

    `since` is how many bytes the log had before: they are of other processes.
    """
    if code == DONE:
        return Outcome(DONE)
    if code < 0:
        name = signal_name(-code)
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return Outcome(FAILED, f"ended by {name}{hint}")
    if code not in (FAILED, REFUSED, STOPPED):
        return Outcome(FAILED, f"ended with exit code {code}")
    reason = last_message(run_dir / LOG_FILE, since).removeprefix("refused: ")
    return Outcome(code, "stopped by a signal" if code == STOPPED else reason)


def size_of(path: Path) -> int:
    """A file's bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_message(log_file: Path, since: int = 0) -> str:
    """The last record of a log after so many bytes in one line: its message, or a traceback's exception."""
    try:
        content = log_file.read_bytes()
    except OSError:
        return f"no {log_file.name}"
    text = content[since if since <= len(content) else 0 :].decode("utf-8", "replace")
    starts = list(_RECORD.finditer(text))
    record = text[starts[-1].end() :].strip() if starts else text.strip()
    lines = [line.rstrip() for line in text_lines(record) if line.strip()]
    if not lines:
        return "it ended before it said anything in its log; look at its console output"
    if _TRACEBACK in lines:
        return _exception(lines[len(lines) - lines[::-1].index(_TRACEBACK) :])
    return " ".join(line.strip() for line in lines)


def _exception(lines: list[str]) -> str:
    """The exception that a traceback ends with, and the first line of its message.

    The message may go on, over lines that say little by themselves, such as a caret below a word.
    """
    for place, line in enumerate(lines):
        if not line[0].isspace():
            following = lines[place + 1 : place + 2] if line.endswith(":") else []
            return " ".join([line, *(each.strip() for each in following)])
    return lines[-1].strip() if lines else "a traceback that breaks off"


def report_refusal(error: ConfigError) -> None:
    """One message on standard error from each node, and to the local launcher where there is one."""
    if os.environ.get(WORKER) == "1":
        tell_agent(error)
    elif _first_of_node():
        print(f"rcpo: {error}", file=sys.stderr)
    log.info("refused: %s", error)


def _first_of_node() -> bool:
    names = ("RCPO_LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID")
    return next((value for name in names if (value := os.environ.get(name))), "0") == "0"


def report_failure(error: Exception, *, everywhere: bool = False) -> None:
    """One message on standard error from rank 0, or every rank, or by the local launcher.

    An error of the operating system, such as a full disk, may be one rank's alone, which then names itself.
    """
    rank = os.environ.get("RANK") or "0"
    if os.environ.get(WORKER) == "1":
        tell_agent(error)
    elif isinstance(error, OSError) and rank != "0":
        print(f"rcpo: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
    elif everywhere or rank == "0":
        print(f"rcpo: {error}", file=sys.stderr, flush=True)


def tell_agent(error: BaseException) -> None:
    """Leave the message where the elastic agent that started this rank finds it."""
    if os.environ.get(WORKER) == "1":
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
