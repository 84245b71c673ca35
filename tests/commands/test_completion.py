"""Tab completion: what is offered where, how fast, and that bash, zsh, and fish insert it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from permissions import files_no_longer_than

from rcpo.cli import known_commands
from rcpo.commands import completion, keys, listing
from rcpo.commands.completion import HYDRA_FLAGS, complete
from rcpo.commands.shells import answer, install, script, split_line
from rcpo.errors import ConfigError

COMMANDS = known_commands()


def offered(line: str) -> list[str]:
    """What is offered at the end of a command line without the program's name."""
    *words, current = line.split(" ")
    return [word.text for word in complete(words, current, COMMANDS)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data, a run, and a sweep with a run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "my pairs.jsonl").write_text("")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "inputs").mkdir()
    for run in ("outputs/first", "outputs/sweep/0_dpo"):
        (tmp_path / run / "final").mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("tra", ["train"]),
        ("--ver", ["--version"]),
        ("train objective=simp", ["objective=simper", "objective=simpo"]),
        ("train objectiv", ["objective=", "objective."]),
        ("train -m objective=dpo,simpo,or", ["objective=dpo,simpo,orpo"]),
        ("train optim.l", ["optim.lr="]),
        ("train +optim.l", ["+optim.lr="]),
        ("train rc.co", ["rc.control."]),
        ("train rc.control.", ["rc.control.pairs=", "rc.control.every="]),
        ("train rc.rule=", ["rc.rule=center", "rc.rule=edge", "rc.rule=loop", "rc.rule=fixed"]),
        ("train rc=o", ["rc=off", "rc=on"]),
        (
            "train train.gradient_checkpointing=",
            [f"train.gradient_checkpointing={x}" for x in ("true", "false")],
        ),
        ("train objective=simpo objective.ga", ["objective.gamma="]),
        ("train objective=dpo objective.ga", []),
        ("train objective=dpo_mean objective.be", ["objective.beta="]),
        ("train objective.div", ["objective.divergence=", "objective.divergence_alpha="]),
        ("train objective.divergence=j", ["objective.divergence=js"]),
        ("train data.path=p", ["data.path=pairs.jsonl"]),
        ("train data.path=in", ["data.path=inputs/"]),
        ("train data.path=.h", ["data.path=.hidden"]),
        (
            "train model.path=",
            [f"model.path={x}" for x in ("inputs/", "my pairs.jsonl", "outputs/", "pairs.jsonl", "null")],
        ),
        ("train seed", ["seed="]),
        ("train hydra.run.dir=i", ["hydra.run.dir=inputs/"]),
        ("train help=opt", ["help=optim"]),
        ("train resume=a", ["resume=auto"]),
        ("train --cf", ["--cfg"]),
        ("train --cfg ", ["job", "hydra", "all"]),
        ("train --config-dir in", ["inputs/"]),
        ("train slurm", []),
        ("submit s", ["sweep", "status"]),
        ("submit --dry", ["--dry-run"]),
        ("submit train slurm.nod", ["slurm.nodes="]),
        ("plan gpu=h2", ["gpu=h200"]),
        ("sample score=le", ["score=length"]),
        ("list stu", ["studies"]),
        ("report --mark", ["--markdown"]),
        ("unknown tra", []),
    ],
)
def test_what_is_offered(line: str, completions: list[str]) -> None:
    assert offered(line) == completions


def test_runs_are_offered_first_wherever_they_lie(folder: Path) -> None:
    os.utime(folder / "outputs/first", (1, 1))
    assert offered("evaluate run=")[:2] == ["run=outputs/sweep/0_dpo", "run=outputs/first"]
    assert offered("evaluate run=outputs/f") == ["run=outputs/first"]
    assert offered("report outputs/sweep/") == ["outputs/sweep/0_dpo"]
    assert "resume=outputs/first" in offered("train resume=")


def test_own_options_are_offered(folder: Path) -> None:
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / "mine.yaml").write_text("name: mine\n")
    assert offered("train --config-dir conf objective=mi") == ["objective=mix", "objective=mine"]
    assert offered("train objective=min") == []


