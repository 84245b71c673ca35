"""Forked programs are what programs of their own would be: children with pipes, signals, and exit codes."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import psutil
import pytest
import rewritten
from _pytest.assertion import rewrite


def run(code: str, *words: str, **named: object) -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, "-c", code, *words], **named)  # type: ignore[arg-type]


def test_a_program_gets_words_folder_environment_and_gives_output_and_code(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), dict(os.environ)); sys.exit('the end')"
    done = run(code, "a b", cwd=tmp_path, env={"KEY": "value"})
    assert done.stdout == f"['-c', 'a b'] {tmp_path} {{'KEY': 'value'}}\n"
    assert (done.stderr, done.returncode) == ("the end\n", 1)


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", -9)]
)
def test_exit_codes_are_those_of_a_process(end: str, code: int) -> None:
    assert run(f"import os, sys\n{end}").returncode == code


def test_an_exception_is_shown_and_ends_with_1_after_atexit() -> None:
    done = run("import atexit; atexit.register(print, 'at exit'); 1 / 0")
    assert (done.returncode, done.stdout) == (1, "at exit\n") and "ZeroDivisionError" in done.stderr


def test_a_script_finds_its_neighbors_and_pythonpath(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name, text in (("script", "import near, far_off"), ("near", "print(1)"), ("far/far_off", "print(2)")):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "far")}
    assert forked.run([sys.executable, tmp_path / "script.py"], env=environment).stdout == "1\n2\n"


def test_it_is_a_child_with_its_own_session_and_takes_signals() -> None:
    code = "import os, time; print(os.getppid(), os.getsid(0) == os.getpid(), flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code]
    process = forked.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == f"{os.getpid()} True\n"
    assert process.pid in {child.pid for child in psutil.Process().children()}
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()


def test_what_it_starts_is_forked_too_and_fresh() -> None:
    inner = "import os, sys, torch; print(os.getppid(), torch.x if hasattr(torch, 'x') else 'fresh')"
    code = f"""
import os, subprocess, sys, time, torch
torch.x = os.environ["X"] = "stale"
start = time.process_time()
done = subprocess.run([sys.executable, "-c", {inner!r}], capture_output=True, text=True)
assert done.stdout.split() == [str(os.getpid()), "fresh"], done
assert subprocess.run(["sh", "-c", "echo $X"], capture_output=True, text=True).stdout == "stale\\n"
"""
    assert run(code).returncode == 0


def test_more_imports_are_there_before_a_program_starts() -> None:
    """The servers of such programs are forked from the first, and do what it does."""
    module = "wsgiref.simple_server"
    code = f"import os, sys; print(os.getppid(), {module!r} in sys.modules, sys.stdin.read())"
    words = [sys.executable, "-c", code]
    assert forked.run(words, stdin=subprocess.DEVNULL).stdout == f"{os.getpid()} False \n"
    with_more = forked.run(words, imports=[module], stdin=subprocess.DEVNULL)
    assert with_more.stdout == f"{os.getpid()} True \n"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    nested = forked.run([sys.executable, "-c", script], imports=[module], stdin=subprocess.DEVNULL)
    assert nested.stdout.split()[1:] == ["True"]


def test_rcpo_s_options_are_read_and_nothing_is_left_of_the_reading() -> None:
    code = """
import sys
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
print(ConfigRepository.load_config.__module__, GlobalHydra.instance().is_initialized())
print(sys.argv[1] in sys.path)
"""
    done = run(code, str(Path(forked.__file__).parent))
    assert done.stdout == "compositions False\nFalse\n", done.stderr


def test_rewritten_assertions_are_pytest_s_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_rewrite_test", rewritten.PLAIN)
    file = Path(shutil.copy(__file__, tmp_path))
    rewritten.keep([file])
    _, kept = rewrite._rewrite_test(file, None)  # type: ignore[arg-type]
    tree = ast.parse(file.read_bytes())
    rewrite.rewrite_asserts(tree, file.read_bytes())
    assert kept == compile(tree, str(file), "exec", dont_inherit=True)
    assert rewrite._rewrite_test(file, None)[1] is kept  # type: ignore[arg-type]


def test_what_cannot_be_forked_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot be forked"):
        forked.run(["true"])
