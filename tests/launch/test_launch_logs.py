"""A run's log on a disk that is full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rcpo.launch.logs import configure_log
from rcpo.runs.folder import LOG_FILE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_cannot_be_written_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    configure_log(tmp_path, file=True)
    for _ in range(3):
        logging.getLogger("rcpo").info("a line")
    assert (
        capsys.readouterr().err
        == f"rcpo: {tmp_path / LOG_FILE} misses lines: [Errno 28] No space left on device\n"
    )


def test_a_faulty_record_keeps_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(tmp_path, file=True)
    logging.getLogger("rcpo").info("%d", "not a number")
    assert "TypeError" in capsys.readouterr().err
