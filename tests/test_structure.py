"""The rows of the package: which folder may import which, what stays light, what a commit may not name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rcpo"

# A folder imports lower rows, or folders named before it in its own row. Inside a folder there are no cycles.
ROWS: list[list[str]] = [
    ["errors"],
    ["method", "system"],
    ["config", "models", "data", "runs"],
    ["engine", "reference", "checkpoint", "training"],
    ["evaluation", "report", "launch", "sweeps", "slurm", "planner", "onpolicy", "integrations"],
    ["commands"],
    ["cli", "__main__"],
]
ORDER = {folder: place for place, folder in enumerate(folder for row in ROWS for folder in row)}

# The one module that may import a dependency whose interface moves.
SOLE_IMPORTERS = {
    "deepspeed": "engine/backend.py",
    "trl": "integrations/trl.py",
    "llamafactory": "integrations/llamafactory.py",
    "lm_eval": "evaluation/harness.py",
    "mlflow": "runs/mlflow_run.py",
    "trackio": "runs/trackio_run.py",
    "wandb": "runs/wandb_run.py",
}

TOP_LEVEL = {"pyproject.toml", "rcpo", "conf", "scripts", "tests", "outputs", "README.md"}
# Read as patterns, so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.$}{/])/(?:work|root|home|Users|mnt|scratch)/\w"),
    "a registry host": re.compile(r"pypi\.(?:org|python)|python[h]osted\.|download\.pyt[o]rch"),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a file below rcpo; "" for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(path: Path) -> str:
    """The folder of rcpo that a file belongs to, or its name where it lies beside the folders."""
    return module_of(path).partition(".")[0]


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


MODULES = {module_of(path) for path in sources()}


def imported_module(name: str) -> str:
    """The module that a dotted name starts with: `data.store` of `rcpo.data.store.PairDataset`."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def cycle(folder: str) -> list[str] | None:
    """Modules of a folder that import each other in a circle; None where there are none."""
    graph: dict[str, set[str]] = defaultdict(set)
    for path in (PACKAGE / folder).rglob("*.py"):
        own = module_of(path)
        for name in imports(path):
            if name.startswith(f"rcpo.{folder}.") and (target := imported_module(name)) != own:
                graph[own].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_imports_are_read_everywhere_and_relative_ones_resolved() -> None:
    program = "import a.b\ndef f():\n    from . import c\n    from ..types import D\n    from e import f"
    tree = ast.parse(program)
    found = sorted(imported_names(PACKAGE / "data" / "x.py", tree))
    assert found == ["a.b", "e.f", "rcpo.data.c", "rcpo.types.D"]


def test_every_folder_has_a_place() -> None:
    unknown = {folder_of(path) for path in sources()} - {"", *ORDER}
    assert not unknown, f"place {sorted(unknown)} in a row of tests/test_structure.py"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = folder_of(path)
    limit = ORDER.get(own, len(ORDER))
    for name in imports(path):
        if not name.startswith("rcpo.") or name == "rcpo.__version__":
            continue
        target = name.split(".")[1]
        assert target in ORDER, f"{own} imports {name}: name the module, not the package's public face"
        assert target == own or ORDER[target] < limit, f"{own} imports {target}, which is not below it"


@pytest.mark.parametrize("folder", [name for name in ORDER if (PACKAGE / name).is_dir()])
def test_modules_of_a_folder_import_each_other_in_one_direction(folder: str) -> None:
    found = cycle(folder)
    assert found is None, " → ".join(found or [])


def test_a_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rcpo" / "data").mkdir(parents=True)
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / "rcpo" / "data" / f"{name}.py").write_text(
            f"def f():\n    from rcpo.data.{other} import g\n"
        )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "rcpo")
    monkeypatch.setattr(sys.modules[__name__], "MODULES", {"data.a", "data.b", "data.c"})
    assert set(cycle("data") or []) == {"data.a", "data.b", "data.c"}


def test_the_method_needs_torch_alone() -> None:
    allowed = {"rcpo", "torch", *sys.stdlib_module_names}
    found = {name for path in (PACKAGE / "method").glob("*.py") for name in imports(path)}
    assert {name.split(".")[0] for name in found} <= allowed


def test_models_are_loaded_from_their_own_nodes_of_the_configuration() -> None:
    found = {name for path in (PACKAGE / "models").rglob("*.py") for name in imports(path)}
    assert "rcpo.config.schema.ModelConfig" in found and "rcpo.config.schema.RunConfig" not in found


def test_nobody_imports_the_command_line() -> None:
    users = {module_of(path) for path in sources() for name in imports(path) if name.startswith("rcpo.cli")}
    assert users <= {"__main__"}


@pytest.mark.parametrize(("dependency", "owner"), SOLE_IMPORTERS.items())
def test_one_module_alone_imports(dependency: str, owner: str) -> None:
    users = {path for path in sources() for name in imports(path) if name.split(".")[0] == dependency}
    assert {str(path.relative_to(PACKAGE)) for path in users} == {owner}


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


def test_temporary_folders_are_asked_for_not_named() -> None:
    python = [path for path in sources() if re.search(r"[\"']/t[m]p\b", path.read_text(encoding="utf-8"))]
    assert not python
