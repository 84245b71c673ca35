"""How far all ranks have come, read off the files that they write: a bar on a terminal, else some lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rcpo.system import distributed

LINES = 10  # of a whole sampling
SECONDS = 60.0  # but a slow one still shows that it is alive


class Progress:
    """Counts the rows in a folder of `Kept` up to `total`; rank 0 shows it. A context manager."""

    def __init__(
        self, what: str, folder: Path, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._folder = folder
        self._total = total
        self._clock = clock
        self._places: dict[Path, int] = {}
        self._rows = self._tokens = 0
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._read()
        self._before = self._rows, self._tokens
        self._began = self._shown = self._clock()
        self._shown_rows = self._rows
        if distributed.is_main() and self._rows < self._total:
            if self._rows:
                print(f"{self._what}: {self._rows:,} of {self._total:,} are known from before", flush=True)
            if sys.stdout.isatty():
                columns = (TextColumn(self._what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
                self._bar = Bar(*columns, TextColumn("{task.fields[speed]}"), console=Console())
                self._task = self._bar.add_task("", total=self._total, completed=self._rows, speed="")
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def look(self) -> None:
        """Show how far it has come, where that is due."""
        if not distributed.is_main():
            return
        self._read()
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._rows, speed=self._speed(now))
            return
        if (self._rows - self._shown_rows) * LINES < self._total and now - self._shown < SECONDS:
            return
        self._shown, self._shown_rows = now, self._rows
        print(
            f"{self._what}: {self._rows:,} of {self._total:,}{self._speed(now)}{self._left(now)}", flush=True
        )

    def _read(self) -> None:
        """Count the whole rows that were written since the last look."""
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._places.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._places[path] = self._places.get(path, 0) + len(whole)
            for line in whole.split(b"\n")[:-1]:
                self._rows += 1
                self._tokens += json.loads(line).get("tokens") or 0

    def _speed(self, now: float) -> str:
        tokens, seconds = self._tokens - self._before[1], now - self._began
        return f"  {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""

    def _left(self, now: float) -> str:
        done = self._rows - self._before[0]
        if not done or self._rows >= self._total:
            return ""
        seconds = round((now - self._began) / done * (self._total - self._rows))
        return f"  {seconds // 60}:{seconds % 60:02d} left"
