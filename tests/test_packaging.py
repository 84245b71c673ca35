"""The wheel, the pinned versions, and scripts/setup.sh with a stand-in for Python that installs nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import forked
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_structure import ROOT, imports, sources

import rcpo

WHEEL_LIMIT = 6_000_000  # the embedded model may take 5 MB

# Stands in for Python: `-m venv` copies it, pip notes its last argument and makes bin/rcpo.
STAND_IN = """#!/bin/bash
if [[ $1 == -c && $2 == *base_executable* ]]; then echo "$0"
elif [[ $1 == -m && $2 == venv ]]; then
    mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python"; echo venv >>"$CALLS"
elif [[ $1 == -m && $2 == pip ]]; then
    if [[ $3 == --version ]]; then exit 0; fi
    echo "pip ${*: -1}" >>"$CALLS"; sleep "${PIP_SECONDS:-0}"
    if [[ -n ${PIP_FAILS:-} ]]; then echo "no such package"; exit 1; fi
    printf '#!/bin/bash\\necho ran "$@"\\n' >"${0%/*}/rcpo"; chmod +x "${0%/*}/rcpo"
else exec REAL "$@"; fi
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("rcpo", "conf", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("rcpo-*.whl")
    return path


def test_wheel_carries_configuration_and_assets_unchanged(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for folder, prefix in ((ROOT / "conf", "rcpo/conf"), (ROOT / "rcpo" / "assets", "rcpo/assets")):
            files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
            assert files
            for path in files:
                packed = archive.read(f"{prefix}/{path.relative_to(folder).as_posix()}")
                assert packed == path.read_bytes()


def test_wheel_is_small_typed_licensed_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "rcpo = rcpo.cli:main" in archive.read(entry_points).decode()
    assert {"rcpo/py.typed", "rcpo/LICENSE", "rcpo/__init__.py"} <= set(names)
    assert "rcpo/report/templates/style.css" in names
    assert {name.split("/")[0] for name in names} == {"rcpo", f"rcpo-{rcpo.__version__}.dist-info"}
    assert wheel.stat().st_size < WHEEL_LIMIT


def test_installed_rcpo_finds_its_configuration(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = "import rcpo, sys; print(rcpo.__file__); from rcpo.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", program, "train", "objective=simpo", "rc=on", "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert "simpo" in result.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def closure() -> set[str]:
    """Every distribution that rcpo with its dev tools needs here, from the metadata of those installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    queue = [Requirement(text) for text in wanted]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for child in map(Requirement, metadata.requires(name) or []):
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return {name for name, _ in seen} - {"rcpo"}  # its dev tools name its other extras


def test_what_is_imported_is_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    optional = {
        canonicalize_name(Requirement(text).name)
        for extra, texts in project["optional-dependencies"].items()
        if extra != "dev"
        for text in texts
    }
    imported = {name.split(".")[0] for path in sources() for name in imports(path)}
    providers = metadata.packages_distributions()
    outside = imported - sys.stdlib_module_names - {"rcpo", "__future__"}
    missing = {"mlflow": "mlflow-skinny", "trackio": "trackio"}  # heavy extras, which need not be installed
    outside -= {"llamafactory"}  # it loads rcpo's plug-in, not the other way round
    used = {canonicalize_name(providers.get(name, [missing.get(name, "")])[0]) for name in outside}
    assert used <= declared | optional, "declare these in pyproject.toml"
    assert declared - used <= {"ninja"}, "nothing imports these"


def test_constraints_pin_all_that_is_installed() -> None:
    # What a CUDA build of torch brings along is pinned by torch itself.
    brought = re.compile(r"nvidia-|cuda-|triton")
    needed = {name for name in closure() if not brought.match(name)}
    assert {"torch", "mpmath", "antlr4-python3-runtime"} <= needed
    assert not needed - set(pins()), "add these to scripts/constraints.txt"


@pytest.mark.skipif(
    "RCPO_CONSTRAINTS" in os.environ, reason="other versions were asked for: unset RCPO_CONSTRAINTS"
)
def test_tests_run_with_the_pinned_versions() -> None:
    installed = {name: Version(metadata.version(name)).public for name in closure() & set(pins())}
    assert installed == {name: pins()[name] for name in installed}


# Stands in for the tests' Python: ruff passes, mypy as MYPY says, pytest writes what SKIPPED holds.
STAND_IN_TOOLS = """#!/bin/bash
case $2 in
    mypy) exit "${MYPY:-0}";;
    pytest) if [[ "$*" == *"not serial"* ]]; then printf "$SKIPPED" >>"$RCPO_SKIPPED"; fi;;
esac
"""


def last_line(clone: Clone, *arguments: str, **environment: str) -> tuple[int, str]:
    """scripts/test with stand-ins for its tools: its exit code and the last line of its output."""
    subprocess.run(
        ["bash", "-uc", f". {clone.root}/scripts/setup.sh && ensure_environment dev"],
        env=clone.environment,
        check=True,
        capture_output=True,
    )
    (clone.venv / "bin" / "python").write_text(STAND_IN_TOOLS)
    command = [clone.root / "scripts" / "test", *arguments]
    result = subprocess.run(
        command, env={**clone.environment, **environment}, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout.splitlines()[-1]


def test_the_last_line_names_what_was_not_tested_and_how_to_enable_it(clone: Clone) -> None:
    slurm = "SLURM is not installed (sbatch): apt-get install slurm-wlm munge"
    skipped = f"{slurm}\\n" * 5 + "no git\\n"
    assert last_line(clone, SKIPPED=skipped) == (
        0,
        f"scripts/test: not tested: 5 tests: {slurm}; 1 test: no git",
    )
    assert last_line(clone, SKIPPED="") == (0, "scripts/test: nothing was left out")
    code, line = last_line(clone, "--fast", SKIPPED=skipped, MYPY="1")
    assert code == 1 and line.startswith(
        "scripts/test: not tested: the tests marked slow or cluster (without"
    )
    assert line.endswith("; 1 test: no git")


def test_pytest_writes_down_why_it_skipped(tmp_path: Path) -> None:
    for name in ("conftest", "compositions", "environment", "forked", "prepared", "rewritten"):
        shutil.copy(ROOT / "tests" / f"{name}.py", tmp_path)
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_a(): pytest.skip('no\\nSLURM')\ndef test_b(): pass\n"
    )
    (tmp_path / "test_two.py").write_text("import pytest\npytest.importorskip('nothing_of_this_name')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "RCPO_SKIPPED": str(tmp_path / "skipped")}
    result = forked.run(command, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    reasons = sorted((tmp_path / "skipped").read_text().splitlines())
    assert len(reasons) == 2 and reasons[0].startswith("could not import") and reasons[1] == "no SLURM"


class Clone:
    """A copy of scripts/ and pyproject.toml with the stand-in; `calls` is what it was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        python = folder / "stand-in"
        python.write_text(STAND_IN.replace("REAL", sys.executable))
        python.chmod(0o755)
        self.log = folder / "calls"
        self.log.touch()
        self.venv = self.root / ".venv"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RCPO_")}
        self.environment = {**kept, "RCPO_PYTHON": str(python), "CALLS": str(self.log), "CXX": "true"}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts" / "rcpo", *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def full(self) -> list[str]:
        return ["venv", "pip pip", f"pip {self.root}"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_first_use_sets_up_and_the_second_only_runs(clone: Clone) -> None:
    code, output, errors = clone.run("train", "a b")
    assert (code, output) == (0, "ran train a b\n")
    assert "once only" in errors
    assert clone.run("doctor") == (0, "ran doctor\n", "")
    assert clone.calls == clone.full


def test_tools_for_tests_leave_nothing_to_install_for_use(clone: Clone) -> None:
    set_up = f". {clone.root}/scripts/setup.sh && ensure_environment dev"
    subprocess.run(["bash", "-uc", set_up], env=clone.environment, check=True, capture_output=True)
    assert clone.run("x") == (0, "ran x\n", "")
    assert clone.calls == [*clone.full[:2], f"pip {clone.root}[dev]"]


def test_two_starts_at_once_set_up_once(clone: Clone) -> None:
    both = [clone.start(word, PIP_SECONDS="0.5") for word in ("one", "two")]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert outputs == ["ran one\n", "ran two\n"]
    assert clone.calls == clone.full


def test_changed_pins_renew_in_place(clone: Clone) -> None:
    clone.run()
    with (clone.root / "scripts" / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    clone.run()
    assert clone.calls == [*clone.full, *clone.full[1:]]


def test_killed_set_up_is_made_anew(clone: Clone) -> None:
    process = clone.start(PIP_SECONDS="30")
    while "pip pip" not in clone.calls:
        time.sleep(0.02)
    (clone.venv / "half-written").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert clone.run("x")[:2] == (0, "ran x\n")
    assert clone.calls == [*clone.full[:2], *clone.full]
    assert not (clone.venv / "half-written").exists()


def test_failed_install_is_shown_and_tried_again(clone: Clone) -> None:
    code, output, errors = clone.run(PIP_FAILS="yes")
    assert (code, output) == (1, "")
    assert "no such package" in errors and "setup.log" in errors
    assert clone.run("x")[:2] == (0, "ran x\n")


def test_failed_renewal_keeps_the_environment(clone: Clone) -> None:
    clone.run()
    pins_file = clone.root / "scripts" / "constraints.txt"
    before = pins_file.read_text()
    pins_file.write_text(before + "another==1\n")
    assert clone.run(PIP_FAILS="yes")[0] == 1
    pins_file.write_text(before)
    assert clone.run("x") == (0, "ran x\n", "")
    pins_file.write_text(before + "another==1\n")
    assert clone.run("x")[:2] == (0, "ran x\n")
    assert clone.calls.count("venv") == 1


def test_own_constraints_are_remembered(clone: Clone, tmp_path: Path) -> None:
    own = tmp_path / "gpu.txt"
    own.write_text("torch==0\n")
    clone.run(RCPO_CONSTRAINTS=str(own))
    assert clone.run("x") == (0, "ran x\n", "")
    assert clone.calls == clone.full


def test_folder_that_is_no_environment_is_refused(clone: Clone, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").touch()
    code, _, errors = clone.run(RCPO_VENV=str(folder))
    assert code == 1 and "no virtual environment" in errors
    assert [path.name for path in folder.iterdir()] == ["chapter"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("RCPO_PYTHON", "false", "no Python of 3.11 or newer"), ("CXX", "no-such-compiler", "no C++ compiler")],
)
def test_what_is_missing_is_named(clone: Clone, variable: str, value: str, words: str) -> None:
    code, _, errors = clone.run(**{variable: value})
    assert code == 1
    assert words in errors and variable in errors
    assert not clone.venv.exists() and not clone.calls


@pytest.mark.serial
def test_script_adds_little_to_a_call(clone: Clone) -> None:
    clone.run()

    def seconds(command: list[str | Path]) -> float:
        durations = []
        for _ in range(9):
            start = time.perf_counter()
            subprocess.run(command, env=clone.environment, check=True, stdout=subprocess.DEVNULL)
            durations.append(time.perf_counter() - start)
        return min(durations)  # what a busy machine adds is not the script's

    added = seconds([clone.root / "scripts" / "rcpo"]) - seconds([clone.venv / "bin" / "rcpo"])
    assert added < 0.05


def test_scripts_parse() -> None:
    for script in ("scripts/rcpo", "scripts/test", "scripts/setup.sh", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / script], check=True)
