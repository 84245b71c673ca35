"""`rcpo submit train|sweep|evaluate`: folder, snapshot, script, and the job that runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from rcpo.commands.compose import Call, command
from rcpo.commands.sweep import combinations
from rcpo.config.composition import resolved_dir, user_part
from rcpo.config.nodes import node_of
from rcpo.config.parsing import parse, save_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.checks import check_run
from rcpo.launch.folder import make_folder, refuse_other
from rcpo.launch.outcomes import DONE, FAILED, REFUSED, Outcome
from rcpo.runs.environment import redact
from rcpo.runs.folder import CODE, CONFIG_FILE, EVALUATION, FINAL, OUTCOME_FILE
from rcpo.runs.inputs import completed
from rcpo.slurm.queue import job_id, read_submitted, refuse_queued, submit_job
from rcpo.slurm.script import BatchJob, render
from rcpo.slurm.settings import SlurmConfig, slurm_config
from rcpo.slurm.snapshot import snapshot
from rcpo.sweeps.multirun import compose_many
from rcpo.system.files import write_privately

# what refuses -m
_ALONE = {
    "train": "-m: several runs are one array, `rcpo submit sweep`",
    "evaluate": "-m: submit evaluate takes one run at a time",
}


@dataclass
class Submission:
    """A job to be: what its script says, and what its runs' folders have to hold before."""

    job: BatchJob
    slurm: SlurmConfig
    configs: dict[Path, RunConfig]
    refused: dict[Path, Outcome] = field(default_factory=dict)


def submit(what: str, arguments: Sequence[str], *, dry_run: bool) -> int:
    """`rcpo submit WHAT ARGUMENTS`: submits it, or with `dry_run` shows the script and touches nothing.

    Returns the exit code; raises ConfigError for what is refused, RunError for what SLURM refuses.
    """
    nodes = ("slurm", "sweep", "study") if what == "sweep" else ("slurm",)
    own = ("run",) if what == "evaluate" else ()
    with command(arguments, nodes=nodes, own=own, alone=_ALONE.get(what)) as call:
        if call.shown:
            return DONE
        plan = {"train": _train, "sweep": _sweep, "evaluate": _evaluate}[what](call)
    for folder, outcome in plan.refused.items():
        print(f"rcpo: {folder.name}: {outcome.reason}", file=sys.stderr)
    if plan.job.runs is not None and not plan.job.runs:
        print("rcpo: nothing is left to run")
        return REFUSED if plan.refused else DONE
    after = None if plan.slurm.after is None else job_id(plan.slurm.after)
    script = render(plan.job, plan.slurm, after)
    print(render(plan.job, plan.slurm.shown, after))
    if dry_run:
        for folder in plan.job.runs or ():
            print(f"# {folder}")
        return REFUSED if plan.refused else DONE
    refuse_queued(plan.job.folder, plan.job.name)
    _write(plan, script)
    runs, array = plan.job.runs or [plan.job.folder], plan.job.runs is not None
    words = [what, *map(redact, arguments)]
    job = submit_job(plan.job.script, plan.job.name, runs, words, array=array)
    print(f"rcpo: submitted {plan.job.script} as job {job}; rcpo submit status shows it")
    return FAILED if plan.refused else DONE


def _train(call: Call) -> Submission:
    cfg = call.compose()
    slurm = slurm_config(cfg)
    run_dir = resolved_dir(cfg, None).absolute()
    job = BatchJob(run_dir, "train", run_dir / CODE, Path.cwd(), _training(slurm))
    return Submission(job, slurm, {run_dir: _checked(cfg, slurm, run_dir)})


def _sweep(call: Call) -> Submission:
    cfg = compose_many(call.hydra, call.name, call.overrides)
    slurm, sweep_dir = slurm_config(cfg), Path(cfg.hydra.sweep.dir).absolute()
    configs: dict[Path, RunConfig] = {}
    refused: dict[Path, Outcome] = {}
    for run_dir, each in combinations(call.hydra, call.name, cfg, call.overrides):
        try:
            config = _checked(each, slurm, run_dir.absolute())
        except ConfigError as error:
            refused[run_dir.absolute()] = Outcome(REFUSED, str(error))
            continue
        if not completed(run_dir, config):
            configs[run_dir.absolute()] = config
    job = BatchJob(sweep_dir, "sweep", sweep_dir / CODE, Path.cwd(), _training(slurm), runs=list(configs))
    return Submission(job, slurm, configs, refused)


