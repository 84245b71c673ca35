"""`rcpo submit iterate`: the steps of an iteration as SLURM jobs, each waiting for the one it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rcpo.commands.compose import command
from rcpo.commands.iterate import ALONE, ITERATE_NODES, PRIMARY_ROUNDS, iteration_of
from rcpo.commands.sample import fetch_scorer
from rcpo.errors import ConfigError
from rcpo.launch.checks import check_run
from rcpo.launch.outcomes import DONE
from rcpo.onpolicy.rounds import EVALUATE, SAMPLE, TRAIN, Iteration, Step
from rcpo.runs.environment import redact
from rcpo.slurm.queue import job_id, refuse_queued, submit_job
from rcpo.slurm.script import BatchJob, render
from rcpo.slurm.settings import SlurmConfig, slurm_config
from rcpo.slurm.snapshot import snapshot
from rcpo.system.files import write_privately

CODE = "code"


def submit_chain(arguments: Sequence[str], *, dry_run: bool) -> int:
    """Submit the steps that are not done, or with `dry_run` show their scripts and touch nothing.

    Returns the exit code; raises ConfigError for what is refused, RunError for what SLURM refuses.
    """
    nodes = (*ITERATE_NODES, "slurm")
    with command(arguments, nodes=nodes, alone=ALONE, folder="iterate", primary=PRIMARY_ROUNDS) as call:
        if call.shown:
            return DONE
        cfg = call.compose()
        slurm, iteration = slurm_config(cfg), iteration_of(cfg)
    config, folder = iteration.config, iteration.folder
    _ready(iteration, slurm)
    left = [step for step in iteration.steps() if not step.done]
    if not left:
        print("rcpo: nothing is left to run")
        return DONE
    before = None if slurm.after is None else job_id(slurm.after)
    if dry_run:
        for step, needed in zip(left, needs(left), strict=True):
            after = before if needed is None else f"JOB-OF-{needed.label}"
            print(script_of(step, iteration, slurm.shown, after))
        return DONE
    for step in left:
        refuse_queued(step.folder, step.kind)
    iteration.write(slurm.world_size)
    modules = {str(module) for module in [config.objective.module] if module is not None}
    snapshot(folder / CODE, modules, Path.cwd())
    jobs: dict[Step, str] = {}
    for step, needed in zip(left, needs(left), strict=True):
        job = job_of(step, iteration)
        after = before if needed is None else jobs[needed]
        write_privately(job.script, script_of(step, iteration, slurm, after))  # slurm.env may hold secrets
        words = ["iterate", *map(redact, arguments)]
        jobs[step] = submit_job(job.script, job.name, [step.folder], words, array=False)
        print(f"rcpo: {step.name}: job {jobs[step]}", flush=True)
    where = os.path.relpath(folder)
    print(f"rcpo: `rcpo submit status {where}` shows them; `rcpo report {where}` reports on the rounds later")
    return DONE


def _ready(iteration: Iteration, slurm: SlurmConfig) -> None:
    config = iteration.config
    iteration.check()
    if config.launch.processes != 1:
        raise ConfigError(f"launch.processes={config.launch.processes}: a job has slurm.ranks_per_node")
    if slurm.tasks != "rank":
        raise ConfigError(f"slurm.tasks={slurm.tasks}: rcpo submit iterate takes slurm.tasks=rank alone")
    check_run(config, slurm.world_size)
    fetch_scorer(config, iteration.nodes.score)


def needs(steps: Sequence[Step]) -> list[Step | None]:
    """Of each step the one that it waits for, None where that is done or none.

    Sampling waits for the training before, training for its pairs, an evaluation for its training.
    """
    found: list[Step | None] = []
    last: Step | None = None
    for step in steps:
        found.append(last if step.number else None)
        if step.kind != EVALUATE:
            last = step
    return found


def job_of(step: Step, iteration: Iteration) -> BatchJob:
    """What the script of a step is about; the script hands sampling and training their folder."""
    commands = {
        SAMPLE: ["rcpo.onpolicy"],
        TRAIN: ["rcpo.launch"],
        EVALUATE: ["rcpo.launch", str(step.folder), "evaluate"],
    }
    return BatchJob(step.folder, step.kind, iteration.folder / CODE, Path.cwd(), commands[step.kind])


def script_of(step: Step, iteration: Iteration, slurm: SlurmConfig, after: str | None) -> str:
    """The script of a step, named after its round; `after` is the job that it waits for."""
    named = replace(slurm, name=slurm.name or f"{step.label}-{iteration.folder.name}")
    return render(job_of(step, iteration), named, after)
