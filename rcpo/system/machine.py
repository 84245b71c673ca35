"""What this process has of its machine."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that this process may use: a scheduler, or a container, may give it a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
