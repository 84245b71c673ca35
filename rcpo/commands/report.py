"""`rcpo report`: from folders to files, once or again and again while training goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rcpo.errors import ConfigError
from rcpo.report import theme
from rcpo.report.document import Document
from rcpo.report.foreign import TRAINER_STATE
from rcpo.report.render import save_picture, to_html, to_markdown
from rcpo.report.rounds import section
from rcpo.report.runs import Run, Status, find_runs, read_runs
from rcpo.report.sections import document_of
from rcpo.runs.folder import (
    CHECKPOINT_RECORDS,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    is_locked,
)
from rcpo.runs.folder import PROBES_FILE as PROBES
from rcpo.system.files import replace_text

WATCHED = (
    CONFIG_FILE,
    METRICS_FILE,
    EVALUATION_FILE,
    CHECKPOINT_RECORDS,
    ENVIRONMENT_FILE,
    SAMPLES_FILE,
    PROBES,
    FINISHED_FILE,
    TRAINER_STATE,
)


QUIET = 120.0  # seconds: longer than the next run of a sweep takes to log its first step


@dataclass(frozen=True)
class ReportRequest:
    """What is wanted: `folders` of runs or sweeps, the HTML file `output` (None: in the folder itself).

    `markdown` writes report.md with PNG figures too, `figures` the figures in another format.
    """

    folders: Sequence[Path]
    output: Path | None = None
    markdown: bool = False
    figures: str | None = None


def run(request: ReportRequest, every: float | None) -> int:
    """The command: reports once, or every so many seconds until training ends; returns the exit code."""
    if every is None:
        page = report(request)
    else:
        print(f"rcpo: {_page(request)} follows the training; stop with Ctrl-C")
        try:
            page = watch(request, every)
        except KeyboardInterrupt:
            page = report(request)  # as it stands, without reloading itself
    print(f"rcpo: wrote {page}")
    return 0


def report(request: ReportRequest) -> Path:
    """Write the report and return the HTML file; raise ConfigError where there is no run to report on."""
    page, _ = _write(request, None)
    return page


def watch(request: ReportRequest, seconds: float, quiet: float = QUIET) -> Path:
    """Rewrite the report whenever a run's files change, until training is over.

    The page reloads itself every `seconds`; the last one written does not. Waits for a first run. A run is
    over when it is finished; a sweep, whose next run may be starting, when for `quiet` seconds no run trained
    and no file changed.
    """
    seen: object = None
    changed = time.monotonic()
    runs: list[Run] = []
    while True:
        if (now := _fingerprint(request.folders)) and now != seen:
            seen, changed = now, time.monotonic()
            _, runs = _write(request, seconds)
        if runs and _is_over(request.folders, runs, time.monotonic() - changed > quiet):
            return report(request)
        time.sleep(seconds)


def _is_over(folders: Sequence[Path], runs: Sequence[Run], calm: bool) -> bool:
    alone = len(runs) == len(folders) and all((folder / CONFIG_FILE).exists() for folder in folders)
    if alone and all(run.status is Status.FINISHED for run in runs):
        return True
    waiting = any(run.status is Status.QUEUED for run in runs)
    return calm and not waiting and not any(is_locked(run.folder) for run in runs)


def _write(request: ReportRequest, refresh: float | None) -> tuple[Path, list[Run]]:
    runs = read_runs(request.folders)
    page = _page(request)
    with theme.applied():
        document = document_of(runs, " and ".join(folder.resolve().name for folder in request.folders))
        if (rounds := section(request.folders)) is not None:
            document = replace(document, sections=[rounds, *document.sections])
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            replace_text(page, to_html(document, refresh))
            _write_beside(document, page, request)
        except OSError as error:
            raise ConfigError(f"{page} cannot be written ({error.strerror}); use --output") from error
    return page, runs


def _write_beside(document: Document, page: Path, request: ReportRequest) -> None:
    """Figures and Markdown, as far as they are wanted."""
    kind = request.figures or ("png" if request.markdown else None)
    if kind is None:
        return
    folder = page.with_name(f"{page.stem}_figures")
    folder.mkdir(exist_ok=True)
    for picture in document.pictures():
        save_picture(picture, folder / f"{picture.name}.{kind}")
    if request.markdown:
        names = {picture.name: f"{folder.name}/{picture.name}.{kind}" for picture in document.pictures()}
        replace_text(page.with_suffix(".md"), to_markdown(document, names))


def _page(request: ReportRequest) -> Path:
    """The file that was asked for, else report.html in the folder, or in the nearest one that holds all."""
    common = os.path.commonpath([folder.resolve() for folder in request.folders])
    return request.output or Path(common) / "report.html"


def _fingerprint(folders: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Size and time of every file that a report reads; empty before there is a run."""
    paths = [run / name for folder in folders for run in find_runs(folder) for name in WATCHED]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())
