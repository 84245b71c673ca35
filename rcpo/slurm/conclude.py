"""`python -m rcpo.slurm.conclude RUN_DIR CODE [SWEEP_DIR]`: what a job leaves behind at the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from rcpo.jobs import summary
from rcpo.launch.outcomes import DONE, outcome_of


def main(arguments: list[str]) -> int:
    """The run's outcome in its folder and, in a sweep's, the table of what is complete so far."""
    run_dir, code = Path(arguments[0]), int(arguments[1])
    outcome_of(code, run_dir).write(run_dir)
    for sweep_dir in map(Path, arguments[2:]):
        summary.write(summary.compare(sweep_dir), sweep_dir)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
