"""Standard output and error that last as long as a run, whatever their encoding and whoever reads them.

`prepare` is called once, by each process that is a command.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import getpass
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PLAIN = "rcpo-plain"  # how what an encoding lacks is written
_SPELLINGS = {
    "−": "-", "–": "-", "±": "+/-", "×": "x", "…": "...", "α": "alpha", "β": "beta", "Δ": "delta",
    "≤": "<=", "≥": ">=", "→": "->",
}  # fmt: skip


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_SPELLINGS.get(character, "?") for character in lacking), error.end


codecs.register_error(_PLAIN, _plainly)


class LastingStream(io.TextIOWrapper):
    """Text to a descriptor. What its encoding lacks is spelled plainly; once writing fails, text is dropped.

    A run is not worth less because `head` has read enough of it, and its log has everything.
    """

    def write(self, text: str) -> int:
        self._lasting(lambda: super(LastingStream, self).write(text))
        return len(text)

    def flush(self) -> None:
        if not self.closed:
            self._lasting(super().flush)

    def _lasting(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # what is buffered goes there too
            os.close(null)
            if self is sys.stdout and error.errno != errno.EPIPE:
                print(
                    f"rcpo: standard output cannot be written to ({error.strerror}) and is left out; "
                    "the run continues",
                    file=sys.stderr,
                )


def prepare() -> None:
    """Make standard output and error last, and the environment one that libraries can read."""
    _open_all()
    for name in ("stdout", "stderr"):
        stream = _lasting(getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    _give_home()
    _drop_empty()


def _drop_empty() -> None:
    """A launcher's variables that are set to nothing are not set: libraries would read numbers from them."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "x").strip():
            del os.environ[name]


def _open_all() -> None:
    """Closed standard streams are opened: the next file to be opened would take a stream's place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _lasting(stream: Any) -> Any:
    if stream is None:  # it was closed when Python began
        return LastingStream(io.BytesIO(), "utf-8")
    if type(stream) is not io.TextIOWrapper:  # somebody's own
        return stream
    encoding, lines = stream.encoding, stream.line_buffering
    stream.flush()
    return LastingStream(stream.detach(), encoding, errors=_PLAIN, line_buffering=lines)


def _remove(home: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has its handlers too
        shutil.rmtree(home, ignore_errors=True)


def _give_home() -> None:
    """Libraries ask for the user's name and home, and fail where a container's user has neither."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = os.environ["USER"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        home = os.environ["HOME"] = tempfile.mkdtemp(prefix="rcpo-home-")
        atexit.register(_remove, home, os.getpid())
        print(
            f"rcpo: user {os.getuid()} has no home folder: nothing is cached beyond this command; set HOME "
            "to a folder",
            file=sys.stderr,
        )
