"""The command line. Each command takes Hydra overrides, and Hydra's flags anywhere among them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcpo import __version__
from rcpo.system import terminal
from rcpo.system.machine import limit_waiting

if TYPE_CHECKING:
    from rcpo.commands.completion import Command

_RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="rcpo",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a command refuses, or fails with, into one line on standard error and its exit code."""
    from rcpo.errors import ConfigError, RunError
    from rcpo.launch.outcomes import FAILED
    from rcpo.launch.run import failed, refused
    from rcpo.system.text import is_about_a_file, os_message

    try:
        yield
    except ConfigError as error:
        raise typer.Exit(refused(error)) from error
    except RunError as error:
        typer.echo(f"rcpo: {error}", err=True)
        raise typer.Exit(FAILED) from error
    except OSError as error:  # a folder without permission, a name that is too long, a disk that is full
        about_a_file = is_about_a_file(error)
        code = refused(ConfigError(os_message(error))) if about_a_file else failed(error)
        raise typer.Exit(code) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rcpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option("--install-completion", is_eager=True, help="Install tab completion for your shell."),
    ] = False,
    show_completion: Annotated[
        str | None,
        typer.Option(
            "--show-completion",
            is_eager=True,
            metavar="bash|zsh|fish",
            help="Print the completion script of a shell.",
        ),
    ] = None,
    _local_rank: Annotated[
        int | None,
        typer.Option("--local_rank", hidden=True),  # DeepSpeed gives it, and the environment has it
    ] = None,
) -> None:
    """Preference optimization with reward calibration, on DeepSpeed ZeRO.

    \b
    rcpo train objective=simpo rc=on     train on the packaged task, a minute on a laptop
    rcpo evaluate run=outputs/...        evaluate the trained model
    rcpo report outputs/...              show what happened, in one HTML file
    rcpo sweep rc=off,on seed=1,2,3      compare many runs
    rcpo plan engine=zero3 gpu=h200      estimate memory, communication, and time
    rcpo push run=DIR repo=OWNER/NAME    upload the trained model to the hub
    rcpo init DIR                        a project folder for your own model and data
    rcpo doctor                          what this machine has, and what would fail
    rcpo list objectives                 names to choose from; also models, data, studies, keys

    \b
    Exit codes: 0 done, 1 failed while running, 2 bad command line, configuration, or data,
    75 stopped by a signal with a checkpoint saved.
    """
    from rcpo.commands import shells

    if install_completion:
        with exit_codes():
            raise typer.Exit(shells.install())
    if show_completion is not None:
        with exit_codes():
            print(shells.script(show_completion), end="")
            raise typer.Exit


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def train(ctx: typer.Context) -> None:
    """Train a policy on preference pairs. Arguments are KEY=VALUE, in any order.

    \b
    Choose parts by GROUP=OPTION:
      rcpo train                                    DPO on the packaged task
      rcpo train objective=simpo rc=on              SimPO with reward calibration
      rcpo train model=local model.path=DIR data=pairs data.path=pairs.jsonl.gz
    Groups: objective, rc, model, data, engine, optim, eval; a wrong option names the right ones.

    \b
    Change single values:
      rcpo train objective.beta=0.5 optim.lr=5e-5 train.max_steps=1000 seed=2
      rcpo train --cfg job                          print every key with its value, train nothing
      rcpo train help=objective                     the keys of a group: type, value, range, meaning

    \b
    Several processes, and ZeRO:
      rcpo train engine=zero3 launch.processes=2
      torchrun --nproc-per-node 8 --no-python rcpo train engine=zero2

    \b
    Several runs, each a process of its own:
      rcpo train -m objective=dpo,simpo rc=off,on seed=1,2,3

    \b
    Your own options beside the shipped ones (objective/mine.yaml in my_conf):
      rcpo train --config-dir my_conf objective=mine

    \b
    From a YAML of TRL, LLaMA-Factory, or alignment-handbook; what is not converted is listed:
      rcpo train --from-trl dpo.yaml rc=loop

    Hydra's flags stand anywhere: -m, --cfg job|hydra|all, --resolve, --info, --config-dir, --config-name.
    The run's folder is printed at the start; hydra.run.dir=DIR chooses it, resume=auto continues it.
    """
    from rcpo.commands.train import train as run

    with exit_codes():
        raise typer.Exit(run(ctx.args))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def evaluate(ctx: typer.Context) -> None:
    """Evaluate a run or a model on held-out pairs. Arguments are KEY=VALUE, in any order.

    \b
      rcpo evaluate run=outputs/DIR                     as the run was configured
      rcpo evaluate run=outputs/DIR eval.max_examples=200
      rcpo evaluate run=outputs/DIR eval.checkpoints=all
      rcpo evaluate run=outputs/DIR eval=leaderboard eval.limit=100
      rcpo evaluate run=outputs/DIR eval=judge judge.base_url=URL judge.model=NAME
      rcpo evaluate run=outputs/DIR data=pairs data.path=other.jsonl
      rcpo evaluate model=local model.path=DIR reference.path=DIR data=pairs data.path=pairs.jsonl

    The result is evaluation.json in the run's folder, or in a new one under outputs/.
    """
    from rcpo.commands.evaluate import evaluate as run

    with exit_codes():
        raise typer.Exit(run(ctx.args))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def sample(ctx: typer.Context) -> None:
    """Make preference pairs of the policy's own answers. Arguments are KEY=VALUE, in any order.

    \b
    Answers of a run or a model to the training prompts of any data:
      rcpo sample run=outputs/DIR score=number
      rcpo sample model=local model.path=DIR data=pairs data.path=pairs.jsonl \\
          score=reward_model score.path=DIR
      rcpo sample ... sample.base_url=http://127.0.0.1:8000/v1 sample.model=NAME    ask a server of final/
      rcpo sample ... launch.processes=2                                            sample on two ranks

    \b
    Scores and pairs:
      score=exact|number|pattern|reward_model|judge|length|loglik
      pairing=best_worst|random|margin pairing.min_margin=0.5

    The folder that is printed at the start, or hydra.run.dir=DIR, gets pairs.jsonl, which data=pairs reads,
    and pairs.json, which tells where it comes from. The same call continues one that was killed.
    """
    from rcpo.commands.sample import sample as make

    with exit_codes():
        raise typer.Exit(make(ctx.args))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def iterate(ctx: typer.Context) -> None:
    """Sample, train, and evaluate in rounds, each from the weights of the one before.

    \b
      rcpo iterate                                              the packaged task, in a few minutes
      rcpo iterate rounds=2 model=local model.path=DIR data=pairs data.path=pairs.jsonl \\
          score=reward_model score.path=DIR objective=simpo rc=on
      rcpo submit iterate rounds=3 ... slurm.nodes=2            a chain of SLURM jobs

    Keys are those of train, sample.*, score, pairing (see `rcpo sample`), and iterate.reference=round|first.
    The folder that is printed at the start (hydra.run.dir=DIR chooses it) has round-N/sample, train, and
    evaluate; round 0 is the model before. The same call continues one that was stopped or killed.
    """
    from rcpo.commands.iterate import iterate as go_through

    with exit_codes():
        raise typer.Exit(go_through(ctx.args))


