"""Where the shipped configuration lies, and what stands at the paths that a user gives."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rcpo.errors import ConfigError


def conf_dir() -> Path:
    """The shipped configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def local(key: str, value: str) -> Path:
    """The path that a key's value means on this machine; raises ConfigError for what can be none."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={value}: this machine knows no home folder of that user") from error


def mode_of(key: str, value: str) -> int | None:
    """What stands at a path, as `stat` has it; None where nothing does.

    Raises ConfigError where that cannot be told: no permission, a name that is too long, links in a circle.
    """
    try:
        return local(key, value).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}={_short(value)} cannot be read: {reason}") from error


def is_file(key: str, value: str) -> bool:
    """Whether a file stands there; raises ConfigError where it cannot be told."""
    mode = mode_of(key, value)
    return mode is not None and not stat.S_ISDIR(mode)


def readable_folder(key: str, value: str) -> Path | None:
    """The folder that a value means, None where there is none; raises ConfigError if it may not be read."""
    mode = mode_of(key, value)
    if mode is None or not stat.S_ISDIR(mode):
        return None
    folder = local(key, value)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                entry.stat()  # needs the right to enter
                break
    except FileNotFoundError:  # a link that leads nowhere is its reader's business
        pass
    except OSError as error:
        raise ConfigError(f"{key}={value} cannot be read: {error.strerror}") from error
    return folder


def _short(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:60]}… ({len(value)} letters)"
