"""`python -m rcpo.slurm.conclude [evaluate] RUN_DIR CODE [SWEEP_DIR]`: what a job leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE, FAILED, outcome_of
from rcpo.runs.folder import EVALUATION
from rcpo.sweeps import summary
from rcpo.system import terminal


def main(arguments: list[str]) -> int:
    """The outcome in the run's folder and, in a sweep's, the table of what is complete so far."""
    terminal.prepare()
    evaluates = arguments[0] == "evaluate"
    run_dir, code, *sweeps = arguments[evaluates:]
    try:
        outcome = outcome_of(int(code), Path(run_dir))
        folder = Path(run_dir, EVALUATION) if evaluates else Path(run_dir)
        folder.mkdir(exist_ok=True)
        outcome.write(folder)
        for sweep_dir in map(Path, sweeps):
            summary.conclude(sweep_dir)
    except (ConfigError, OSError) as error:
        print(f"rcpo: {error}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