def test_every_key_group_and_command_is_offered() -> None:
    for entry in keys.entries("train") + keys.entries("rc"):
        assert f"{entry.name}=" in offered(f"train {entry.name}")
    for group in ("objective", "rc", "model", "data", "engine", "optim", "adapter", "eval", "experiment"):
        assert f"{group}=" in offered(f"train {group}")
        shown = {word.partition("=")[2] for word in offered(f"train {group}=")}
        assert shown == set(listing.options(group))
    assert set(offered("")) == set(COMMANDS) - {""}
    assert set(keys.nodes()) <= {word.partition("=")[2] for word in offered("train help=")}


def test_the_flags_are_those_of_the_parser() -> None:
    from hydra._internal.utils import get_args_parser

    refused = {"--shell-completion", "--experimental-rerun", "--run", "--hydra-help", "--version"}
    flags = {
        flag for action in get_args_parser()._actions for flag in action.option_strings if flag[:2] == "--"
    }
    assert set(HYDRA_FLAGS) == (flags - refused) | {"--from-trl"}


def test_names_of_files_are_those_of_a_run() -> None:
    from rcpo.runs.folder import CONFIG_FILE, FINAL

    assert (completion.CONFIG_FILE, completion.FINAL) == (CONFIG_FILE, FINAL)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("rcpo train a", (["rcpo", "train"], "a", None)),
        ("rcpo train ", (["rcpo", "train"], "", None)),
        (r"rcpo my\ fi", (["rcpo"], "my fi", None)),
        ("rcpo 'my fi", (["rcpo"], "my fi", 0)),
        ('rcpo a="my fi', (["rcpo"], "a=my fi", 2)),
        ("rcpo 'a b' c", (["rcpo", "a b"], "c", None)),
        ("rcpo '' c", (["rcpo", ""], "c", None)),
    ],
)
def test_a_command_line_is_split_as_the_shell_does(line: str, parts: object) -> None:
    assert split_line(line) == parts


@pytest.mark.parametrize(
    ("line", "replacements"),
    [
        ("rcpo train objective=simpo", ["simpo "]),  # what follows the sign is a word of readline's
        ("rcpo train data.path=my", [r"my\ pairs.jsonl "]),
        ("rcpo train data.path='my", ["my pairs.jsonl "]),
        ("rcpo train 'data.path=my", ["data.path=my pairs.jsonl "]),
        ("rcpo train optim.l", ["optim.lr="]),
        ("rcpo train data.path=in", ["inputs/"]),
    ],
)
def test_bash_is_given_what_replaces_its_own_word(line: str, replacements: list[str]) -> None:
    assert answer("bash", [line, " \t\n\"'><=;|&(:"], COMMANDS) == replacements


def test_other_shells_are_given_the_meaning_too() -> None:
    assert answer("fish", ["train", "optim.l"], COMMANDS) == [
        "optim.lr=\tlearning rate, the highest of the schedule"
    ]


def test_installing_twice_changes_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bashrc").write_bytes(b"alias ll='ls -l' # \xe9")  # Latin 1, without a last line's end
    for shell in ("bash", "bash", "zsh", "fish"):
        assert install(shell) == 0
    lines = (tmp_path / ".bashrc").read_bytes().splitlines()
    assert lines[0] == b"alias ll='ls -l' # \xe9" and len(lines) == 2 and lines[1].startswith(b"source ")
    assert (tmp_path / ".local/share/rcpo/completion.bash").read_text() == script("bash")
    assert "completion.zsh" in (tmp_path / ".zshrc").read_text()
    assert (tmp_path / ".config/fish/completions/rcpo.fish").read_text() == script("fish")
    assert "new bash shells complete rcpo" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="rcpo completes in bash, zsh, fish, and this shell is tcsh"):
        install("tcsh")
    with pytest.raises(ConfigError, match="--show-completion tcsh: give one of bash, zsh, fish"):
        script("tcsh")


def test_a_full_disk_costs_no_line_of_the_shell_s_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    own = "alias ll='ls -l'\n" * 500
    (tmp_path / ".bashrc").write_text(own)
    with files_no_longer_than(len(own) - 1), pytest.raises(OSError, match="File too large"):
        install("bash")
    assert (tmp_path / ".bashrc").read_text() == own


