"""`python -m rcpo.launch RUN_DIR`: trains what RUN_DIR/config.yaml says, as local ranks and sweeps do."""

from __future__ import annotations

import sys
from pathlib import Path

from rcpo.config import ConfigError, load_run_config
from rcpo.launch.checks import check
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import REFUSED, report_refusal
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.launch.run import launch


def main(arguments: list[str]) -> int:
    """`python -m rcpo.launch RUN_DIR`."""
    if len(arguments) != 1:
        print("usage: python -m rcpo.launch RUN_DIR", file=sys.stderr)
        return REFUSED
    run_dir = Path(arguments[0])
    try:
        config = load_run_config(run_dir / "config.yaml")
        ranks = external_ranks()
        configure_log(run_dir, file=ranks is None or ranks.rank == 0)
        check(config, world_size(config))
    except ConfigError as error:
        report_refusal(error)
        return REFUSED
    return launch(config, run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
