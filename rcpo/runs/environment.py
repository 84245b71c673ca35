"""environment.json: what a result depends on besides its configuration; no secrets."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rcpo.runs.folder import read_object
from rcpo.system.files import replace_text
from rcpo.system.machine import cores

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "accelerate",
    "peft",
    "hydra-core",
    "omegaconf",
    "numpy",
    "datasets",
    "wandb",
    "rich",
    "typer",
    "trl",
    "lm-eval",
)
COPIED_FILE = "copied.json"  # beside a submitted job's copy of rcpo
COMMAND = "RCPO_COMMAND"  # holds the command line of the outermost `rcpo`, for the processes that it starts
_SECRET = re.compile(r"((?:key|token|secret|password|passwd)\s*[=:]\s*)\S+", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(//[^/@\s:]+:)[^/@\s]+@")


def write_environment(path: Path, *, resumed: bool = False) -> None:
    """Write versions, the code's git commit, hardware, host and command line as one JSON object.

    That of a run that is `resumed` keeps the command that started it, as `first_command`.
    """
    found = describe_environment()
    before = read_object(path) if resumed else {}
    if (first := before.get("first_command") or before.get("command")) is not None:
        found["first_command"] = first
    replace_text(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def describe_environment() -> dict[str, Any]:
    """The content of environment.json; a package that is not installed, or an unknown figure, is null."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [redact(argument) for argument in typed_command()],
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": git_state(Path(__file__)),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": cores(),
            "memory_bytes": _memory_bytes(),
            "gpus": _gpu_names(),
        },
    }


def typed_command() -> list[str]:
    """The command line that the user typed: ranks and the runs of a sweep are started by another process."""
    try:
        words = json.loads(os.environ[COMMAND])
    except (KeyError, ValueError):
        return sys.argv
    return [str(word) for word in words] if isinstance(words, list) else sys.argv


def redact(argument: str) -> str:
    """A command-line argument without what may be a secret.

    That is the values of keys that name one, a URL's password, and a job's environment. SLURM hands the
    submitting command on to the job, whose environment.json and model card hold it.
    """
    key, sign, _ = argument.partition("=")
    if sign and key.lstrip("+~").startswith("slurm.env"):
        return f"{key}=***"
    return _CREDENTIALS.sub(r"\1***@", _SECRET.sub(r"\1***", argument))


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether tracked files differ from it; None outside.

    A copy installed into some other project's checkout is not tracked there: it borrows no commit. The copy
    of a submitted job has a record of what it was made from.
    """
    for above in file.resolve().parents:
        record = above / COPIED_FILE
        if record.is_file() and isinstance(found := read_object(record).get("git"), dict):
            return found
    folder = file.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a stuck network file system
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or None


def _memory_bytes() -> int | None:
    names = os.sysconf_names
    if "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _gpu_names() -> list[str]:
    import torch  # here, so that tracking itself stays cheap to import

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