def _evaluate(call: Call) -> Submission:
    run = call.own.get("run")
    if not run:
        raise ConfigError("submit evaluate needs a run, which may still be waiting: run=DIR")
    asked = [override for override in call.overrides if node_of(override) == "slurm"]
    own = [override for override in call.overrides if override not in asked]
    slurm = slurm_config(call.compose(asked))
    run_dir = call.folder("run").absolute()
    if not run_dir.is_dir():
        raise ConfigError(f"run={run_dir} is not a folder; give one that was trained, or submitted")
    _check_evaluation(call, run_dir, own, slurm)
    flags = {"--config-dir": call.flags.config_dir, "--config-path": call.flags.config_path}
    place = [f"{flag}={Path(given).absolute()}" for flag, given in flags.items() if given]
    words = ["rcpo.cli", "evaluate", f"run={run_dir}", *own, *place]
    return Submission(BatchJob(run_dir, "evaluate", run_dir / "code-evaluate", Path.cwd(), words), slurm, {})


def _check_evaluation(call: Call, run_dir: Path, own: list[str], slurm: SlurmConfig) -> None:
    """Raise ConfigError for what the evaluation would refuse when it starts, hours later."""
    config = call.config_of(run_dir, own, files=slurm.after is None)
    if slurm.after is None and not (run_dir / FINAL).is_dir() and not _is_submitted(run_dir):
        raise ConfigError(f"run={run_dir} has no final/ and no job that is to write it; finish it first")
    if not (config.eval.preferences or config.eval.tasks or config.eval.judge):
        raise ConfigError(
            "nothing to evaluate: eval.preferences=false, eval.judge=false, and eval.tasks is empty"
        )


def _is_submitted(run_dir: Path) -> bool:
    """Whether a job trains in the folder, by itself or as a run of a sweep."""
    alone, sweep = read_submitted(run_dir, "train"), read_submitted(run_dir.parent, "sweep")
    return alone is not None or (sweep is not None and str(run_dir) in sweep.runs)


def _training(slurm: SlurmConfig) -> list[str]:
    return ["rcpo.launch"] if slurm.tasks == "rank" else ["rcpo.launch.node", str(slurm.ranks)]


def _checked(cfg: DictConfig, slurm: SlurmConfig, run_dir: Path) -> RunConfig:
    """The run's configuration, checked for as many ranks as it will have, and made to continue itself."""
    # what another job has yet to write is looked for when this one starts
    config = parse(user_part(cfg), files=slurm.after is None)
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume={config.resume}: a job continues in its own folder: hydra.run.dir")
    if config.launch.processes != 1:
        raise ConfigError(f"launch.processes={config.launch.processes}: a job has slurm.ranks_per_node")
    config.resume = "auto"
    check_run(config, slurm.world_size, models=slurm.after is None)
    refuse_other(run_dir, config, slurm.world_size)
    return config


def _write(plan: Submission, script: str) -> None:
    job = plan.job
    make_folder(job.folder, "hydra.run.dir")
    modules = {config.objective.module for config in plan.configs.values()} - {None}
    snapshot(job.code, {str(module) for module in modules}, job.cwd)
    for run_dir, outcome in plan.refused.items():
        make_folder(run_dir, "hydra.sweep.dir")
        outcome.write(run_dir)
    for run_dir, config in plan.configs.items():
        make_folder(run_dir, "hydra.sweep.dir")
        save_run_config(config, run_dir / CONFIG_FILE)
    if job.runs is not None:
        job.run_list.write_text("".join(f"{run_dir}\n" for run_dir in job.runs), encoding="utf-8")
    if not job.trains:
        (job.folder / EVALUATION / OUTCOME_FILE).unlink(missing_ok=True)  # of the evaluation before
    write_privately(job.script, script)  # slurm.env may hold secrets
