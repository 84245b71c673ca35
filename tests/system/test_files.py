"""Files written whole or not at all, whoever else writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from permissions import files_no_longer_than

from rcpo.system.files import replace_text


def test_two_processes_may_write_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two commands do that start in one folder: one writes while the other waits for the disk."""
    path, sync, others = tmp_path / "config.yaml", os.fsync, [os.getpid() + 1]

    def meanwhile(descriptor: int) -> None:
        sync(descriptor)
        if others:
            with monkeypatch.context() as patch:
                other = others.pop()
                patch.setattr(os, "getpid", lambda: other)
                replace_text(path, "theirs")

    monkeypatch.setattr(os, "fsync", meanwhile)
    replace_text(path, "ours")
    assert path.read_text() == "ours" and [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_full_disk_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")
    with files_no_longer_than(100), pytest.raises(OSError, match="File too large"):
        replace_text(path, "new" * 100)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
