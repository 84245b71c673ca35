"""The one importer of trackio: a run in its own database, or in the Space that TRACKIO_SPACE_ID names."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.runs.folder import TRACKIO_ID_FILE, stored_id
from rcpo.runs.jsonl import Scalar
from rcpo.runs.naming import group_of, name_of


class TrackioRun:
    """A run that is found again by its name, which is unique for its id; trackio prints nothing here."""

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None) -> None:
        import trackio

        if resume_step is None:
            (run_dir / TRACKIO_ID_FILE).unlink(missing_ok=True)  # another run
        identity = stored_id(run_dir / TRACKIO_ID_FILE)
        name, project = f"{name_of(run_dir, config)} {identity}", config.trackio.project
        self.seen = -1 if resume_step is None else _last_step(project, name)
        with redirect_stdout(io.StringIO()):  # the terminal belongs to the display
            self._run = trackio.init(
                project=project,
                name=name,
                group=group_of(run_dir, config),
                config=to_container(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, row: Mapping[str, Scalar]) -> None:
        values = {key: value for key, value in row.items() if key != "step" and value is not None}
        self._run.log(values, step=int(row["step"] or 0))

    def alert(self, text: str) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.alert("rcpo", text)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: trackio's tables need pandas, and samples.jsonl has the rows."""

    def flush(self) -> None:
        """Nothing: trackio's own thread writes twice a second."""

    def close(self, exit_code: int) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _last_step(project: str, name: str) -> int:
    """The last step that the run has in the database of this machine; -1 without one."""
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_last_step(project, name)
    return -1 if found is None else int(found)
