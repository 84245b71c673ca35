"""The command line as users meet it: help, refusals, flags anywhere, runs of their own processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import pytest
import typer
from hydra._internal.hydra import Hydra
from typer.testing import CliRunner

from rcpo import launch
from rcpo.cli import app
from rcpo.commands import train as commands
from rcpo.commands.evaluate import evaluate
from rcpo.commands.sweep import sweep
from rcpo.commands.train import train
from rcpo.config.parsing import load_run_config, save_run_config
from rcpo.config.paths import conf_dir
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import Outcome
from rcpo.launch.pool import Pool
from rcpo.runs.folder import LOG_FILE
from rcpo.sweeps import multirun

# two steps of supervised training from fresh weights need no packaged weights and no reference
TINY_RUN = (
    "objective=sft",
    "model.init=random",
    "data.train_examples=64",
    "train.max_steps=1",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "reference.track=false",
    "eval.max_examples=4",
    "eval.generate_examples=0",
    "wandb.mode=disabled",
)


def rcpo(*arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command line in `folder` and checks its exit code."""
    command = [sys.executable, "-m", "rcpo.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[2])}
    result = forked.run(command, cwd=folder, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("command", ["train", "evaluate", "doctor"])
def test_each_command_has_our_help_wherever_the_flag_stands(command: str) -> None:
    lines = [[command, "--help"], [command, "-h"]]
    if command != "doctor":
        lines.append([command, "seed=1", "--help"])
    shown = {CliRunner().invoke(app, line).output for line in lines}
    assert len(shown) == 1
    text = shown.pop()
    assert "Hydra is" not in text
    assert f"rcpo {command}" in text


@pytest.mark.parametrize("command", ["train", "sample", "iterate", "sweep", "plan", "submit"])
def test_a_command_of_the_help_can_be_copied(command: str) -> None:
    """What goes on in the next line ends with a backslash, and no two lines are joined."""
    lines = CliRunner().invoke(app, [command, "--help"]).output.split("\n")
    for line, following in pairwise(lines):
        if line.startswith("    rcpo ") and following.startswith("     "):
            assert line.endswith(" \\"), line
    assert not [line for line in lines if re.search(r"\S=\S+ {5,}\S+=", line)]


def test_python_dash_m_is_the_command_line(tmp_path: Path) -> None:
    for module, arguments, code, part in (
        ("rcpo", ["--version"], 0, "rcpo "),
        ("rcpo", ["train", "objective=smpo"], 2, "did you mean simpo?"),
    ):
        command = [sys.executable, "-m", module, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == code and part in result.stdout + result.stderr


def test_help_lists_the_commands_and_exit_codes() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for part in ("train", "evaluate", "doctor", "75 stopped", "rcpo train objective=simpo rc=on"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "objective=smpo"], "did you mean simpo?"),
        (["train", "train.batch_size=abc"], "train.batch_size"),
        (["train", "objective.beta=0"], "objective.beta=0"),
        (["train", "dpo"], "KEY=VALUE"),
        (["train", "--confg-dir", "x"], "did you mean --config-dir?"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
        (["train", "--config-name", "nowhere"], "nowhere"),
        (["train", "--cfg", "jobs"], "invalid choice"),
        (["train", "--cfg", "job", "-m"], "give one of"),
        (["train", "--resolve"], "--cfg"),
        (["train", "--cfg", "job", "objective=smpo"], "did you mean simpo?"),
        (["train", "-m", "objective=dpo,smpo"], "did you mean simpo?"),
        (["train", "-m", "sed=1,2"], "did you mean seed?"),
        (["train", "objective=sft", "rc=on"], "no rejected side"),
        (["train", "+objective.bta=1"], "bta"),
        (["evaluate", "run=nowhere"], "not the folder of a run"),
        (["evaluate", "model=local"], "model.path"),
        (["evaluate", "-m", "seed=1,2"], "without -m"),
        (["train", "-m", "seed=1,2", "resume=here"], "resume=auto continues each of them"),
        (["train", "--experimental-rerun", "x.pickle"], "a run's config.yaml repeats it"),
        (["list", "objectives", "--markdown"], "--markdown is for `rcpo list keys`"),
    ],
)
def test_a_refusal_is_one_line_exit_code_2_and_leaves_nothing_behind(
    arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert result.stderr.startswith("rcpo: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_help_and_refusals_come_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rcpo.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'deepspeed'} & {*sys.modules}))"
    )
    for arguments, exit_code in (
        (["--help"], 0),
        (["train", "train.bach_size=3"], 2),
        (["train", "seed=-1"], 2),
    ):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == f"{exit_code} []"


def test_the_program_itself_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    result = rcpo("train", "lr=1", "-m", folder=tmp_path, code=2)
    assert result.stderr == "rcpo: unknown key lr; did you mean optim.lr?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "seed=3", "rc=true"],
        ["seed=3", "--cfg=job", "rc=on"],
        ["seed=3", "rc=on", "-c", "job", "--resolve"],
        ["rc=on", "--package", "_global_", "seed=3", "--cfg", "job"],
    ],
)
def test_hydra_s_flags_stand_anywhere(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert train(arguments) == 0
    shown = capfd.readouterr().out
    assert "seed: 3" in shown
    assert "enabled: true" in shown
    assert "hydra:" not in shown


@pytest.mark.parametrize(
    ("command", "arguments", "advice"),
    [
        (train, ["seed=1,2"], "add -m for a run each, write seed=[1,2]"),
        (train, ["--cfg", "job", "seed=1,2"], "give one, write seed=[1,2]"),  # -m is refused beside --cfg
        (train, ["help=optim", "seed=1,2"], "give one, write seed=[1,2]"),
        (sweep, ["--cfg", "job", "seed=1,2"], "give one, write seed=[1,2]"),
        (evaluate, ["seed=1,2"], "give one, write seed=[1,2]"),
        (evaluate, ["objective=[dpo,simpo]"], "choose one option"),
    ],
)
def test_several_values_are_given_the_advice_that_the_command_takes(
    command: Any, arguments: list[str], advice: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        command(arguments)
    assert advice in str(refused.value) and ("-m" in advice or "-m" not in str(refused.value))


def test_hydra_s_own_node_and_plugins_can_be_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert train(["--cfg", "hydra", "hydra.sweep.dir=elsewhere"]) == 0
    assert "dir: elsewhere" in capfd.readouterr().out
    assert train(["--info", "searchpath", "seed=1"]) == 0
    assert str(conf_dir()) in capfd.readouterr().out


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[RunConfig, Path]]:
    """What would have been trained, in an empty folder; a run with `seed=13` fails, with 75 it is stopped."""
    started: list[tuple[RunConfig, Path]] = []

    def train(config: RunConfig, run_dir: Path) -> int:
        started.append((config, run_dir))
        return {13: 1, 75: 75}.get(config.seed, 0)

    def process(pool: Pool, run_dir: Path, *_: object) -> tuple[Outcome, bool]:
        code = train(load_run_config(run_dir), run_dir)
        return Outcome(code, "as the test has it" if code else None), False

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "launch", train)
    monkeypatch.setattr(Pool, "_wait", process)
    return started


