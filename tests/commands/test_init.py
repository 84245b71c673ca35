"""`rcpo init` makes a project whose own commands work."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import forked
import pytest

from rcpo.commands.init import COMMANDS, init
from rcpo.errors import ConfigError


@pytest.mark.slow
def test_every_command_that_init_prints_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tmp_path / "my project"
    assert init(project) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert shlex.split(printed[0]) == ["cd", str(project)]
    commands = [shlex.split(line.partition("#")[0]) for line in printed[1:]]
    assert [" ".join(words) for words in commands] == [command for command, _ in COMMANDS]
    readme = (project / "README.md").read_text()
    assert readme.startswith("# my project\n") and all(command in readme for command, _ in COMMANDS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RCPO_CACHE": str(tmp_path / "cache")}
    for program, *words in commands:
        assert program == "rcpo"
        result = forked.rcpo(words, project, environment)
        assert result.returncode == 0, (words, result.stdout, result.stderr)
    assert (project / "outputs/first/final/config.json").is_file()
    assert (project / "outputs/first/report.html").is_file()
    assert not (project / "outputs/first/train.sbatch").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not an empty folder; give the name of a new one"):
            init(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
