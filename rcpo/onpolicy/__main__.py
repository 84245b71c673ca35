"""`python -m rcpo.onpolicy FOLDER`: what local ranks and SLURM jobs run; FOLDER holds a sample.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

from rcpo.errors import ConfigError
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import REFUSED
from rcpo.launch.ranks import is_first
from rcpo.launch.run import refused
from rcpo.onpolicy.settings import Settings
from rcpo.onpolicy.start import start
from rcpo.system import terminal


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    terminal.prepare()
    if len(arguments) != 1:
        print("usage: python -m rcpo.onpolicy FOLDER", file=sys.stderr)
        return REFUSED
    folder = Path(arguments[0])
    try:
        settings = Settings.read(folder)
        configure_log(folder, file=is_first())
    except ConfigError as error:
        return refused(error)
    return start(settings, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
