"""The two errors that a user sees as one line, without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A command line, configuration or input that the user has to change; the CLI exits with 2."""


class RunError(RuntimeError):
    """A failure of a run that its code is not to blame for: one message, and the CLI exits with 1."""
