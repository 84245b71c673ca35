"""What each program would do first, done once before programs are forked: reading rcpo's own options."""

from __future__ import annotations

import sys
from pathlib import Path


def prepare() -> None:
    """From here on, Hydra keeps what it makes of the shipped options, as in the tests' own process."""
    sys.path.insert(0, str(Path(__file__).parent))
    import compositions
    import pytest

    from rcpo.config.composition import compose
    from rcpo.config.parsing import parse

    del sys.path[0]
    compositions.keep(pytest.MonkeyPatch())  # never undone
    parse(compose([]))


if __name__ == "<run_path>":  # in the process that forks: see forked.py
    prepare()
