"""`import rcpo`: light, typed, and with an example for every public name."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rcpo

MODULES = ("types", "objectives", "incentives", "geometry", "logps", "calibration")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"rcpo.method.{name}")
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("name", rcpo.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    value = getattr(rcpo, name)
    assert ">>>" in (value.__doc__ or ""), name


def test_importing_is_light() -> None:
    heavy = "{'torch', 'deepspeed', 'hydra', 'transformers', 'omegaconf'}"
    program = f"import sys, rcpo; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    program = (
        "import sys; from rcpo import RewardCalibrator; print({'deepspeed', 'hydra'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_types_are_published() -> None:
    assert (Path(rcpo.__file__).parent / "py.typed").exists()
