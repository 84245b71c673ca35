"""The trackers that a run reports to beside metrics.jsonl; one that fails is left out from there on."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.runs.jsonl import Scalar
from rcpo.system.text import first_line

log = logging.getLogger(__name__)

# the package that each imports, and what installs it
PACKAGES = {
    "tensorboard": ("tensorboard", "rcpo[tensorboard]"),
    "mlflow": ("mlflow", "rcpo[mlflow]"),
    "trackio": ("trackio", "rcpo[trackio]"),
}


class Backend(Protocol):
    """A run in a tracker. `seen` is the last step that it has, or -1 where it takes a step's place anew."""

    seen: int

    def log(self, row: Mapping[str, Scalar]) -> None: ...

    def alert(self, text: str) -> None: ...

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def flush(self) -> None: ...

    def close(self, exit_code: int) -> None: ...


def active(config: RunConfig) -> list[str]:
    """The trackers that are on, each once; `wandb.mode=disabled` turns wandb off."""
    names = [name for name in dict.fromkeys(config.tracking) if name != "none"]
    return [name for name in names if name != "wandb" or config.wandb.mode != "disabled"]


def check_installed(config: RunConfig) -> None:
    """Raise ConfigError for a tracker whose package is missing."""
    for name in active(config):
        package, extra = PACKAGES.get(name, ("wandb", "wandb"))
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking={name} needs {package}, which is not installed: pip install '{extra}'"
            )


def _open(name: str, run_dir: Path, config: RunConfig, resume_step: int | None) -> Backend:
    if name == "wandb":
        from rcpo.runs.wandb_run import WandbRun

        return WandbRun(run_dir, config, resume_step)
    if name == "tensorboard":
        from rcpo.runs.tensorboard_run import TensorBoardRun

        return TensorBoardRun(run_dir, config, resume_step)
    if name == "mlflow":
        from rcpo.runs.mlflow_run import MlflowRun

        return MlflowRun(run_dir, config, resume_step)
    from rcpo.runs.trackio_run import TrackioRun

    return TrackioRun(run_dir, config, resume_step)


class Backends:
    """All trackers of a run. Steps that a resumed run takes again do not reach one that has them.

    A tracker that cannot start is refused (ConfigError). One that fails later is reported by `say`, once, and
    left out: training goes on.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, resume_step: int | None, say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._open: dict[str, Backend] = {}
        for name in active(config):
            try:
                self._open[name] = _open(name, run_dir, config, resume_step)
            except ConfigError:
                raise
            except Exception as error:
                log.exception("tracking=%s could not start", name)
                raise ConfigError(
                    f"tracking={name} could not start ({type(error).__name__}: {first_line(error)}): "
                    "correct that, or leave it out of tracking"
                ) from error

    def log(self, row: Mapping[str, Scalar]) -> None:
        step = int(row["step"] or 0)
        self._each(lambda backend: None if step <= backend.seen else backend.log(row))

    def alert(self, text: str) -> None:
        self._each(lambda backend: backend.alert(text))

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._each(lambda backend: None if step <= backend.seen else backend.table(step, rows))

    def flush(self) -> None:
        self._each(lambda backend: backend.flush())

    def close(self, exit_code: int) -> None:
        self._each(lambda backend: backend.close(exit_code))

    def _each(self, call: Callable[[Backend], None]) -> None:
        for name, backend in list(self._open.items()):
            try:
                call(backend)
            except Exception as error:  # the run is worth more than its tracker
                log.exception("tracking=%s failed", name)
                del self._open[name]
                reason = f"{type(error).__name__}: {first_line(error)}"
                self._say(f"warning: tracking={name} failed ({reason}); training continues without it")
