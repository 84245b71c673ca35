"""Files of tensors, read by the format's own library, and pieces put together from any cut."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rcpo.checkpoint.tensors import PieceFiles, hash_file, write_tensors
from rcpo.errors import ConfigError


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "a.weight|fp32@0": torch.randn(7),
        "a.weight|exp_avg@0": torch.randn(7, dtype=torch.float64),
        "b|fp32@3": torch.randn(5).bfloat16(),
        "strided|fp32@0": torch.randn(4, 3)[:, 1],
        "b|step@3": torch.tensor([4.0]),
    }
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    content = path.read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert hash_file(path) == written


@pytest.mark.parametrize("length", range(1, 9))
def test_the_data_start_at_a_multiple_of_eight_bytes(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"n" * length: torch.ones(2)})
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0 and len(content) == 8 + header + 8  # two floats


@given(cuts=st.lists(st.integers(1, 19), max_size=4), start=st.integers(0, 19), size=st.integers(0, 19))
def test_any_range_comes_from_any_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, size: int
) -> None:
    folder, whole = tmp_path_factory.mktemp("cut"), torch.arange(20.0)
    borders = [0, *sorted(set(cuts)), 20]
    for rank, (first, last) in enumerate(itertools.pairwise(borders)):
        write_tensors(
            folder / f"{rank}", {f"w|m@{first}": whole[first:last], f"w|step@{first}": torch.ones(1)}
        )
    files = PieceFiles(sorted(folder.iterdir(), reverse=True))
    end = min(start + size, 20)
    values = files.values("w", "m", start, end - start)
    assert values is not None and torch.equal(values, whole[start:end])
    everything = files.whole("w", "m")
    assert everything is not None and torch.equal(everything, whole)
    assert files.whole("w", "other") is None and files.whole("v", "m") is None
    assert files.number("w", "step") == 1.0
    assert files.values("w", "other", 0, 1) is None and files.number("v", "step") is None


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "0", {"w|fp32@0": torch.ones(3)})
    write_tensors(tmp_path / "2", {"w|fp32@5": torch.ones(3)})
    files = PieceFiles([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(ConfigError, match="fp32 of w has no element 3"):
        files.values("w", "fp32", 0, 8)


@pytest.mark.parametrize("content", [b"", b"not tensors", b'\x08\0\0\0\0\0\0\0{"a": 1}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match="x is refused"):
        PieceFiles([tmp_path / "x"])


def test_a_file_of_tensors_without_labels_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"weight": torch.ones(3)})
    with pytest.raises(ConfigError, match="x is refused"):
        PieceFiles([tmp_path / "x"])
