"""The index of lm-evaluation-harness's tasks, for the programs that are forked from the one that runs this.

It is read from thousands of files, which takes seven seconds; neither the files nor the index change.
"""

from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import TaskIndex

from rcpo.evaluation.harness import _task_manager

_build = TaskIndex.build
_read = cache(lambda *paths: _build(paths))


def build(paths: list[Path], **more: Any) -> Any:
    """What TaskIndex.build returns."""
    return _build(paths, **more) if more else dict(_read(*paths))


TaskIndex.build = staticmethod(build)  # type: ignore[method-assign]
_task_manager()
