"""Small faults put into the code, one at a time: which of them do the tests notice?

    python tests/mutation.py                                all mutants of all modules in MODULES
    python tests/mutation.py method/losses --sample 50      fifty of one module's, chosen by --seed
    python tests/mutation.py method --list                  names them only

The tests run on a copy of the repository, in forks of this process, which has imported the libraries.
Only the tests that reach a mutant's lines run, the fastest first, until one fails. The last line is the rate.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import copy
import gc
import importlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from environment import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    *("torch", "datasets", "peft", "transformers.models.llama.modeling_llama", "deepspeed"),
    *("hypothesis", "hydra", "numpy.testing", "pytest_timeout"),
]
# a module below rcpo, and the tests that answer for it
MODULES: dict[str, list[str]] = {
    "method/losses": ["method/test_objectives.py", "method/test_incentives.py", "method/test_mixtures.py"],
    "method/objectives": [
        "method/test_objective_parts.py",
        "method/test_objectives.py",
        "method/test_mixtures.py",
        "training/test_options.py",
    ],
    "method/incentives": ["method/test_incentives.py", "method/test_theory.py"],
    "method/geometry": [
        "method/test_geometry.py",
        "method/test_passes.py",
        "method/test_theory.py",
        "method/test_calibration.py",
    ],
    "method/averages": ["method/test_averages.py", "method/test_calibration.py"],
    "method/samples": ["method/test_samples.py", "method/test_band.py"],
    "method/band": [
        "method/test_band.py",
        "method/test_samples.py",
        "method/test_rules.py",
        "method/test_calibration.py",
    ],
    "method/rules": ["method/test_rules.py", "method/test_loop.py", "method/test_calibration.py"],
    "method/loop": ["method/test_loop.py", "method/test_rules.py", "method/test_statistics.py"],
    "method/calibration": [
        "method/test_statistics.py",
        "method/test_calibration.py",
        "method/test_rules.py",
        "method/test_samples.py",
        "method/test_loop.py",
    ],
    "method/logps": ["method/test_logps.py", "method/test_tokens.py"],
    "reference/keys": ["reference"],
    "reference/entry": ["reference"],
    "reference/cache": ["reference"],
    "data/identity": [
        "data/test_identity.py",
        "data/test_cache.py",
        "data/test_dataset.py",
        "reference/test_reference_cache.py",
    ],
    "data/cache": ["data/test_cache.py", "data/test_dataset.py", "data/test_token_cache.py"],
    "checkpoint/best": ["checkpoint"],
    "checkpoint/read": ["checkpoint"],
    "checkpoint/resume": ["checkpoint"],
    "checkpoint/tensors": ["checkpoint"],
    "checkpoint/write": ["checkpoint"],
    "data/readers": [
        "data/test_readers.py",
        "data/test_pieces.py",
        "data/test_formats.py",
        "data/test_charset.py",
        "data/test_fuzz.py",
    ],
    "data/formats": [
        "data/test_formats.py",
        "data/test_forms.py",
        "data/test_row_fields.py",
        "data/test_values.py",
        "data/test_fuzz.py",
    ],
    "data/forms": ["data/test_forms.py", "data/test_formats.py", "data/test_row_fields.py"],
    "data/frames": ["data/test_frames.py", "data/test_frame_parts.py", "data/test_formats.py"],
    "data/values": ["data/test_values.py", "data/test_formats.py", "data/test_row_fields.py"],
}


@dataclass(frozen=True)
class Mutant:
    module: str
    line: int
    last_line: int
    change: str
    source: str


@dataclass
class Baseline:
    """What the tests do without a mutant: seconds of each, and the lines of the module that each reaches."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, set[int]] = field(default_factory=dict)

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant, the fastest first; all of them where only the import does."""
        span = range(mutant.line, mutant.last_line + 1)
        reach = [test for test in self.seconds if not self.lines[test].isdisjoint(span)]
        return sorted(reach or self.seconds, key=self.seconds.__getitem__)


WORDS = ("killed", "timed out", "unclear", "survived")

# --- mutants -------------------------------------------------------------------------------------------

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
REMOVED = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete, ast.Assert)


def replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Faulty nodes to put in this one's place, each with its description."""

    def changed(**parts: Any) -> Any:
        new = copy.copy(node)
        for name, part in parts.items():
            setattr(new, name, part)
        return new

    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                other = COMPARISONS[type(operator)]()
                ops = [*node.ops[:place], other, *node.ops[place + 1 :]]
                yield f"{type(operator).__name__} → {type(other).__name__}", changed(ops=ops)
        case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            other = OPERATORS[type(node.op)]()
            yield f"{type(node.op).__name__} → {type(other).__name__}", changed(op=other)
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield f"{type(node.op).__name__} → {type(other).__name__}", changed(op=other)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield f"without {type(node.op).__name__}", node.operand
        case ast.Constant(value=bool()):
            yield f"{node.value} → {not node.value}", changed(value=not node.value)
        case ast.Constant(value=int() | float()):
            yield f"{node.value} → {node.value + 1}", changed(value=node.value + 1)
        case ast.If() | ast.IfExp() | ast.While():
            if not isinstance(node, ast.While):
                yield "condition → True", changed(test=ast.Constant(True))
            yield "condition → False", changed(test=ast.Constant(False))
        case ast.Return(value=ast.expr()):
            yield "return → return None", changed(value=ast.Constant(None))
    if removable(node):
        yield f"{type(node).__name__.lower()} removed", ast.Pass()


