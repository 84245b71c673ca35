"""The rows of the package: who may import whom, what stays light, what a commit may not name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rcpo"

# A module imports lower rows, or earlier modules of its own row. A package counts as one module.
ROWS: list[list[str]] = [
    [
        *("types", "registry", "losses", "objectives", "incentives", "geometry", "logps"),
        *("averages", "samples", "band", "rules", "loop", "calibration", "pairwise"),
    ],
    [
        "visible",
        "config",
        "building",
        "distributed",
        "terminal",
        "caching",
        "attention",
        "data",
        "hub",
        "models",
        "signals",
        "runfolder",
        "tracking",
        "metrics",
        "divergence",
        "reference",
        "inputs",
    ],
    [
        *("pieces", "tensorfiles", "engine", "start", "reference_pass", "scoring", "control"),
        *("dynamics", "session"),
        *("checkpoint", "saving", "final", "resume", "nonfinite", "trainer"),
    ],
    [
        *("evaluation", "comparison", "report", "launch", "jobs", "slurm", "onpolicy", "planner"),
        *("integrations", "diagnosis", "preview", "doctor"),
    ],
    ["cli", "__main__"],
]
ORDER = {module: place for place, module in enumerate(module for row in ROWS for module in row)}

# The one module that may import a dependency whose interface moves.
SOLE_IMPORTERS = {"deepspeed": "engine", "trl": "integrations", "lm_eval": "evaluation"}

TOP_LEVEL = {"pyproject.toml", "rcpo", "conf", "scripts", "tests", "outputs", "README.md"}
# Read as patterns, so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.$}{/])/(?:work|root|home|Users|mnt|scratch)/\w"),
    "a registry host": re.compile(r"pypi\.(?:org|python)|python[h]osted\.|download\.pyt[o]rch"),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The top-level module of rcpo a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_names(path: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted absolute names of all imports, also those inside functions; relative ones are resolved."""
    package = ["rcpo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(path: Path) -> list[str]:
    return list(imported_names(path, ast.parse(path.read_text(encoding="utf-8"))))


def test_imports_are_read_everywhere_and_relative_ones_resolved() -> None:
    program = "import a.b\ndef f():\n    from . import c\n    from ..types import D\n    from e import f"
    tree = ast.parse(program)
    found = sorted(imported_names(PACKAGE / "data" / "x.py", tree))
    assert found == ["a.b", "e.f", "rcpo.data.c", "rcpo.types.D"]


def test_every_module_has_a_place() -> None:
    unknown = {module_of(path) for path in sources()} - {"", *ORDER}
    assert not unknown, f"place {sorted(unknown)} in a row of tests/test_structure.py"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    limit = ORDER.get(own, len(ORDER))
    for name in imports(path):
        if not name.startswith("rcpo.") or name == "rcpo.__version__":
            continue
        target = name.split(".")[1]
        assert target in ORDER, f"{own} imports {name}: name the module, not the package's public face"
        assert target == own or ORDER[target] < limit, f"{own} imports {target}, which is not below it"


def test_nobody_imports_the_command_line() -> None:
    users = {module_of(path) for path in sources() for name in imports(path) if name.startswith("rcpo.cli")}
    assert users <= {"cli", "__main__"}


@pytest.mark.parametrize(("dependency", "owner"), SOLE_IMPORTERS.items())
def test_one_module_alone_imports(dependency: str, owner: str) -> None:
    users = {path for path in sources() for name in imports(path) if name.split(".")[0] == dependency}
    assert {module_of(path) for path in users} <= {owner}
    assert len(users) <= 1, f"{dependency} is imported by {sorted(map(str, users))}"


def test_deepspeed_has_its_importer() -> None:
    assert any(name.split(".")[0] == "deepspeed" for name in imports(PACKAGE / "engine.py"))


def test_importing_rcpo_is_light() -> None:
    program = "import sys, rcpo; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "deepspeed", "transformers", "hydra", "wandb", "rich", "numpy"}
    assert "rcpo" in output.split()
    assert not heavy & set(output.split())


def committed() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_top_level_is_fixed() -> None:
    names = {name.split("/")[0] for name in committed()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_patterns_find_what_they_forbid() -> None:
    machine, host = FORBIDDEN.values()
    assert machine.search("read /" + "work/main") and machine.search('"/' + 'home/someone"')
    assert not machine.search("hub.example/a/" + "work/b") and not machine.search("$TMP/" + "work/x")
    assert host.search("https://pypi" + ".org/simple")


def test_commits_name_no_machine_and_no_registry() -> None:
    found = []
    for name in committed():
        data = (ROOT / name).read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
            found += [f"{name}:{number}: {what}" for what, regex in FORBIDDEN.items() if regex.search(line)]
    assert not found, "\n".join(found)


def test_nothing_refers_to_a_document_that_is_not_here() -> None:
    """A design document, or a section of one; a paper's section stands beside its name."""
    absent = re.compile(r"\bDES[I]GN\b|[§] ?\d")
    found = []
    for name in committed():
        data = (ROOT / name).read_bytes()
        lines = [] if b"\0" in data else data.decode("utf-8", "replace").splitlines()
        found += [
            f"{name}:{number}"
            for number, line in enumerate(lines, start=1)
            if absent.search(line) and "arXiv" not in line
        ]
    assert not found, found


def test_temporary_folders_are_asked_for_not_named() -> None:
    python = [path for path in sources() if re.search(r"[\"']/t[m]p\b", path.read_text(encoding="utf-8"))]
    assert not python


def test_nothing_cuts_text_at_characters_that_are_no_line_ends() -> None:
    """str.splitlines cuts JSON Lines inside strings, at U+2028 and others."""
    scripts = (ROOT / "scripts").rglob("*.py")
    found = [
        f"{path.name}:{node.lineno}"
        for path in (*sources(), *scripts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert found == []
