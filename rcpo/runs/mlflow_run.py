"""The one importer of mlflow: a run on a server or in a database, fed by a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcpo.config.changes import flatten
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.runs.folder import MLFLOW_ID_FILE
from rcpo.runs.jsonl import Scalar
from rcpo.runs.naming import group_of, name_of
from rcpo.system.files import replace_text

log = logging.getLogger(__name__)

LONGEST = 500  # characters of a parameter, which every version of mlflow takes
PARAMETERS = 100  # in a request
PATIENCE = 60.0  # seconds that the end of a run waits for a server that does not answer


class MlflowRun:
    """An mlflow run whose id lives in the run folder. A row is a request, and training does not wait for it.

    What fails there is raised by the next call.
    """

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=config.mlflow.uri)
        file = run_dir / MLFLOW_ID_FILE
        continued = resume_step is not None and file.exists()
        self._id = file.read_text(encoding="utf-8").strip() if continued else self._create(run_dir, config)
        self.seen = self._last_step() if continued else -1
        replace_text(file, f"{self._id}\n")
        self._client.update_run(self._id, status="RUNNING")
        self._error: Exception | None = None
        self._requests: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._feed, name="rcpo-mlflow", daemon=True)
        self._thread.start()

    def _last_step(self) -> int:
        """The last training step that the run has."""
        history = self._client.get_metric_history(self._id, "loss")
        return max((metric.step for metric in history), default=-1)

    def _create(self, run_dir: Path, config: RunConfig) -> str:
        from mlflow.entities import Param

        name = config.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        group = group_of(run_dir, config)
        tags = {"rcpo.group": group} if group else {}
        run = self._client.create_run(experiment, run_name=name_of(run_dir, config), tags=tags)
        settings = list(flatten(to_container(config)).items())
        for start in range(0, len(settings), PARAMETERS):
            part = [Param(key, str(value)[:LONGEST]) for key, value in settings[start : start + PARAMETERS]]
            self._client.log_batch(run.info.run_id, params=part)
        return str(run.info.run_id)

    def _feed(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request()
            except Exception as error:  # raised again where training calls
                log.info("mlflow failed", exc_info=True)
                self._error = error
                return

    def _send(self, request: Callable[[], object]) -> None:
        if self._error is not None:
            raise self._error
        self._requests.put(request)

    def log(self, row: Mapping[str, Scalar]) -> None:
        from mlflow.entities import Metric

        step, now = int(row["step"] or 0), int(1000 * time.time())
        values = {key: float(value) for key, value in row.items() if key != "step" and value is not None}
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._send(lambda: self._client.log_batch(self._id, metrics=metrics))

    def alert(self, text: str) -> None:
        self._send(lambda: self._client.set_tag(self._id, "rcpo.warning", text))

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        content = {column: [row[column] for row in rows] for column in rows[0]}
        self._send(lambda: self._client.log_dict(self._id, content, f"samples-{step}.json"))

    def flush(self) -> None:
        """Nothing: a checkpoint does not wait for a server."""

    def close(self, exit_code: int) -> None:
        status = {0: "FINISHED", 75: "KILLED"}.get(exit_code, "FAILED")
        self._send(lambda: self._client.set_terminated(self._id, status))
        self._requests.put(None)
        self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"no answer within {PATIENCE:g} s")
