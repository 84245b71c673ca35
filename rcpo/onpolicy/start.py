"""Start sampling: in this process, or in local ranks."""

from __future__ import annotations

from pathlib import Path

from rcpo.config.schema import RunConfig
from rcpo.launch.local import launch_workers, python
from rcpo.launch.ranks import external_ranks
from rcpo.launch.run import run_here
from rcpo.onpolicy.settings import Settings


def start(settings: Settings, folder: Path | None) -> int:
    """Make the pairs in this process or in local ranks; `folder` is None on ranks other than 0."""
    processes = settings.config.launch.processes
    if external_ranks() is None and processes > 1:
        assert folder is not None
        return launch_workers(processes, sample_command(folder))

    def sample(config: RunConfig, folder: Path) -> int:
        from rcpo.onpolicy.work import make

        return make(settings, folder)

    return run_here(sample, settings.config, folder)


def sample_command(folder: Path) -> list[str]:
    """The command that makes the pairs of FOLDER as its settings say."""
    return [*python(), "-m", "rcpo.onpolicy", str(folder)]
