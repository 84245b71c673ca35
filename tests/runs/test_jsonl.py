"""metrics.jsonl: strict JSON, flushed per row, cut at resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcpo.runs.jsonl import JsonLines, clean_row, truncate_after, write_json


def test_non_finite_values_become_null_and_are_counted() -> None:
    row = {"step": 3, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4, "band": None, "in": True}
    assert clean_row(row) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "lr": 1e-4,
        "band": None,
        "in": True,
        "nonfinite": 2,
    }


def test_a_finite_row_has_no_counter() -> None:
    assert "nonfinite" not in clean_row({"step": 1, "band_upper": None})


def test_numpy_scalars_become_python_scalars() -> None:
    row = clean_row({"a": np.float32(0.5), "b": np.int64(7), "c": np.bool_(True), "d": np.float64("-inf")})
    assert json.dumps(row) == '{"a": 0.5, "b": 7, "c": true, "d": null, "nonfinite": 1}'


@pytest.mark.parametrize("value", ["0.5", [1.0], np.ones(2), 1j])
def test_what_is_not_a_scalar_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="rewards/margins"):
        clean_row({"rewards/margins": value})


def test_rows_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1, "loss": 0.5})
        assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
        lines.write({"step": 2, "loss": None})
        assert path.read_text().splitlines()[1] == '{"step": 2, "loss": null}'


def test_truncation_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n{"step": 4, "lo')
    assert truncate_after(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 0.5}\n'
    assert truncate_after(path, 2) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_keeps_rows_whose_strings_hold_other_separators(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    row = '{"step": 1, "text": "a\u2028b\u0085c"}\n'
    path.write_text(row + '{"step": 2}\n', encoding="utf-8")
    assert truncate_after(path, 1) == 1
    assert path.read_text(encoding="utf-8") == row


def test_truncation_of_a_missing_file_and_of_a_foreign_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 5) == 0
    path.write_text('{"step": 1}\nnot a row\n')
    with pytest.raises(ValueError, match="line 2"):
        truncate_after(path, 5)
    assert path.read_text() == '{"step": 1}\nnot a row\n'


def test_evaluation_json_is_flat_and_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation.json", {"eval/loss": float("nan"), "eval/exact_match": 0.95})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "eval/loss": None,
        "eval/exact_match": 0.95,
        "nonfinite": 1,
    }