@app.command(name="data", context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def show_data(ctx: typer.Context) -> None:
    """Show a dataset as the model will see it, and train nothing. Arguments are those of train.

    \b
      rcpo data data=ultrafeedback model=qwen2.5-7b
      rcpo data model=local model.path=DIR data=pairs data.path=pairs.jsonl data.template=chatml show=5

    Examples with prompt and learned tokens in colour (show=3 of them), the template and its special tokens,
    lengths, what is cut or dropped, and what is both trained on and held out.
    """
    from rcpo.commands.data import preview

    with exit_codes():
        raise typer.Exit(preview(ctx.args))


class FigureFormat(StrEnum):
    """Formats of figure files."""

    PNG = "png"
    PDF = "pdf"
    SVG = "svg"


@app.command(name="report")
def report_runs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs or sweeps.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file; default: report.html in DIR.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Also write report.md, with its figures as files.")
    ] = False,
    figures: Annotated[
        FigureFormat | None, typer.Option("--figures", help="Also write the figures as files of this format.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Renew the report until training ends.")] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="Seconds between looks.")] = 10,
) -> None:
    """Report on a run, a pair of runs, or a whole sweep: one HTML file that needs nothing else.

    \b
      rcpo report outputs/DIR                           report.html in the run's or the sweep's folder
      rcpo report outputs/RUN-A outputs/RUN-B           side by side, in the folder that holds both
      rcpo report outputs/DIR --markdown --figures pdf  for a paper
      rcpo report OUTPUT_DIR                            of TRL, LLaMA-Factory, or HALOs: what its log tells
      rcpo report outputs/DIR --watch                   a page that follows training
    """
    from rcpo.commands.report import ReportRequest, run

    request = ReportRequest(folders, output, markdown, None if figures is None else figures.value)
    with exit_codes():
        raise typer.Exit(run(request, every if watch else None))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def sweep(ctx: typer.Context) -> None:
    """Start many runs and compare them: means over seeds, calibration on minus off with an interval.

    \b
    Each combination is a run in a process of its own; rcpo reports those that fail and continues:
      rcpo sweep objective=dpo,simpo rc=off,on seed=1,2,3 hydra.sweep.dir=outputs/mine
    The same call again runs only what is missing. Several at a time, and on a cluster:
      rcpo sweep sweep.parallel=4 ...               sweep.parallel=null: one for each GPU
      rcpo sweep hydra/launcher=submitit_slurm ...
    A named sweep (conf/study), with keys of your own beside or instead of its own:
      rcpo sweep study=ema seed=1
    A search instead of a grid, with trials that fall behind stopped:
      rcpo sweep sweep.search=optuna 'optim.lr=tag(log,interval(1e-5,1e-3))' objective.beta=0.1,0.5,1 \\
          sweep.trials=30 sweep.pruner=median eval.every=25
    The table of a sweep that ran before, `rcpo train -m` and SLURM's included:
      rcpo sweep compare=outputs/mine

    sweep.json, sweep.md and a folder for each run are in hydra.sweep.dir.
    """
    from rcpo.commands.sweep import sweep as run

    with exit_codes():
        raise typer.Exit(run(ctx.args))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def plan(ctx: typer.Context) -> None:
    """Estimate a run's memory, communication, and time; load nothing. Arguments are KEY=VALUE.

    \b
      rcpo plan engine=zero2 launch.processes=2              processes on this machine
      rcpo plan model=llama-3-8b engine=zero3 train.dtype=bf16 train.gradient_checkpointing=true \\
          gpu=h100-80gb plan.gpus=64 train.batch_size=128 train.micro_batch_size=1 \\
          plan.pairs=60000 plan.prompt_tokens=200 plan.response_tokens=300
    A preset's shapes are shipped; another model needs its folder with a config.json. rcpo counts the data
    where the tokenizer is at hand; else give plan.pairs, plan.prompt_tokens, and plan.response_tokens.

    If the plan does not fit the GPU, rcpo names the nearest configuration that does and exits with code 1.
    """
    from rcpo.commands.plan import plan as make_plan

    with exit_codes():
        raise typer.Exit(make_plan(ctx.args))


