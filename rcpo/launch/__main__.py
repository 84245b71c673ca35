"""`python -m rcpo.launch RUN_DIR [TASK]`: what local ranks and the runs of a sweep are.

It trains what RUN_DIR/config.yaml says, or evaluates what RUN_DIR/evaluation/config.yaml says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rcpo.config.parsing import load_run_config
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import REFUSED
from rcpo.launch.ranks import is_first, world_size
from rcpo.launch.run import TASKS, failed, launch, refused
from rcpo.runs.folder import CONFIG_FILE
from rcpo.system import terminal


def main(arguments: list[str]) -> int:
    """`python -m rcpo.launch RUN_DIR [TASK]`; returns the exit code."""
    terminal.prepare()
    task = arguments[1] if len(arguments) > 1 else "train"
    if len(arguments) not in (1, 2) or task not in TASKS:
        print(f"usage: python -m rcpo.launch RUN_DIR [{'|'.join(TASKS)}]", file=sys.stderr)
        return REFUSED
    run_dir = Path(arguments[0])
    try:
        config = load_run_config(run_dir / TASKS[task].record / CONFIG_FILE)
        configure_log(run_dir, file=is_first())
        check(config, world_size(config))
    except ConfigError as error:
        return refused(error)
    except OSError as error:
        return failed(error)
    return launch(config, run_dir, TASKS[task])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