def test_a_run_has_a_folder_with_its_resolved_configuration(runs: list[tuple[RunConfig, Path]]) -> None:
    assert train(["objective=simpo", "rc=true", "seed=5"]) == 0
    (config, run_dir) = runs[0]
    assert run_dir.parent == Path("outputs").resolve()
    assert run_dir.name.endswith("_simpo_rc-on")
    assert load_run_config(run_dir) == config
    assert (config.objective.name, config.rc.enabled, config.seed) == ("simpo", True, 5)
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "rcpo.log"]


def test_a_run_is_composed_once(runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Any] = []
    original = Hydra.compose_config

    def compose(hydra: Hydra, *values: Any, **named: Any) -> Any:
        composed.append(values)
        return original(hydra, *values, **named)

    monkeypatch.setattr(Hydra, "compose_config", compose)
    assert train(["seed=5", "hydra.run.dir=mine"]) == 0
    assert len(runs) == len(composed) == 1


def test_hydra_s_mode_asks_for_several_runs(runs: list[tuple[RunConfig, Path]]) -> None:
    assert train(["hydra.mode=MULTIRUN", "seed=1,2"]) == 0
    assert [config.seed for config, _ in runs] == [1, 2]


def test_a_folder_that_holds_a_run_is_not_written_over(runs: list[tuple[RunConfig, Path]]) -> None:
    assert train(["hydra.run.dir=mine"]) == 0
    (runs[0][1] / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="mine holds a run already; resume=auto"):
        train(["hydra.run.dir=mine"])
    assert train(["hydra.run.dir=mine", "resume=auto"]) == 0


