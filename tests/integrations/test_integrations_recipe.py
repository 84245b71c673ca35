"""Three lines of calibration in one's own loop: the same α under every way of spreading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import on_ranks
from tiny import tiny_llama
from workers import recipe


@pytest.mark.slow
def test_the_same_alpha_everywhere(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    found = {}
    for ranks, kinds in {1: ["plain"], 2: ["ddp", "fsdp2", "zero2", "zero3"]}.items():
        output = tmp_path / f"{ranks}.json"
        on_ranks(ranks, recipe.train_all, model, kinds, output)
        found |= json.loads(output.read_text(encoding="utf-8"))
    plain = found.pop("plain")
    assert plain[0][0] == 1.0 and plain[0][1] != 1.0
    assert list(found) == ["ddp", "fsdp2", "zero2", "zero3"]
    for kind, rows in found.items():
        for row, expected in zip(rows, plain, strict=True):
            assert row == pytest.approx(expected, rel=1e-5), kind
