"""environment.json: versions, commit, hardware, and nothing secret."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rcpo.runs.environment import git_state, redact, write_environment


def test_versions_and_hardware_but_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value")
    monkeypatch.setattr(sys, "argv", ["rcpo", "train", "judge.api_key=hidden-value", "seed=3"])
    write_environment(tmp_path / "environment.json")
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert set(found["packages"]) >= {"transformers", "deepspeed", "hydra-core"}
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 2**20
    assert found["command"] == ["rcpo", "train", "judge.api_key=***", "seed=3"]
    assert "s3cr3t-value" not in text and "hidden-value" not in text


def test_a_continued_run_keeps_the_command_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "environment.json"
    for words, resumed in ((["rcpo", "train", "seed=2"], False), (["rcpo", "train", "resume=a"], True)):
        monkeypatch.setenv("RCPO_COMMAND", json.dumps(words))  # what a rank's own argv would hide
        write_environment(path, resumed=resumed)
    write_environment(path, resumed=True)
    found = json.loads(path.read_text())
    assert found["first_command"] == ["rcpo", "train", "seed=2"]
    assert found["command"] == ["rcpo", "train", "resume=a"]
    write_environment(path)
    assert "first_command" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("data.max_prompt_tokens=512", "data.max_prompt_tokens=512"),
        ("hub.token=abc", "hub.token=***"),
        ("slurm.env={HF_HUB_AUTH: planted}", "slurm.env=***"),  # the job's environment.json has the command
        ("+slurm.env.MY_PASS=planted", "+slurm.env.MY_PASS=***"),
        ("judge.base_url=https://me:pass@host/v1", "judge.base_url=https://me:***@host/v1"),
        ("judge.base_url=http://host:8000/v1", "judge.base_url=http://host:8000/v1"),
    ],
)
def test_secrets_on_the_command_line_are_masked(argument: str, shown: str) -> None:
    assert redact(argument) == shown


def test_git_state_of_a_tracked_a_changed_and_an_untracked_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    assert git_state(code) is None  # in a checkout, but not part of it
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    assert git_state(code) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    code.write_text("x = 2\n")
    assert git_state(code) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
