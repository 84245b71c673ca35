"""`rcpo doctor`: what this machine has, what would fail on it, and the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rcpo.config.paths import conf_dir
from rcpo.launch.outcomes import DONE, FAILED
from rcpo.launch.ranks import external_ranks
from rcpo.runs.environment import installed_version
from rcpo.system.machine import cores
from rcpo.system.text import first_line, text_lines

GOOD, WARN, BAD = "ok", "warn", "fail"
_COLOURS = {GOOD: "green", WARN: "yellow", BAD: "red"}
# the embedded task's run peaks below 2 GB of memory and writes some 30 MB
_MEMORY_GB, _DISK_GB = 2.0, 1.0
# the operators that a run on a CPU compiles
_OPERATORS = {"deepspeed_shm_comm"}


@dataclass(frozen=True)
class Finding:
    """A line of the report: `advice` says what would fail and what to do; BAD means that train cannot run."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine() -> int:
    """Print the report; return 0, or 1 where `rcpo train` could not run."""
    findings = [finding for check in CHECKS for finding in _examined(check)]
    table = Table(title="rcpo doctor", title_justify="left", show_lines=False)
    for column in ("", "what", "found", "what would fail, and the remedy"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.state]
        table.add_row(
            f"[{colour}]{finding.state}[/]", finding.name, escape(finding.found), escape(finding.advice)
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    broken = [finding.name for finding in findings if finding.state == BAD]
    console.print(
        f"`rcpo train` cannot run here: {', '.join(broken)}" if broken else "`rcpo train` can run here."
    )
    return FAILED if broken else DONE


def _examined(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; a warning where it cannot look, so that the others are shown."""
    try:
        return check()
    except (OSError, subprocess.SubprocessError) as error:
        name = check.__name__.strip("_")
        return [Finding(name, WARN, f"cannot be examined: {first_line(error)}")]


def _python() -> list[Finding]:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, conf in {conf_dir()}"
    if not (conf_dir() / "config.yaml").is_file():
        return [
            Finding("Python", BAD, found, "no configuration: rcpo is installed incompletely, reinstall it")
        ]
    missing = [
        name for name in ("transformers", "hydra-core", "safetensors") if installed_version(name) is None
    ]
    if missing:
        return [Finding("Python", BAD, found, f"nothing runs: pip install {' '.join(missing)}")]
    return [Finding("Python", GOOD, found)]


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", BAD, str(error), "nothing runs: pip install torch")]
    findings = [Finding("torch", GOOD, torch.__version__)]
    count = torch.cuda.device_count()
    if not count:
        driver = shutil.which("nvidia-smi") is not None
        advice = "train.dtype=fp16 is refused; larger models are slow"
        if driver and torch.version.cuda is None:
            advice += (
                "; there is a GPU driver, but this torch was built without CUDA: install one built for it"
            )
        return [*findings, Finding("accelerator", WARN if driver else GOOD, "none: CPU with gloo", advice)]
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0] / 2**30
        found = f"{properties.name}, {free:.1f} of {properties.total_memory / 2**30:.1f} GiB free"
        if not torch.cuda.is_bf16_supported():
            findings.append(Finding(f"GPU {index}", WARN, found, "train.dtype=bf16 is emulated: use fp16"))
        else:
            findings.append(Finding(f"GPU {index}", GOOD, found))
    return findings


def _deepspeed() -> list[Finding]:
    version = installed_version("deepspeed")
    if version is None:
        return [Finding("DeepSpeed", BAD, "not installed", "nothing trains: pip install deepspeed")]
    findings = [Finding("DeepSpeed", GOOD, version)]
    code = (
        "from deepspeed.ops.op_builder.all_ops import ALL_OPS\n"
        "for name, op in sorted(ALL_OPS.items()): print('OP', name, op.is_compatible(False))"
    )
    # in a process of its own: importing it writes to standard output and may probe the compiler for seconds
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if result.returncode:
        reason = (text_lines(result.stderr.strip()) or ["no message"])[-1]
        return [Finding("DeepSpeed", BAD, f"{version}: {reason}", "import deepspeed fails: reinstall it")]
    operators = [line.split()[1:] for line in text_lines(result.stdout) if line.startswith("OP ")]
    good = [name for name, compatible in operators if compatible == "True"]
    rest = [name for name, compatible in operators if compatible != "True"]
    findings.append(Finding("its operators", GOOD, f"compatible: {', '.join(good) or 'none'}"))
    if rest:
        wanted = sorted(set(rest) & _OPERATORS)
        advice = f"{', '.join(wanted)}: runs on a CPU fail" if wanted else "rcpo uses none of them"
        findings.append(Finding("", WARN if wanted else GOOD, f"not compatible: {', '.join(rest)}", advice))
    return findings


def _compiler() -> list[Finding]:
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    # DeepSpeed looks for a program; pip puts it beside Python, which need not be on PATH
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    findings = []
    if path is None:
        advice = "DeepSpeed's communication operator for CPUs is compiled at the first run: install g++"
        findings.append(Finding("C++ compiler", BAD, f"no {compiler}", advice))
    else:
        findings.append(Finding("C++ compiler", GOOD, path))
    if ninja is None:
        findings.append(Finding("ninja", BAD, "not found", "DeepSpeed compiles with it: pip install ninja"))
    else:
        findings.append(Finding("ninja", GOOD, ninja))
    return findings


def _ranks() -> list[Finding]:
    count = cores()
    ranks = external_ranks()
    if ranks is None:
        return [
            Finding(
                "ranks", GOOD, f"one process, {count} cores", f"launch.processes={count} at most is useful"
            )
        ]
    found = f"rank {ranks.rank} of {ranks.world_size}, started by {ranks.launcher}"
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing and ranks.launcher != "srun" and ranks.world_size > 1:
        return [Finding("ranks", BAD, found, f"the ranks cannot meet: set {' and '.join(missing)}")]
    return [Finding("ranks", GOOD, found)]


def _slurm() -> list[Finding]:
    sbatch = shutil.which("sbatch")
    job = os.environ.get("SLURM_JOB_ID")
    if sbatch is None and job is None:
        return [Finding("SLURM", GOOD, "none", "runs are started here, not submitted")]
    return [Finding("SLURM", GOOD, f"{sbatch or 'no sbatch'}{f', inside job {job}' if job else ''}")]


def _wandb() -> list[Finding]:
    version = installed_version("wandb")
    if version is None:
        return [Finding("wandb", WARN, "not installed", "only wandb.mode=disabled runs: pip install wandb")]
    key = "WANDB_API_KEY" in os.environ or _netrc_has("api.wandb.ai")
    advice = "" if key else "wandb.mode=online needs `wandb login`; offline and disabled do not"
    return [Finding("wandb", GOOD, f"{version}, {'an account is set up' if key else 'no account'}", advice)]


def _netrc_has(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and host in path.read_text(encoding="utf-8", errors="replace")


def _hub(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    caches = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environment.get("HF_HOME", f"{caches}/huggingface")).expanduser()
    cache = Path(environment.get("HF_HUB_CACHE", str(home / "hub"))).expanduser()
    models = sorted(cache.glob("models--*")) if cache.is_dir() else []
    offline = environment.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    found = f"{cache}: {len(models)} model(s){', HF_HUB_OFFLINE is set' if offline else ''}"
    advice = "model=tiny and model=local need no hub"
    return [Finding("hub cache", GOOD, found, advice if offline or not models else "")]


def _memory() -> list[Finding]:
    free = psutil.virtual_memory().available / 2**30
    found = f"{free:.1f} GiB free of {psutil.virtual_memory().total / 2**30:.1f}"
    if free < _MEMORY_GB:
        return [
            Finding("memory", WARN, found, f"the default run wants {_MEMORY_GB:g} GiB: end other programs")
        ]
    return [Finding("memory", GOOD, found)]


def _disk() -> list[Finding]:
    here = Path.cwd()
    if not os.access(here, os.W_OK):
        advice = "runs write to ./outputs: go elsewhere or set hydra.run.dir=DIR"
        return [Finding("disk", BAD, f"{here} is not writable", advice)]
    free = shutil.disk_usage(here).free / 2**30
    found = f"{free:.1f} GiB free in {here}"
    if free < _DISK_GB:
        return [
            Finding("disk", WARN, found, "checkpoints and wandb's files may not fit: set hydra.run.dir=DIR")
        ]
    return [Finding("disk", GOOD, found)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _torch,
    _deepspeed,
    _compiler,
    _ranks,
    _slurm,
    _wandb,
    _hub,
    _memory,
    _disk,
)
