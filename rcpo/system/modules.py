"""Where Python finds the modules of users: a format of rows, an objective."""

from __future__ import annotations

import os
import sys


def search_working_folder() -> None:
    """Let Python look in the working folder too, after all others.

    Last: a file there that is named like a library's module is not meant.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
