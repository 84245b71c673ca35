"""The one importer of wandb: a run whose id lives in the run folder and so survives resume and requeue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.runs.folder import WANDB_ID_FILE, WANDB_STEP_FILE, stored_id
from rcpo.runs.jsonl import Scalar
from rcpo.runs.naming import group_of, name_of
from rcpo.system.files import replace_text


class WandbRun:
    """A wandb run, online or offline, with its files under the run folder.

    Rows carry their own `step`, declared as the x axis of every metric: wandb's internal counter only ever
    grows and would drop the steps that a resumed run takes again. Raises ConfigError where wandb cannot
    start.
    """

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None) -> None:
        import wandb  # half a second, and a service process: only where the user wants it
        import wandb.sdk.wandb_run
        import wandb.util

        # W&B Launch's inputs, which rcpo has none of: to look for them imports a third of a second of modules
        wandb.sdk.wandb_run.Run._detect_and_apply_job_inputs = lambda _: None
        # what a killed run had logged may be lost: only an end in order tells what wandb has
        self._ended = run_dir / WANDB_STEP_FILE
        if resume_step is None:
            self._ended.unlink(missing_ok=True)  # of another run
        known = self._ended.exists()
        self.seen = int(self._ended.read_text(encoding="utf-8")) if known else -1
        self._last = self.seen
        settings = wandb.Settings(console="off", silent=True)  # the terminal belongs to the display
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                group=group_of(run_dir, config),
                name=name_of(run_dir, config),
                tags=config.wandb.tags or None,
                notes=config.wandb.notes,
                job_type=config.wandb.job_type,
                mode=cast(Literal["online", "offline"], config.wandb.mode),
                id=stored_id(run_dir / WANDB_ID_FILE),
                resume="allow",
                dir=run_dir,
                config=to_container(config),
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb.mode={config.wandb.mode}: wandb could not start ({error}): "
                "run `wandb login`, or use wandb.mode=offline or wandb.mode=disabled"
            ) from error
        self._teardown = wandb.teardown
        self._make_table = wandb.Table
        # it would import pandas, which takes half a second, only to ask whether a table is one of its frames
        wandb.util.pd_available = False
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Scalar]) -> None:
        """Send a row; a null is left out, a bool becomes 0 or 1 so that wandb can draw it."""
        self._last = max(self._last, int(row["step"] or 0))
        self._run.log(
            {
                key: int(value) if isinstance(value, bool) else value
                for key, value in row.items()
                if value is not None
            }
        )

    def alert(self, text: str) -> None:
        """A warning, shown on the run's page and sent where the user lets wandb send alerts."""
        self._run.alert(title="rcpo", text=text)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of the same keys as the table `samples` of a step."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({"step": step, "samples": self._make_table(columns=columns, data=data)})

    def flush(self) -> None:
        """Nothing: wandb's own process has the rows."""

    def close(self, exit_code: int) -> None:
        """Finish the run; wandb shows it as failed for a code other than 0.

        `finish` comes back before an offline run's last rows are on disk (two of twelve runs were then still
        empty); stopping wandb's service waits for them.
        """
        self._run.finish(exit_code=exit_code)
        self._teardown()
        replace_text(self._ended, f"{self._last}\n")