class Submittable(StrEnum):
    """What `rcpo submit` takes."""

    TRAIN = "train"
    SWEEP = "sweep"
    EVALUATE = "evaluate"
    ITERATE = "iterate"
    STATUS = "status"


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def submit(
    ctx: typer.Context,
    command: Annotated[Submittable, typer.Argument(metavar="train|sweep|evaluate|iterate|status")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the script and touch nothing.")] = False,
) -> None:
    """Submit a job to SLURM, with a snapshot of code and configuration, or show the state of jobs.

    \b
      rcpo submit train objective=simpo rc=on slurm.nodes=2 slurm.gpus_per_node=8
      rcpo submit train ... --dry-run                           the script alone
      rcpo submit sweep objective=dpo,simpo rc=off,on           an array with a task for each run
      rcpo submit evaluate run=outputs/DIR
      rcpo submit iterate rounds=3 slurm.nodes=2                a chain: sample, train, evaluate, and again
      rcpo submit status [DIR]...                               jobs, runs, steps, last metrics

    \b
    One after another, when the first is done:
      rcpo submit train objective=sft hydra.run.dir=outputs/sft ...
      rcpo submit train model=local model.path=outputs/sft/final slurm.after=outputs/sft \\
          hydra.run.dir=outputs/dpo
      rcpo submit evaluate run=outputs/dpo slurm.after=outputs/dpo

    Before its time is over, or when it is preempted, a run saves a checkpoint and continues later.
    """
    from rcpo.commands.chain import submit_chain
    from rcpo.commands.submit import submit as submit_job
    from rcpo.slurm.status import report_status

    with exit_codes():
        if command is Submittable.STATUS:
            raise typer.Exit(report_status(ctx.args))
        if command is Submittable.ITERATE:
            raise typer.Exit(submit_chain(ctx.args, dry_run=dry_run))
        raise typer.Exit(submit_job(command.value, ctx.args, dry_run=dry_run))


@app.command(context_settings=_RAW, options_metavar="[KEY=VALUE | FLAG]...")
def push(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent.")] = False,
) -> None:
    """Upload a run's final/, with its model card, to a private repository of the hub.

    \b
      rcpo push run=outputs/DIR repo=OWNER/NAME --dry-run       what would be sent
      rcpo push run=outputs/DIR repo=OWNER/NAME
      rcpo push run=outputs/DIR repo=OWNER/NAME push.private=false push.revision=v2 push.message='Second try'

    The token is that of `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another hub.
    """
    from rcpo.commands.push import push as upload

    with exit_codes():
        raise typer.Exit(upload(ctx.args, dry_run=dry_run))


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]) -> None:
    """Make a project: configuration, a few pairs, and settings for SLURM, with commands that work at once.

    \b
      rcpo init my-project
    """
    from rcpo.commands.init import init as make

    with exit_codes():
        raise typer.Exit(make(folder))


