"""A file system without locks, for the tests of entries and of their parts."""

from __future__ import annotations

import pytest

from rcpo.system.files import Lock


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every lock be acquired, none of them exclusively."""

    def acquire(self: Lock) -> bool:
        return True

    monkeypatch.setattr(Lock, "acquire", acquire)