def removable(node: ast.AST) -> bool:
    """Statements that the next lines run without: not the first value of a name, nor a docstring."""
    if isinstance(node, ast.Assign):
        return not any(isinstance(part, ast.Name | ast.Tuple) for part in node.targets)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, REMOVED)


def left_alone(node: ast.AST) -> bool:
    """Messages, and what only type checkers read: a fault there is not a behavior."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.JoinedStr)


def children(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """The nodes directly below one, with the field and the place that each has in it."""
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    if isinstance(node, ast.Raise):
        skipped |= {"exc", "cause"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        if isinstance(value, ast.AST):
            yield name, None, value
        elif isinstance(value, list):
            yield from ((name, place, part) for place, part in enumerate(value) if isinstance(part, ast.AST))


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module's source, in the order of its lines."""
    tree = ast.parse(source)
    original, found = ast.unparse(tree), []

    def visit(parent: ast.AST) -> None:
        for name, place, node in children(parent):
            if left_alone(node):
                continue
            for change, new in replacements(node):
                put(parent, name, place, new)
                text = ast.unparse(ast.fix_missing_locations(tree))
                put(parent, name, place, node)
                if text != original:
                    last = node.lineno if hasattr(node, "body") else node.end_lineno  # type: ignore[attr-defined]
                    found.append(Mutant(module, node.lineno, last, f"{change}: {first_line(node)}", text))  # type: ignore[attr-defined]
            visit(node)

    visit(tree)
    return sorted(found, key=lambda mutant: mutant.line)


def put(parent: ast.AST, name: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[place] = node


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:90]


# --- tests in forked processes -------------------------------------------------------------------------


def recording(module: str, source: str) -> str:
    """A module that adds what it runs to the set `builtins.reached`, where there is one: (module, line)."""

    def visit(node: ast.AST, inside: bool) -> None:
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if not isinstance(statements, list):
                continue
            for statement in statements:
                visit(statement, inside or isinstance(statement, ast.FunctionDef))
            if inside:
                setattr(node, name, [part for one in statements for part in (*_mark(module, one), one)])
        for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            visit(part, inside)

    tree = ast.parse(source)
    visit(tree, False)
    # after the docstring and imports from __future__
    first = next(place for place, node in enumerate(tree.body) if not _comes_first(node))
    tree.body[first:first] = ast.parse("import builtins\n_reached = getattr(builtins, 'reached', set())").body
    return ast.unparse(ast.fix_missing_locations(tree))


def _comes_first(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _mark(module: str, node: ast.stmt) -> list[ast.stmt]:
    """What records a statement's lines, or those of its head; nothing for a docstring."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    body = getattr(node, "body", None)
    last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
    lines = {(module, line) for line in range(node.lineno, last + 1)}
    return ast.parse(f"_reached.update({lines})").body


class Recorder:
    """A pytest plugin that notes seconds of each test, and the lines of some modules that it reaches."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.baselines = {module: Baseline() for module in modules}
        self.reached: set[tuple[str, int]] = set()
        builtins.reached = self.reached  # type: ignore[attr-defined]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.reached.clear()
        start = time.monotonic()
        try:
            return (yield)
        finally:
            for module, baseline in self.baselines.items():
                baseline.seconds[item.nodeid] = time.monotonic() - start
                baseline.lines[item.nodeid] = {line for of, line in self.reached if of == module}


class Chosen:
    """A pytest plugin that keeps some tests, in a given order, and notes which one fails."""

    def __init__(self, tests: Sequence[str], failed: Path) -> None:
        self.order = {test: place for place, test in enumerate(tests)}
        self.failed = failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.write_text(report.nodeid, encoding="utf-8")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )


def forked(tree: Path, work: Any, seconds: float) -> int | None:
    """The exit code of `work()` in a fork inside a copy of the repository; None where it ran out of time."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            for descriptor, file in enumerate(
                (os.devnull, tree.with_name("output"), tree.with_name("output"))
            ):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
            os.chdir(tree)
            sys.path[:] = [
                str(tree),
                str(tree / "tests"),
                *(entry for entry in sys.path if entry != str(ROOT)),
            ]
            os.environ.update(PYTHONPATH=str(tree), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            sys.modules.pop("conftest", None)
            code = int(work())
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # also what the tests started
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def run_pytest(tests: Sequence[str], *plugins: Any) -> int:
    words = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-m", "not slow"]
    return pytest.main([*words, *tests], plugins=list(plugins))


def files(module: str) -> list[str]:
    return [f"tests/{name}" for name in MODULES[module]]


def of_tests(tests: Sequence[str]) -> list[str]:
    """The files that some tests are in: the others need not be imported."""
    return sorted({test.partition("::")[0] for test in tests})


def measured(modules: Sequence[str], tree: Path, folder: Path) -> dict[str, Baseline]:
    """The baselines of modules that have the same tests; raises SystemExit where those fail as they are."""
    kept, tests = folder / "baselines", files(modules[0])
    sources = {tree / "rcpo" / f"{module}.py": module for module in modules}
    originals = {path: path.read_text(encoding="utf-8") for path in sources}

    def work() -> int:
        recorder = Recorder(modules)
        code = run_pytest(tests, recorder)
        found = {module: (one.seconds, one.lines) for module, one in recorder.baselines.items()}
        kept.write_bytes(pickle.dumps(found))
        return code

    output = tree.with_name("output")
    output.unlink(missing_ok=True)
    try:
        for path, source in originals.items():
            put_source(path, recording(sources[path], source))
        code = forked(tree, work, 1800)
    finally:
        for path, source in originals.items():
            put_source(path, source)
    if code != 0:
        print(output.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        raise SystemExit(f"mutation: these fail as they are: run pytest {' '.join(tests)}")
    return {module: Baseline(*parts) for module, parts in pickle.loads(kept.read_bytes()).items()}


def verdict(mutant: Mutant, baseline: Baseline, tree: Path) -> str:
    """ "killed", "timed out", "survived", or "unclear": what failed with the mutant now fails without it."""
    file, failed = tree / "rcpo" / f"{mutant.module}.py", tree.with_name("failed")
    tests = baseline.tests(mutant)
    limit = 30 + 5 * sum(baseline.seconds[test] for test in tests)
    original = file.read_text(encoding="utf-8")
    failed.unlink(missing_ok=True)
    put_source(file, mutant.source)
    try:
        code = forked(tree, lambda: run_pytest(of_tests(tests), Chosen(tests, failed)), limit)
    finally:
        put_source(file, original)
    found = {None: "timed out", 0: "survived"}.get(code, "killed")
    if found == "killed" and failed.exists():  # else the module cannot even be imported
        test = [failed.read_text(encoding="utf-8")]
        if forked(tree, lambda: run_pytest(of_tests(test), Chosen(test, failed)), limit) != 0:
            return "unclear"
    return found


def put_source(file: Path, source: str) -> None:
    """Replace a module, so that the next process compiles it."""
    file.write_text(source, encoding="utf-8")
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


# --- the command ---------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """A copy of the files of this repository that git knows or would add."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules", nargs="*", help="beginnings of names in MODULES, such as method or data/readers"
    )
    parser.add_argument("--sample", type=int, help="so many mutants of each module, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only mutants of these lines: 10-40")
    parser.add_argument(
        "--at-least", type=float, default=0, help="fail where the share killed is lower (0 to 1)"
    )
    parser.add_argument("--list", action="store_true", help="name the mutants, test none")
    return parser.parse_args(words)


def chosen(module: str, options: argparse.Namespace) -> list[Mutant]:
    found = mutants(module, (ROOT / "rcpo" / f"{module}.py").read_text(encoding="utf-8"))
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        found = [mutant for mutant in found if first <= mutant.line <= last]
    if options.sample is not None and options.sample < len(found):
        picked = random.Random(f"{options.seed} {module}").sample(range(len(found)), options.sample)
        found = [found[place] for place in sorted(picked)]
    return found


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    modules = [name for name in MODULES if not options.modules or name.startswith(tuple(options.modules))]
    if not modules:
        raise SystemExit(f"mutation: none of {', '.join(MODULES)} starts with {' or '.join(options.modules)}")
    if options.list:
        for mutant in (mutant for module in modules for mutant in chosen(module, options)):
            print(f"rcpo/{mutant.module}.py:{mutant.line}: {mutant.change}")
        return 0
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # the forks need not look through what they share
    counts: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = copied(folder / "tree")
        for tests in dict.fromkeys(tuple(MODULES[module]) for module in modules):
            alike = [module for module in modules if tuple(MODULES[module]) == tests]
            for module, baseline in measured(alike, tree, folder).items():
                count(module, chosen(module, options), baseline, tree, counts)
    total = sum(counts.values())
    noticed = counts["killed"] + counts["timed out"]
    rate = noticed / total if total else 1.0
    print(f"{noticed} of {total} mutants noticed: {rate:.1%}")
    return int(rate < options.at_least)


def count(module: str, todo: list[Mutant], baseline: Baseline, tree: Path, counts: dict[str, int]) -> None:
    """Prints what a module's tests did not kill, and its rate; adds its verdicts to the counts."""
    start = time.monotonic()
    own: dict[str, int] = defaultdict(int)
    for mutant in todo:
        found = verdict(mutant, baseline, tree)
        own[found] += 1
        counts[found] += 1
        if found != "killed":
            print(f"{found}  rcpo/{module}.py:{mutant.line}: {mutant.change}", flush=True)
    line = ", ".join(f"{own[word]} {word}" for word in WORDS if own[word])
    print(f"{module}: {line or 'no mutants'} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