@app.command(name="list")
def list_names(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="A group of options, or keys.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys as conf/keys.md.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option("--config-dir", help="A folder with options of your own.")
    ] = None,
) -> None:
    """List the options of a group, one line each.

    \b
      rcpo list objectives
      rcpo list models|data|studies|experiments|engines|gpus|...
      rcpo list keys                what each node of keys is about; `rcpo train help=NODE` shows its keys
    """
    from rcpo.commands.listing import show_topic

    with exit_codes():
        raise typer.Exit(show_topic(topic, config_dir, markdown=markdown))


@app.command()
def doctor() -> None:
    """Show what this machine has and what would fail; exit code 1 where `rcpo train` could not run."""
    from rcpo.commands.doctor import examine

    with exit_codes():
        raise typer.Exit(examine())


def main() -> None:
    """Entry point of the `rcpo` script."""
    shell = os.environ.get("_RCPO_COMPLETE")
    if shell:
        _complete(shell)
        return
    terminal.prepare()
    gc.set_threshold(50_000, 20, 20)  # imported objects stay; to look at them took an eighth of a start
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own exists in its kernel alone; rcpo draws to files
    limit_waiting(os.environ)
    os.environ.setdefault("RCPO_COMMAND", json.dumps(["rcpo", *sys.argv[1:]]))  # environment.json keeps it
    app(prog_name="rcpo")


def _complete(shell: str) -> None:
    """Answer a shell that asks what may stand at the cursor."""
    from rcpo.commands.shells import answer

    for line in answer(shell, sys.argv[1:], known_commands()):
        print(line)


def known_commands() -> dict[str, Command]:
    """What the parser knows of each command, by name; "" is rcpo itself."""
    root: Any = typer.main.get_command(app)
    return {name: _known(command) for name, command in {"": root, **root.commands}.items()}


def _known(command: Any) -> Command:
    from rcpo.commands.completion import Command

    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    return Command(
        help=command.help or "",
        flags={flag: each.help or "" for each in options for flag in each.opts if flag.startswith("--")},
        takes_keys=bool(command.context_settings.get("ignore_unknown_options")),
        positions=tuple(tuple(each.metavar.split("|")) for each in arguments if "|" in (each.metavar or "")),
    )


if __name__ == "__main__":
    main()