def test_an_exit_code_of_a_run_is_that_of_the_command(runs: list[tuple[RunConfig, Path]]) -> None:
    assert train(["seed=13"]) == 1
    assert train(["seed=75"]) == 75


def test_a_multirun_has_a_folder_for_each_and_goes_on_after_a_failure(
    runs: list[tuple[RunConfig, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["objective=dpo,simpo", "-m", "rc=false,true", "seed=1,13"]) == 1
    assert len(runs) == 2 * 2 * 2
    assert len({run_dir for _, run_dir in runs}) == 8
    assert len({run_dir.parent for _, run_dir in runs}) == 1
    assert runs[-1][1].name == "7_simpo_rc-on_seed-13"
    captured = capsys.readouterr()
    assert "1_dpo_rc-off_seed-13: exit code 1: as the test has it" in captured.err
    assert "4 of 8 runs done" in captured.out


def test_a_multirun_s_refused_run_does_not_drop_the_rest(
    runs: list[tuple[RunConfig, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["-m", "objective.beta=0,0.5"]) == 1
    assert [config.objective.hyperparameters["beta"] for config, _ in runs] == [0.5]
    assert "objective.beta=0 is out of range" in capsys.readouterr().err
    assert train(["-m", "objective.beta=0,-1"]) == 2


def test_a_stopped_run_ends_the_multirun(runs: list[tuple[RunConfig, Path]]) -> None:
    assert train(["-m", "seed=1,75,3"]) == 75
    assert [config.seed for config, _ in runs] == [1, 75]


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 1], 1), ([0, 2], 1), ([2, 2], 2), ([1, 2], 1), ([0, 75, 75], 75)]
)
def test_the_summary_code_of_many_runs(codes: list[int], code: int) -> None:
    assert multirun.summary_code(codes) == code


def test_a_multirun_under_an_outer_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="outer launcher"):
        train(["-m", "seed=1,2"])


