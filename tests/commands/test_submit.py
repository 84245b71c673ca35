"""`rcpo submit` with a stand-in for SLURM's programs: what is written, what is refused, what status shows."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from rcpo.cli import app
from rcpo.commands.chain import submit_chain
from rcpo.commands.submit import submit
from rcpo.config.parsing import load_run_config, save_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import Outcome, read_outcome
from rcpo.runs.environment import git_state
from rcpo.slurm.conclude import main as conclude
from rcpo.slurm.queue import Queued, job_id, queue, read_submitted
from rcpo.slurm.settings import slurm_config, slurm_seconds
from rcpo.slurm.status import cells, last_row, lines, report_status
from rcpo.system.files import write_privately


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and SLURM's programs: sbatch gives job 41, squeue shows `queue`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    bodies = {"sbatch": 'cp "$2" ../sent; echo "41;cluster"', "squeue": "cat ../queue"}
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "queue").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def test_a_submitted_run_has_configuration_code_and_script(slurm: Path) -> None:
    assert submit("train", ["objective=simpo", "hydra.run.dir=mine", "slurm.nodes=2"], dry_run=False) == 0
    run = Path("mine").absolute()
    config = load_run_config(run)
    # the job goes on in its own folder, and has as many ranks as SLURM starts
    assert (config.objective.name, config.resume, config.launch.processes) == ("simpo", "auto", 1)
    assert (run / "train.sbatch").read_text() == (slurm / "sent").read_text()
    assert (run / "code" / "rcpo" / "launch" / "__main__.py").is_file()
    assert (run / "code" / "conf" / "config.yaml").is_file()
    submitted = read_submitted(run, "train")
    assert submitted is not None
    assert (submitted.job, submitted.runs, submitted.array) == ("41", [str(run)], False)
    assert submitted.command == ["train", "objective=simpo", "hydra.run.dir=mine", "slurm.nodes=2"]
    assert job_id("mine") == "41" and job_id("7_3") == "7_3"


def test_a_job_s_copy_of_the_code_knows_its_commit(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"commit": "0" * 40, "dirty": True}
    monkeypatch.setattr("rcpo.slurm.snapshot.git_state", lambda file: here)
    assert submit("train", ["objective=simpo", "hydra.run.dir=mine"], dry_run=False) == 0
    # environment.json of the run, which the job writes, takes it from here
    assert git_state(Path("mine/code/rcpo/runs/environment.py")) == here


def test_a_dry_run_shows_the_script_and_touches_nothing(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("train", ["hydra.run.dir=mine"], dry_run=True) == 0
    assert submit("sweep", ["seed=1,2", "hydra.sweep.dir=many"], dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.count("#!/bin/bash") == 2 and f"# {Path('many/seed-2').absolute()}" in said
    assert list(Path().iterdir()) == [] and not (slurm / "sent").exists()


def test_the_configuration_is_shown_and_nothing_checked(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model=llama-3-8b", "slurm.nodes=3", "--cfg", "job"]  # weights that are not here
    assert submit("train", arguments, dry_run=False) == 0
    said = capsys.readouterr().out
    assert "nodes: 3" in said and "#!/bin/bash" not in said and not (slurm / "sent").exists()


def test_a_sweep_is_an_array_of_what_can_run(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("sweep", ["objective.beta=0,0.5,1", "hydra.sweep.dir=many"], dry_run=False) == 1
    many = Path("many").absolute()
    assert (many / "runs.txt").read_text() == f"{many}/objective.beta-0.5\n{many}/objective.beta-1\n"
    assert load_run_config(many / "objective.beta-1").objective.hyperparameters["beta"] == 1
    refused = read_outcome(many / "objective.beta-0")
    assert refused is not None and refused.code == 2 and "out of range" in str(refused.reason)
    assert "objective.beta-0: objective.beta=0 is out of range" in capsys.readouterr().err
    assert "--array=0-1\n" in (slurm / "sent").read_text()


def test_what_a_job_before_has_yet_to_write_is_not_missed(slurm: Path) -> None:
    assert submit("train", ["objective=sft", "hydra.run.dir=first"], dry_run=False) == 0
    later = ["model=local", "model.path=first/final", "hydra.run.dir=second"]
    with pytest.raises(ConfigError, match="first/final"):
        submit("train", later, dry_run=False)
    assert submit("train", [*later, "slurm.after=first"], dry_run=False) == 0
    assert "--dependency=afterok:41\n" in (slurm / "sent").read_text()
    assert submit("evaluate", ["run=second", "eval.max_examples=8", "slurm.after=second"], dry_run=False) == 0
    sent = (slurm / "sent").read_text()
    assert f"-m rcpo.cli evaluate run={Path('second').absolute()} eval.max_examples=8 &" in sent
    assert read_submitted(Path("second"), "evaluate") is not None


def test_an_evaluation_s_job_takes_variables_of_the_environment(slurm: Path) -> None:
    submit("train", ["hydra.run.dir=mine"], dry_run=False)
    assert submit("evaluate", ["run=mine", "slurm.env.A=b", "eval.max_examples=8"], dry_run=False) == 0
    sent = (slurm / "sent").read_text()
    assert "export A=b\n" in sent
    assert f"-m rcpo.cli evaluate run={Path('mine').absolute()} eval.max_examples=8 &" in sent


def test_the_user_s_objective_is_in_the_snapshot(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("conf/objective").mkdir(parents=True)
    Path("conf/objective/own.yaml").write_text("name: own_of_slurm\nmodule: own_of_slurm\n")
    Path("own_of_slurm.py").write_text(
        "from rcpo.method.objectives import register\n\n\n"
        "@register('own_of_slurm', reduction='mean', needs_reference=False)\n"
        "def own(logps):\n    return (logps.chosen - logps.rejected).square()\n"
    )
    submit("train", ["objective=own", "--config-dir", "conf", "hydra.run.dir=mine"], dry_run=False)
    assert "needs_reference=False" in Path("mine/code/own_of_slurm.py").read_text()


@pytest.mark.parametrize(
    ("command", "arguments", "part"),
    [
        ("train", ["slurm.nodes=3"], "3 process"),
        ("train", ["objective=smpo"], "did you mean simpo?"),
        ("train", ["slurm.node=2"], "did you mean slurm.nodes?"),
        ("train", ["launch.processes=2"], "slurm.ranks_per_node"),
        ("train", ["resume=/"], "resume=/: a job continues in its own folder: hydra.run.dir"),
        ("train", ["slurm.time=8h"], "slurm.time=8h is not a time .* HH:MM:SS"),
        (
            "train",
            ["slurm.time=2:00"],
            "slurm.time=2:00 is no longer than slurm.signal_seconds=120: .* a longer",
        ),
        ("train", ["slurm.time=43200"], "slurm.time=43200 is a bare number, .* 12:00:00"),
        ("train", ["slurm.modules=cuda"], r"slurm.modules=cuda is not a list; write slurm.modules=\[cuda\]"),
        ("train", ["slurm.env=[a]"], "slurm.env=.* is not a mapping; set its keys: slurm.env.NAME=VALUE"),
        ("train", ["slurm.partition="], "slurm.partition= is empty; give a value, or null for none"),
        ("train", ["slurm.time=0-1", "slurm.signal_seconds=3600"], "no longer than slurm.signal_seconds"),
        ("train", ["slurm.after=nowhere"], "neither a job id nor the folder"),
        ("train", ["-m", "seed=1,2"], "rcpo submit sweep"),
        ("train", ["seed=1,2"], "seed=1,2 holds several values: give one"),
        ("train", ["sweep.parallel=2"], "is read by rcpo sweep"),
        ("evaluate", ["eval.max_examples=3"], "run=DIR"),
        ("evaluate", ["run=nowhere"], "is not a folder"),
    ],
)
def test_a_refused_submission_leaves_nothing(
    command: str, arguments: list[str], part: str, slurm: Path
) -> None:
    with pytest.raises(ConfigError, match=part):
        submit(command, arguments, dry_run=False)
    assert list(Path().iterdir()) == [] and not (slurm / "sent").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60),
        ("2:30", 3 * 60),
        ("08:00:00", 8 * 3600),
        ("1:2:3", 3600 + 3 * 60),
        ("2-0", 2 * 86400),
        ("1-12", 36 * 3600),
        ("1-12:30", 36.5 * 3600),
        ("0-00:01:30", 2 * 60),
        ("0", math.inf),
        ("unlimited", math.inf),
    ],
)
def test_a_time_limit_counts_what_it_counts_for_sbatch(time: str, seconds: float) -> None:
    assert slurm_seconds(time) == seconds


def test_a_time_that_yaml_reads_as_a_number_of_seconds_is_refused(slurm: Path) -> None:
    """43200 would be a month of minutes for sbatch."""
    folder = Path("my_conf", "slurm")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [default, _self_]\ntime: 12:00:00\n")
    with pytest.raises(ConfigError, match=r"slurm\.time=43200 is a bare number.*put a file's time in quotes"):
        submit("train", ["--config-dir", "my_conf", "slurm=mine"], dry_run=True)


@pytest.mark.parametrize("time", ["", "8h", "1:2:3:4", "1-", "-5", "1.5", "1-2-3", "01:00:00 "])
def test_what_sbatch_would_not_read_is_no_time(time: str) -> None:
    with pytest.raises(ConfigError, match=f"slurm.time={time} is not a time"):
        slurm_seconds(time)


def test_keys_of_slurm_are_read_by_submit_alone(slurm: Path) -> None:
    result = CliRunner().invoke(app, ["train", "slurm.nodes=2"])
    assert result.exit_code == 2 and "slurm is read by rcpo submit alone" in result.stderr


def test_secrets_of_the_environment_are_neither_shown_nor_readable(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["slurm.env={HF_HUB_AUTH: planted1}", "+slurm.env.OTHER=planted2", "hydra.run.dir=mine"]
    assert submit("train", keys, dry_run=True) == submit("train", keys, dry_run=False) == 0
    said = capsys.readouterr()
    assert "planted" not in said.out + said.err and "export OTHER='***'" in said.out
    script = Path("mine/train.sbatch")
    assert "export HF_HUB_AUTH=planted1\nexport OTHER=planted2\n" in script.read_text()
    assert script.stat().st_mode & 0o777 == 0o600
    others = [path for path in Path("mine").rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert len(others) > 100 and not any(b"planted" in path.read_bytes() for path in others)
    assert json.loads(Path("mine/job-train.json").read_text())["command"] == [
        "train", "slurm.env=***", "+slurm.env.OTHER=***", "hydra.run.dir=mine",
    ]  # fmt: skip


def test_secrets_of_a_chain_of_jobs_are_neither_shown_nor_readable(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["rounds=1", "slurm.env={HF_HUB_AUTH: planted1}", "train.micro_batch_size=8", "hydra.run.dir=it"]
    assert submit_chain(keys, dry_run=True) == 0
    said = capsys.readouterr()
    assert "planted" not in said.out + said.err and "export HF_HUB_AUTH='***'" in said.out
    assert submit_chain(keys, dry_run=False) == 0
    script = Path("it/round-1/train/train.sbatch")
    assert "export HF_HUB_AUTH=planted1\n" in script.read_text()
    assert script.stat().st_mode & 0o777 == 0o600
    others = [path for path in Path("it").rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert not any(b"planted" in path.read_bytes() for path in others)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("slurm.name='a\nrm -rf x'", "slurm.name=.* do not print"),
        ("slurm.partition='a\rb'", "slurm.partition=.* do not print"),
        ("slurm.memory='1G\u2028x'", "slurm.memory=.* do not print"),
        ("slurm.sbatch=['--comment=a\nb']", "slurm.sbatch=.* do not print"),
        ("slurm.sbatch=[exclusive]", "'exclusive' is not a flag of sbatch"),
        ("slurm.after='\u00b2'", "neither a job id nor the folder"),
        ("hydra.run.dir='a\nb'", "cannot be a line of a batch script"),
    ],
)
def test_what_would_be_a_command_of_the_script_is_refused(given: str, part: str, slurm: Path) -> None:
    with pytest.raises(ConfigError, match=part):
        submit("train", [given], dry_run=False)
    assert list(Path().iterdir()) == [] and not (slurm / "sent").exists()


def test_a_private_file_leaves_no_unfinished_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rcpo.system.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_privately(tmp_path / "train.sbatch", "export KEY=secret")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["A B", "1A", "A;rm", "", "A=B", "Ä", "A\n"])
def test_what_is_not_the_name_of_a_variable_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.env: .* is not the name of a variable"):
        slurm_config(OmegaConf.create({"slurm": {"env": {name: "x"}}}))


def test_the_readme_s_two_nodes_of_eight_gpus_are_taken(slurm: Path) -> None:
    keys = ["objective=simpo", "rc=on", "slurm.nodes=2", "slurm.gpus_per_node=8", "hydra.run.dir=mine"]
    assert submit("train", keys, dry_run=False) == 0
    train = load_run_config(Path("mine")).train
    assert train.micro_batch_size is None and train.microbatch(16) == 2  # 32 pairs on 16 ranks


def test_runs_that_share_a_folder_are_refused_before_any_is_submitted(slurm: Path) -> None:
    with pytest.raises(ConfigError, match=r"two runs of this sweep have the same folder .*seed-1: seed=1"):
        submit("sweep", ["seed=1,1", "hydra.sweep.dir=many"], dry_run=False)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["eval.max_exampels=3"], "did you mean eval.max_examples"),
        (["eval.max_examples=0"], "eval.max_examples=0 is out of range"),
        (["-m"], "one run at a time"),
        (["sweep.parallel=2"], "is read by rcpo sweep"),
        (["eval.preferences=false"], "nothing to evaluate"),
    ],
)
def test_an_evaluation_is_checked_before_it_waits(arguments: list[str], part: str, slurm: Path) -> None:
    submit("train", ["hydra.run.dir=mine"], dry_run=False)
    (slurm / "sent").unlink()
    with pytest.raises(ConfigError, match=part):
        submit("evaluate", ["run=mine", *arguments], dry_run=False)
    assert not (slurm / "sent").exists()


def test_only_a_run_can_be_evaluated(slurm: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="empty is not the folder of a run"):
        submit("evaluate", ["run=empty"], dry_run=False)
    Path("lost").mkdir()
    save_run_config(RunConfig(), Path("lost/config.yaml"))
    with pytest.raises(ConfigError, match="lost has no final/ and no job that is to write it"):
        submit("evaluate", ["run=lost"], dry_run=False)


def test_an_evaluation_s_end_is_its_own_and_not_the_run_s(slurm: Path) -> None:
    submit("train", ["hydra.run.dir=mine"], dry_run=False)
    submit("evaluate", ["run=mine"], dry_run=False)
    Path("mine/finished.json").write_text("{}")
    submitted = read_submitted(Path("mine"), "evaluate")
    assert submitted is not None
    assert [line.state for line in lines(submitted, {}, "evaluate")] == ["GONE"]
    Path("mine/rcpo.log").write_text(
        "[now][rcpo][ERROR] - evaluate failed\nTraceback (most recent call last):\nE: x\n"
    )
    assert conclude(["evaluate", "mine", "1"]) == 0
    assert [line.state for line in lines(submitted, {}, "evaluate")] == ["exit code 1: E: x"]
    assert conclude(["evaluate", "mine", "0"]) == 0
    assert [line.state for line in lines(submitted, {}, "evaluate")] == ["DONE"]
    submit("evaluate", ["run=mine"], dry_run=False)  # the end before is not this one's
    assert [line.state for line in lines(submitted, {}, "evaluate")] == ["GONE"]


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"job": 1}', "null"])
def test_a_damaged_record_of_a_job_is_named(content: str, slurm: Path) -> None:
    Path("mine").mkdir()
    Path("mine/job-train.json").write_text(content)
    for call in (lambda: read_submitted(Path("mine"), "train"), lambda: report_status(["mine"])):
        with pytest.raises(ConfigError, match=r"mine/job-train\.json is damaged.*remove it"):
            call()


def test_a_machine_without_slurm_is_named(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = CliRunner().invoke(app, ["submit", "train", "hydra.run.dir=mine"])
    assert result.exit_code == 2 and "sbatch is not on this machine" in result.stderr


def test_a_folder_whose_job_waits_is_not_submitted_twice(slurm: Path) -> None:
    submit("train", ["hydra.run.dir=mine"], dry_run=False)
    (slurm / "queue").write_text("41|PENDING|0:00|(Priority)\n")
    with pytest.raises(ConfigError, match="is job 41 already"):
        submit("train", ["hydra.run.dir=mine"], dry_run=False)
    (slurm / "queue").write_text("41|FAILED|0:00|n1\n")
    assert submit("train", ["hydra.run.dir=mine"], dry_run=False) == 0


def test_status_shows_jobs_runs_steps_and_metrics(slurm: Path) -> None:
    submit("sweep", ["seed=1,2,3", "hydra.sweep.dir=many"], dry_run=False)
    submitted = read_submitted(Path("many"), "sweep")
    assert submitted is not None
    row = {"step": 12, "loss": 0.25, "logratios/chosen": -0.5, "rc/alpha": None}
    Path("many/seed-1/metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 13, "lo')
    Outcome(1, "RunError: full").write(Path("many/seed-3"))
    (slurm / "queue").write_text("41_0|RUNNING|1:02|n1\n41_1|PENDING|0:00|(Resources)\n7|RUNNING|0:01|n2\n")
    found = lines(submitted, queue())
    assert [(line.job, line.state, line.where) for line in found] == [
        ("41_0", "RUNNING", "n1"),
        ("41_1", "PENDING", "(Resources)"),
        ("41_2", "exit code 1: RunError: full", ""),
    ]
    shown = cells(found[0])
    assert shown[4:10] == ["many/seed-1", "12", "0.25", "-0.5", "", ""]
    result = CliRunner().invoke(app, ["submit", "status", "many"])
    assert result.exit_code == 0 and "RUNNING" in result.stdout and "41_1" in result.stdout
    assert CliRunner().invoke(app, ["submit", "status"]).exit_code == 2


def test_a_job_that_slurm_forgot_is_what_its_folder_says(slurm: Path) -> None:
    submit("train", ["hydra.run.dir=mine"], dry_run=False)
    submitted = read_submitted(Path("mine"), "train")
    assert submitted is not None
    assert [line.state for line in lines(submitted, {})] == ["GONE"]
    Path("mine/finished.json").write_text("{}")
    assert [line.state for line in lines(submitted, {})] == ["DONE"]
    assert [line.state for line in lines(submitted, {"41": Queued("RUNNING", "", "")})] == ["RUNNING"]
    Path("mine/finished.json").write_text('{"evaluated": false}')  # trained, and its evaluation failed
    Outcome(1, "the harness failed").write(Path("mine"))
    assert [line.state for line in lines(submitted, {})] == ["exit code 1: the harness failed"]
    Path("mine/finished.json").write_text("{")  # the other jobs are shown all the same
    (state,) = [line.state for line in lines(submitted, {})]
    assert "finished.json is damaged" in state


def test_the_last_whole_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == ({}, None)
    path.write_text('{"step": 1')
    assert last_row(path)[0] == {}
    path.write_text("".join(json.dumps({"step": n, "pad": "x" * 1000}) + "\n" for n in range(200)))
    assert last_row(path)[0]["step"] == 199
