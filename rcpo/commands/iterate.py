"""`rcpo iterate`: rounds of sampling, training and evaluation, each step a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from rcpo.commands.compose import command
from rcpo.commands.sample import NODES, fetch_scorer
from rcpo.config.composition import resolved_dir, user_part
from rcpo.config.onpolicy import iterate_config, onpolicy_config
from rcpo.config.parsing import parse
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.local import forward_signals
from rcpo.launch.outcomes import DONE
from rcpo.launch.ranks import external_ranks
from rcpo.onpolicy.rounds import Iteration, Step
from rcpo.onpolicy.settings import dated
from rcpo.report.rounds import SETTINGS_FILE, conclude
from rcpo.system.signals import STOPPED

PRIMARY_ROUNDS = "rounds"  # conf/rounds.yaml
ITERATE_NODES = (*NODES, "iterate", "rounds")
ALONE = "iterate goes through its rounds, without -m; give rounds=N"
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


def iterate(arguments: Sequence[str]) -> int:
    """`rcpo iterate ARGUMENTS`: returns the exit code; raises ConfigError for what is refused beforehand."""
    if external_ranks() is not None:
        raise ConfigError(
            "rcpo iterate starts processes of its own; leave the outer launcher out, and give "
            "launch.processes=N, or use `rcpo submit iterate`"
        )
    with command(
        arguments, nodes=ITERATE_NODES, alone=ALONE, folder="iterate", primary=PRIMARY_ROUNDS
    ) as call:
        if call.shown:
            return DONE
        iteration = iteration_of(call.compose())
    processes = iteration.config.launch.processes
    ready(iteration, processes)
    print(f"iterate: {os.path.relpath(iteration.folder)}", flush=True)
    iteration.write(processes)
    return run(iteration)


def iteration_of(cfg: DictConfig) -> Iteration:
    """The validated iteration of a composed configuration; raises ConfigError."""
    config = parse(user_part(cfg))
    rounds, settings = iterate_config(cfg)
    folder = resolved_dir(cfg, None).absolute()
    dated(config, folder / SETTINGS_FILE)
    return Iteration(config, onpolicy_config(cfg, config), settings, rounds, folder)


def ready(iteration: Iteration, processes: int) -> None:
    """Refuse what no round could use, and download what they need; raise ConfigError."""
    config = iteration.config
    iteration.check()
    check(config, processes)
    fetch_scorer(config, iteration.nodes.score)


def run(iteration: Iteration) -> int:
    """Do the steps that are not done; return the exit code of the first that fails, or 0."""
    for step in iteration.steps():
        if step.done:
            print(f"rcpo: {step.name}: complete before", flush=True)
            continue
        print(f"rcpo: {step.name}", flush=True)
        code = do(step)
        if code != DONE:
            where = os.path.relpath(step.folder)
            ended = "stopped" if code == STOPPED else f"ended with exit code {code}"
            print(
                f"rcpo: {step.name} ({where}) {ended}; the same command continues from there", file=sys.stderr
            )
            return code
    conclude(iteration.folder)
    return DONE


def do(step: Step) -> int:
    """Run a step as a process, to which stop signals are handed on; return its exit code.

    It goes where this process is killed: the next call would find it at work in the folder.
    """
    running: list[int] = []
    with forward_signals(lambda: running) as received:
        process = subprocess.Popen(step.command, preexec_fn=_die_with_parent)
        running.append(process.pid)
        if received:  # it came before there was a process to hand it to
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        running.clear()
    if received and code not in (DONE, 1, 2):
        return STOPPED
    return code if code >= 0 else 1


def _die_with_parent() -> None:
    """In the child, before it becomes the step: Linux kills it when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