def test_the_users_package_and_folder_give_an_objective(
    runs: list[tuple[RunConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_conf" / "objective").mkdir(parents=True)
    yaml = tmp_path / "my_conf" / "objective" / "squared.yaml"
    yaml.write_text("name: squared\nmodule: my_objectives_of_the_cli_test\nwidth: 2.0\n")
    (tmp_path / "my_objectives_of_the_cli_test.py").write_text(
        "from rcpo.method.objectives import register\n\n\n"
        "@register('squared', reduction='mean', needs_reference=False)\n"
        "def squared(logps, *, width=1.0):\n"
        "    return (logps.chosen - logps.rejected - width).square()\n"
    )
    assert train(["objective=squared", "--config-dir", "my_conf", "objective.width=3"]) == 0
    assert runs[0][0].objective.hyperparameters == {"width": 3}
    with pytest.raises(ConfigError, match=r"unknown key objective\.wdth; did you mean objective\.width"):
        train(["objective=squared", "--config-dir", "my_conf", "objective.wdth=3"])
    yaml.write_text("name: squared\nmodule: my_objectives_of_the_cli_test\nwdth: 2.0\n")
    with pytest.raises(ConfigError, match="wdth"):
        train(["objective=squared", "--config-dir", "my_conf"])
    yaml.write_text("name: squared\nmodule: nowhere_at_all\n")
    with pytest.raises(ConfigError, match=r"objective\.module=nowhere_at_all is not installed"):
        train(["objective=squared", "--config-dir", "my_conf"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("width: 2\nlist:\nSETTINGS\nlast: 1\n", r"mine\.yaml, line 4: could not find expected ':'"),
        ("width: [1\n", r"mine\.yaml, line 2: "),
        ("# @package _global_\noptim:\n  lr: ${a.${name}_b}\n", r"^optim\.lr: .*'"),
    ],
)
def test_a_users_file_that_cannot_be_read_is_named(content: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "my_conf" / "objective"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(content)
    for command, arguments in ((train, []), (sweep, ["seed=1,2"])):
        with pytest.raises(ConfigError, match=message):
            command(["objective=mine", "--config-dir", str(tmp_path / "my_conf"), *arguments])


def test_evaluate_takes_a_runs_configuration_with_overrides(
    runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(["objective=simpo", "seed=5", "hydra.run.dir=mine"])
    with pytest.raises(ConfigError, match="run=mine was never trained"):
        evaluate(["run=mine"])
    Path("mine", "metrics.jsonl").touch()
    seen: list[tuple[RunConfig, Path]] = []
    monkeypatch.setattr(
        "rcpo.commands.evaluate.launch", lambda config, run_dir, task: seen.append((config, run_dir)) or 0
    )
    assert evaluate(["eval.batch_size=3", "run=mine"]) == 0
    config, run_dir = seen[0]
    assert run_dir == Path("mine")
    assert (config.objective.name, config.seed, config.eval.batch_size) == ("simpo", 5, 3)
    # the run's own record stays what was trained
    assert load_run_config(Path("mine")).eval.batch_size == 64


def test_a_run_that_was_continued_and_moved_is_evaluated_where_it_is_now(
    runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(["hydra.run.dir=mine"])
    Path("mine", "metrics.jsonl").touch()
    train(["resume=mine"])
    assert load_run_config(Path("mine")).resume == "mine"
    Path("mine").rename("moved")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    seen: list[Path] = []
    monkeypatch.setattr(
        "rcpo.commands.evaluate.launch", lambda config, run_dir, task: seen.append(run_dir) or 0
    )
    assert evaluate(["run=moved"]) == 0 and evaluate(["run=~/moved"]) == 0
    assert [path.resolve() for path in seen] == [Path("moved").resolve()] * 2
    train(["resume='~/moved'"])
    assert runs[-1][1] == Path.cwd() / "moved"


def test_a_refused_evaluation_leaves_the_record_of_the_one_before(
    runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, seed in ((0, 5), (2, 6)):
        monkeypatch.setattr("rcpo.commands.evaluate.launch", lambda *_, code=code: code)
        assert evaluate([f"seed={seed}", "hydra.run.dir=mine"]) == code
    assert load_run_config(Path("mine/evaluation")).seed == 5


def test_a_run_is_evaluated_in_its_own_folder_alone(runs: list[tuple[RunConfig, Path]]) -> None:
    train(["hydra.run.dir=mine"])
    Path("mine", "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=other: .*mine"):
        evaluate(["run=mine", "hydra.run.dir=other"])


@pytest.mark.parametrize("command", [train, lambda arguments: train(["-m", *arguments, "seed=1,2"]), sweep])
def test_a_run_to_continue_that_only_a_file_names_is_refused(
    command: Any, runs: list[tuple[RunConfig, Path]]
) -> None:
    """It would be taken for resume=auto, and a fresh run would start in another folder."""
    Path("my_conf", "experiment").mkdir(parents=True)
    text = "# @package _global_\nresume: my_conf\n"
    Path("my_conf", "experiment", "again.yaml").write_text(text)
    arguments = ["--config-dir", "my_conf", "experiment=again", "hydra.sweep.dir=out"]
    if command is sweep:
        arguments.append("resume=my_conf")
    with pytest.raises(ConfigError, match=r"resume=my_conf"):
        command(arguments)
    assert runs == [] and not Path("out").exists()


def test_a_model_without_a_run_is_not_evaluated_into_a_run(
    runs: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(
        "rcpo.commands.evaluate.launch", lambda config, run_dir, task: seen.append(run_dir) or 0
    )
    assert evaluate(["hydra.run.dir=mine"]) == 0 and evaluate([]) == 0
    assert seen[0] == Path("mine") and seen[1].name.endswith("_evaluation")
    Path("mine", "metrics.jsonl").touch()
    with pytest.raises(
        ConfigError, match=r"hydra.run.dir=mine is a run's folder; evaluate the run with run=mine"
    ):
        evaluate(["hydra.run.dir=mine"])


@pytest.mark.slow
def test_one_process_and_two_and_many_runs_train(tmp_path: Path) -> None:
    rcpo("train", *TINY_RUN, "hydra.run.dir=one", folder=tmp_path)
    rcpo(
        "train",
        "launch.processes=2",
        "train.micro_batch_size=2",
        *without("micro"),
        "hydra.run.dir=two",
        folder=tmp_path,
    )
    rcpo("train", "-m", "seed=1,2", *TINY_RUN, "hydra.sweep.dir=many", folder=tmp_path)
    for run in ("one", "two", "many/0_sft_rc-off_seed-1", "many/1_sft_rc-off_seed-2"):
        assert (tmp_path / run / "metrics.jsonl").read_text().count("\n") == 1
        assert (tmp_path / run / "final" / "config.json").is_file()
        assert (tmp_path / run / LOG_FILE).is_file()
    assert (tmp_path / "two" / "config.yaml").is_file()


def without(part: str) -> list[str]:
    return [override for override in TINY_RUN if part not in override]


def test_the_entry_point_is_a_typer_application() -> None:
    assert isinstance(app, typer.Typer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", f"hydra.run.dir={'x' * 300}"], "File name too long; choose another hydra.run.dir"),
        (["train", "-m", "seed=1,2", f"hydra.sweep.dir={'x' * 300}"], "choose another hydra.sweep.dir"),
        (["sweep", "seed=1,2", f"hydra.sweep.dir={'x' * 300}"], "choose another hydra.sweep.dir"),
        (["sweep", f"compare={'x' * 300}"], "File name too long"),
        (["evaluate", f"run={'x' * 300}"], "File name too long"),
        (["report", "x" * 300], "File name too long"),
        (["train", "hydra.run.dir=file"], "file is not a folder; choose another hydra.run.dir"),
        (["train", "hydra.run.dir=file/inside"], "file is not a folder; choose another hydra.run.dir"),
        (["sweep", "seed=1,2", "hydra.sweep.dir=file/inside"], "choose another hydra.sweep.dir"),
        (["evaluate", "run=file"], "file is not the folder of a run"),
        (["report", "file"], "file"),
    ],
)
def test_a_folder_that_cannot_be_one_is_named_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("rcpo: ") == 1 and "Traceback" not in result.output
    assert max(map(len, result.stderr.splitlines())) < 400


@pytest.mark.parametrize("command", ["evaluate", "report", "sweep"])
def test_a_folder_without_permission_is_named_in_one_message(command: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to become a user without permissions needs root")
    closed = tmp_path / "closed"
    (closed / "run").mkdir(parents=True)
    save_run_config(RunConfig(), closed / "run" / "config.yaml")
    closed.chmod(0o700)
    argument = {"evaluate": f"run={closed / 'run'}", "report": str(closed), "sweep": f"compare={closed}"}
    CliRunner().invoke(app, [command, argument[command]])  # imports what it needs, which may lie in a home
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.setgid(54321)
        os.setuid(54321)
        result = CliRunner().invoke(app, [command, argument[command]])
        os.write(write, f"{result.exit_code} {result.stderr}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        code, _, message = said.read().partition(" ")
    assert code == "2" and message.startswith("rcpo: ") and "Permission denied" in message, message
    assert len(message.splitlines()) == 1 and str(closed) in message
