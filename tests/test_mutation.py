"""The mutation runner: which mutants it makes, and which tests it runs on each."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from mutation import MODULES, ROOT, Baseline, Mutant, mutants, recording


def bodies(source: str) -> list[str]:
    """The mutants of a program, unparsed."""
    return [mutant.source for mutant in mutants("m", source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["x = a <= b"]),
        ("x = a in b", ["x = a not in b"]),
        ("x = a + b * c", ["x = a - b * c", "x = a + b / c"]),
        ("x = a and not b", ["x = a or not b", "x = a and b"]),
        ("x += 2", ["x -= 2", "pass", "x += 3"]),
        ("f(True)", ["f(False)", "pass"]),
        ("if a:\n    f()", ["if True:\n    f()", "if False:\n    f()", "if a:\n    pass"]),
        ("def f(a: int = 1) -> 'x':\n    return a", None),
    ],
)
def test_a_program_has_these_mutants(source: str, expected: list[str] | None) -> None:
    if expected is None:  # the default and the result, not the annotations
        expected = ["def f(a: int=2) -> 'x':\n    return a", "def f(a: int=1) -> 'x':\n    return None"]
    assert sorted(bodies(source)) == sorted(expected)


@pytest.mark.parametrize(
    "source",
    [
        "name = other",
        'class A:\n    """Docstring."""',
        "if TYPE_CHECKING:\n    f()",
        "x = f'{1 + 2}'",
        "x: int",
    ],
)
def test_what_is_no_behavior_has_none(source: str) -> None:
    assert bodies(source) == []


def test_messages_of_exceptions_stay_and_raising_them_does_not() -> None:
    assert bodies("raise ValueError(1 + 1)") == ["pass"]


def test_only_the_tests_that_reach_a_line_run_the_fastest_first() -> None:
    baseline = Baseline({"slow": 3.0, "fast": 1.0, "other": 2.0}, {"slow": {5, 6}, "fast": {6}, "other": {9}})
    assert baseline.tests(Mutant("m", 6, 6, "", "")) == ["fast", "slow"]
    assert baseline.tests(Mutant("m", 4, 5, "", "")) == ["slow"]
    assert baseline.tests(Mutant("m", 1, 1, "", "")) == [
        "fast",
        "other",
        "slow",
    ]  # only the import reaches it


@pytest.mark.parametrize("module", MODULES)
def test_every_module_and_its_tests_exist(module: str) -> None:
    assert (ROOT / "rcpo" / f"{module}.py").is_file()
    assert all((ROOT / "tests" / name).exists() for name in MODULES[module])


def test_a_recording_module_does_the_same_and_tells_which_lines_it_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = (
        '"""Docstring."""\n'  # line 1
        "from __future__ import annotations\n"
        "def f(x):\n"
        '    """Docstring."""\n'
        "    if x:\n"  # 5
        "        return [x,\n"
        "                x + 1]\n"
        "    elif x == 0:\n"
        "        return None\n"
        "    try:\n"  # 10
        "        g()\n"
        "    except NameError:\n"
        "        return 'none'\n"
    )
    reached: set[tuple[str, int]] = set()
    monkeypatch.setattr(builtins, "reached", reached, raising=False)
    names: dict[str, Any] = {}
    exec(recording("m", source), names)
    assert names["__doc__"] == names["f"].__doc__ == "Docstring." and not reached
    for value, expected, lines in [
        (1, [1, 2], {5, 6, 7}),
        (0, None, {5, 8, 9}),
        ("", "none", {5, 8, 10, 11, 13}),
    ]:
        reached.clear()
        assert names["f"](value) == expected and reached == {("m", line) for line in lines}
