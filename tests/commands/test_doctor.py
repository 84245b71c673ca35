"""The doctor's findings: each stated with what would fail, and an exit code that follows from them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rcpo.commands import doctor
from rcpo.commands.doctor import BAD, GOOD, WARN, Finding


def test_a_machine_that_trains_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine() == 0
    text = capsys.readouterr().out
    for part in (
        "torch",
        "DeepSpeed",
        "C++ compiler",
        "ninja",
        "ranks",
        "SLURM",
        "wandb",
        "hub",
        "memory",
        "disk",
    ):
        assert part in text
    assert "`rcpo train` can run here." in text


@pytest.mark.parametrize(("state", "code"), [(GOOD, 0), (WARN, 0), (BAD, 1)])
def test_only_what_stops_training_fails(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("moon phase", state, "waning [sic]", "wait a week")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [finding],))
    assert doctor.examine() == code
    text = capsys.readouterr().out
    assert "waning [sic]" in text
    assert ("cannot run here: moon phase" in text) == (code == 1)


def test_what_cannot_be_looked_at_hides_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def _slow() -> list[Finding]:
        raise subprocess.TimeoutExpired("python", 120)

    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()  # as after another terminal removed the folder
    monkeypatch.setattr(doctor, "CHECKS", (_slow, doctor._disk, doctor._memory))
    assert doctor.examine() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "slow" in text and "timed out after 120 seconds" in text
    assert "disk" in text and "No such file or directory" in text and "GiB free of" in text


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/nowhere/cache"}, "/nowhere/cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/nowhere/cache", "HF_HOME": "/nowhere/hf"}, "/nowhere/hf/hub"),
        ({"HF_HUB_CACHE": "/nowhere/hub"}, "/nowhere/hub"),
    ],
)
def test_the_hub_s_cache_is_where_the_hub_s_library_has_it(environment: dict[str, str], folder: str) -> None:
    (finding,) = doctor._hub(environment)
    assert finding.found.startswith(f"{folder}: ")


def test_a_machine_without_a_compiler_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    assert [finding.state for finding in doctor._compiler()] == [BAD, BAD]


def test_ranks_that_cannot_meet_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    (finding,) = doctor._ranks()
    assert finding.state == BAD
    assert "MASTER_ADDR" in finding.advice
    assert "MASTER_PORT" not in finding.advice
