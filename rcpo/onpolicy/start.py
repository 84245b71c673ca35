"""Start sampling: in this process, or in local ranks."""

from __future__ import annotations

from pathlib import Path

from rcpo.config.schema import RunConfig
from rcpo.launch.local import python
from rcpo.launch.run import Task, launch
from rcpo.onpolicy.settings import Settings


def start(settings: Settings, folder: Path | None) -> int:
    """Make the pairs in this process or in local ranks; `folder` is None on ranks other than 0."""

    def sample(config: RunConfig, folder: Path) -> int:
        from rcpo.onpolicy.work import make

        return make(settings, folder)

    return launch(settings.config, folder, Task(sample, sample_command))


def sample_command(folder: Path) -> list[str]:
    """The command that makes the pairs of FOLDER as its settings say."""
    return [*python(), "-m", "rcpo.onpolicy", str(folder)]
