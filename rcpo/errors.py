"""The two errors that a user sees as one line, without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A command line, configuration or input that the user has to change; the CLI exits with 2."""


class RunError(RuntimeError):
    """What ends a run and is no fault of its code: the message says all; the CLI exits with 1."""