@pytest.mark.parametrize(
    ("typed", "shown"), [("optim.", "optim.lr="), ("", "slurm."), ("help=", "help=plan")]
)
def test_a_key_press_imports_nothing_heavy(typed: str, shown: str) -> None:
    program = (
        "import os, sys; os.environ['_RCPO_COMPLETE'] = 'zsh'\n"
        f"sys.argv = ['rcpo', 'submit', 'train', '{typed}']\n"
        "from rcpo.cli import main; main(); print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown in result.stdout
    loaded = set(result.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "hydra", "omegaconf", "yaml", "numpy", "transformers", "rich"}


def processor_time(words: list[str], environment: dict[str, str]) -> float:
    """Seconds of processor time that `rcpo WORDS` takes as a process."""
    before = os.times()
    command = [sys.executable, "-m", "rcpo", *words]
    subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


@pytest.mark.serial
def test_a_key_press_takes_less_than_0_15_seconds() -> None:
    """In units of `rcpo --help`, which takes 0.05 s at rest: a busy machine slows both alike."""
    pairs = [
        (processor_time(["train", "objective="], {"_RCPO_COMPLETE": "zsh"}), processor_time(["--help"], {}))
        for _ in range(5)
    ]
    presses, helps = zip(*pairs, strict=True)
    assert min(presses) < 3 * min(helps), pairs


class Terminal:
    """A shell in a terminal emulator (tmux) of its own."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str]) -> None:
        socket = (
            Path(tempfile.mkdtemp(dir=folder)) / "s"
        )  # a server of its own: the one before may still be ending
        self.tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        variables = " ".join(shlex.quote("=".join(item)) for item in environment.items())
        unset = " ".join(f"-u {name}" for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR", "ENV"))
        size = ["-x", "150", "-y", "50", "-c", str(folder)]
        # a login shell between the two would reset PATH
        subprocess.run(
            [*self.tmux, "new-session", "-d", *size, f"exec env {unset} {variables} {command}"], check=True
        )

    def type(self, text: str) -> None:
        subprocess.run([*self.tmux, "send-keys", "-l", text], check=True)

    def screen(self) -> str:
        shown = subprocess.run(
            [*self.tmux, "capture-pane", "-p", "-N"], capture_output=True, text=True, check=True
        )
        return shown.stdout

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.screen():
            assert time.monotonic() < end, f"waited for {text!r}:\n{self.screen()}"
            time.sleep(0.05)

    def close(self) -> None:
        subprocess.run([*self.tmux, "kill-server"], check=False, capture_output=True)


SHELLS = {"bash": "bash --noprofile --rcfile {home}/.bashrc -i", "zsh": "zsh -i", "fish": "fish -i"}


@pytest.fixture(params=sorted(SHELLS))
def terminal(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Terminal]:
    """A shell with the completion installed by rcpo's own command, run from that shell."""
    shell = request.param
    for program in ("tmux", shell):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; .ci/run installs it")
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    wrapper = home / "bin" / "rcpo"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rcpo "$@"\n')
    wrapper.chmod(0o755)
    (home / ".bashrc").write_text("PS1='$ '\nbind 'set enable-bracketed-paste off'\n")
    (home / ".zshrc").write_text("PS1='$ '\nunsetopt beep\n")
    (home / ".config" / "fish").mkdir(parents=True)
    (home / ".local/share/fish/generated_completions").mkdir(
        parents=True
    )  # else fish reads all manuals first
    (home / ".config" / "fish" / "config.fish").write_text(
        "function fish_prompt; echo '$ '; end\nset fish_greeting\n"
    )
    environment = {
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "LC_ALL": "C.UTF-8",
    }
    command = SHELLS[shell].format(home=home)
    first = Terminal(command, folder, environment)
    try:
        first.wait_for("$")
        first.type("rcpo --install-completion\n")
        first.wait_for("rcpo: wrote")
    finally:
        first.close()
    second = Terminal(command, folder, environment)
    try:
        second.wait_for("$")
        yield second
    finally:
        second.close()


@pytest.mark.serial
def test_a_shell_inserts_commands_keys_values_files_and_runs(terminal: Terminal) -> None:
    terminal.type("rcpo tra\t")
    terminal.wait_for("rcpo train ")
    terminal.type("objective=simpo\t")
    terminal.wait_for("objective=simpo ")
    terminal.type("optim.sche\t")
    terminal.wait_for("optim.schedule=")
    terminal.type("lin\t")
    terminal.wait_for("optim.schedule=linear ")
    terminal.type("data.path=pai\t")
    terminal.wait_for("data.path=pairs.jsonl ")
    terminal.type("resume=outputs/fi\t")
    terminal.wait_for("resume=outputs/first ")
    terminal.type("rc=o\t\t")  # two options: both are shown
    terminal.wait_for("off")
