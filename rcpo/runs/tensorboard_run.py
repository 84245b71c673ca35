"""The one importer of tensorboard: event files under the run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.runs.folder import TENSORBOARD
from rcpo.runs.jsonl import Scalar


class TensorBoardRun:
    """Scalars under their names; TensorBoard replaces the steps that a resumed run takes again."""

    seen = -1

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # it comes with torch, and needs tensorboard

        folder = run_dir / TENSORBOARD
        if resume_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        purged = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purged, flush_secs=10)
        self._last = resume_step or 0
        settings = json.dumps(to_container(config), indent=2)
        self._writer.add_text("config", f"```json\n{settings}\n```", self._last)

    def log(self, row: Mapping[str, Scalar]) -> None:
        self._last = int(row["step"] or 0)
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, float(value), self._last)

    def alert(self, text: str) -> None:
        self._writer.add_text("warnings", text, self._last)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns), *([_cell(row[c]) for c in columns] for row in rows)]
        self._writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
