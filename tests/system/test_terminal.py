"""Standard streams that last: other encodings, readers that leave, full disks, closed ones; no home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcpo.system import terminal

ROOT = str(Path(terminal.__file__).parents[1])
# prints more than a pipe holds, then leaves a file that says how far it came
PROGRAM = """
import pathlib, sys
from rcpo.system import terminal
terminal.prepare()
for number in range(20000):
    print(f"α ━ step {number}")
pathlib.Path(sys.argv[1]).write_text("went on")
sys.exit(75)
"""


def program(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, **variables}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_becomes_a_question_mark(encoding: str) -> None:
    text = "from rcpo.system import terminal; terminal.prepare(); print('a \\u2501 \\U0001f600 \\udcff')"
    found = subprocess.run(
        program(text), capture_output=True, env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    )
    assert found.returncode == 0, found.stderr
    shown = found.stdout.decode(encoding)
    assert shown == {"utf-8": "a \u2501 \U0001f600 ?\n", "gbk": "a \u2501 ? ?\n"}.get(encoding, "a ? ? ?\n")


def test_a_minus_stays_a_minus_in_any_encoding() -> None:
    text = "from rcpo.system import terminal; terminal.prepare(); print('\\u22121.5 \\u00b1 2 \\u03b1')"
    found = subprocess.run(program(text), capture_output=True, env=environment(PYTHONIOENCODING="ascii"))
    assert found.stdout.decode("ascii") == "-1.5 +/- 2 alpha\n"


def test_a_reader_that_leaves_does_not_end_the_process(tmp_path: Path) -> None:
    done = tmp_path / "done"
    process = subprocess.Popen(
        program(PROGRAM, str(done)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().decode() == "α ━ step 0\n"
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 75 and done.read_text() == "went on"
    assert said == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_output_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with open("/dev/full", "wb") as full:
        found = subprocess.run(
            program(PROGRAM, str(done)), stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert found.returncode == 75 and done.read_text() == "went on"
    assert found.stderr.decode().count("standard output cannot be written to (No space left") == 1
    assert len(found.stderr.splitlines()) == 1


def test_closed_streams_are_no_other_file_s(tmp_path: Path) -> None:
    text = """
import os, sys
from rcpo.system import terminal
terminal.prepare()
with open(sys.argv[1], "w") as file:
    print("to nobody")
    os.write(1, b"to nobody either")
    print("an error for nobody", file=sys.stderr)
    file.write("own")
"""
    target = tmp_path / "file"
    command = [*program(text, str(target))]
    shell = 'exec "$@" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", shell, "sh", *command], env=environment()).returncode == 0
    assert target.read_text() == "own"


def test_a_user_without_home_and_name_has_temporary_ones() -> None:
    if os.geteuid() != 0:
        pytest.skip("to become an unknown user needs root")
    text = """
import getpass, os
from pathlib import Path
from rcpo.system import terminal
os.setgid(54321)
os.setuid(54321)  # after the imports: this interpreter may lie where others cannot read
terminal.prepare()
assert getpass.getuser() == "user54321"
assert Path.home().is_dir() and os.access(Path.home(), os.W_OK)
print(Path.home())
"""
    kept = {
        key: value for key, value in environment().items() if key not in ("HOME", "USER", "LOGNAME", "LNAME")
    } | {"USERNAME": ""}
    found = subprocess.run(program(text), capture_output=True, text=True, env=kept)
    assert found.returncode == 0, found.stderr
    assert "user 54321 has no home folder" in found.stderr and len(found.stderr.splitlines()) == 1
    assert not Path(found.stdout.strip()).exists()


def test_a_launcher_s_empty_variables_are_not_set() -> None:
    text = "import os; from rcpo.system import terminal; terminal.prepare(); "
    text += "print(*map(os.environ.get, ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))"
    given = environment(RANK="", WORLD_SIZE=" ", LOCAL_RANK="3")
    found = subprocess.run(program(text), capture_output=True, text=True, env=given)
    assert found.stdout == "None None 3\n", found.stderr
