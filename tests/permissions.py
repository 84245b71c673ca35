"""Files that may not be read, also where the tests run as root, and files that the disk has no room for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what lets root read everything


@contextlib.contextmanager
def no_permission(path: Path) -> Iterator[None]:
    """Inside, this thread may not read or enter `path`, whoever it is."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with _ordinary():
            yield
    finally:
        path.chmod(mode)


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Inside, this process can write no file beyond `size` bytes, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Takes root's right to read everything from this thread, and gives it back."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    effective = sets[0]
    sets[0] = effective & ~_OVERRIDE
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        sets[0] = effective
        libc.capset(header, sets)
