"""What is read of a checkpoint, and how a damaged one is reported; with files written by hand."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rcpo.checkpoint.read import (
    any_checkpoint,
    checkpoint_weights,
    first_problem,
    newest,
    verify,
)
from rcpo.checkpoint.tensors import PieceFiles, hash_file, write_tensors
from rcpo.errors import ConfigError
from rcpo.system import distributed


def checkpoint(run_dir: Path, step: int, parts: list[dict[str, Tensor]], shapes: dict[str, Any]) -> Path:
    """A checkpoint whose manifest is made with the standard library alone."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    (folder / "tensors").mkdir(parents=True)
    for rank, tensors in enumerate(parts):
        write_tensors(folder / "tensors" / f"{rank}", tensors)
    (folder / "state.json").write_text(json.dumps({"step": step, "engine": {"shapes": shapes}, "rng": []}))
    names = ["state.json", *(f"tensors/{rank}" for rank in range(len(parts)))]
    files = {name: listed((folder / name).read_bytes()) for name in names}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": step, "files": files}))
    return folder


def listed(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def simple(run_dir: Path, step: int) -> Path:
    parts = [{f"w|fp32@{2 * rank}": torch.tensor([2.0 * rank, 2.0 * rank + 1])} for rank in range(3)]
    return checkpoint(run_dir, step, parts, {"w": [2, 3]})


def test_weights_have_their_shapes(tmp_path: Path) -> None:
    parts = [
        {"w|fp32@0": torch.arange(2.0), "w|exp_avg@0": torch.ones(2), "scale|fp32@0": torch.tensor([7.0])},
        {"w|fp32@2": torch.arange(2.0, 6.0), "w|exp_avg@2": torch.ones(4)},
    ]
    folder = checkpoint(tmp_path, 1, parts, {"w": [2, 3], "scale": []})
    weights = checkpoint_weights(folder)
    assert sorted(weights) == ["scale", "w"]
    assert weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["scale"].shape == () and weights["scale"].item() == 7.0


def test_a_folder_has_checkpoints_or_not(tmp_path: Path) -> None:
    assert any_checkpoint(tmp_path) is False
    simple(tmp_path, 3)
    assert any_checkpoint(tmp_path) is True


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "manifest.json: No such file or directory"),
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ("{}", "manifest.json cannot be read"),
        ('{"format": 2}', "manifest.json cannot be read"),
        ('{"format": 2, "files": 3}', "manifest.json cannot be read"),
        ('{"format": 2, "files": {"state.json": {"size": 1}}}', "manifest.json cannot be read"),
        ('{"format": 2, "files": {"state.json": {"size": 1, "a": 2}}}', "manifest.json cannot be read"),
        ('{"format": 2, "files": {}}', "manifest.json does not list state.json"),
        ('{"format": 1, "files": {}}', "its format 1 is not the one of this version, 2"),
        ('{"format": 3, "files": {}}', "its format 3 is not the one of this version, 2"),
    ],
)
def test_a_damaged_manifest_is_reported(content: str | None, problem: str, tmp_path: Path) -> None:
    folder = simple(tmp_path, 1)
    assert first_problem(folder) is None
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    assert first_problem(folder) == problem


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    folder = simple(tmp_path, 1)
    path = folder / "tensors" / "1"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert first_problem(folder) == f"tensors/1 has {len(content) - 1} bytes instead of {len(content)}"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert first_problem(folder) == "tensors/1 is not what was written"
    path.unlink()
    assert first_problem(folder) == "tensors/1: No such file or directory"
    with pytest.raises(ConfigError) as refusal:
        checkpoint_weights(folder)
    assert str(refusal.value) == (
        f"{folder} is damaged: tensors/1: No such file or directory; take another checkpoint"
    )


def test_each_rank_looks_at_its_share_of_the_files(tmp_path: Path) -> None:
    folder = simple(tmp_path, 1)  # state.json, tensors/0, tensors/1, tensors/2
    (folder / "tensors" / "1").unlink()
    (folder / "tensors" / "2").unlink()
    found = [first_problem(folder, rank, 3) for rank in range(3)]
    assert found == [
        "tensors/2: No such file or directory",  # the first file and the fourth
        None,
        "tensors/1: No such file or directory",
    ]


@pytest.mark.parametrize(
    ("shares", "expected"), [([None, "a", "b"], "a"), ([None, None], None), (["c", None], "c")]
)
def test_a_problem_that_any_rank_finds_is_the_checkpoints(
    shares: list[str | None], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda own: shares)
    assert verify(simple(tmp_path, 1)) == expected


def test_all_newer_damaged_checkpoints_are_set_aside(tmp_path: Path) -> None:
    folders = {step: simple(tmp_path, step) for step in (8, 9, 10)}
    for step in (9, 10):
        (folders[step] / "state.json").write_text("")
    earlier = folders[9].with_name("step-9.damaged")  # of an earlier resume
    (earlier / "tensors").mkdir(parents=True)
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None and (found.step, found.folder) == (8, folders[8])
    assert found.state["step"] == 8
    size = (folders[8] / "state.json").stat().st_size  # "step": 9 takes as many bytes
    assert said == [
        f"{folders[10]} is damaged and left out: state.json has 0 bytes instead of {size + 1}",
        f"{folders[9]} is damaged and left out: state.json has 0 bytes instead of {size}",
    ]
    names = sorted(path.name for path in folders[8].parent.iterdir())
    assert names == ["step-10.damaged", "step-8", "step-9.damaged"]
    assert (earlier / "manifest.json").is_file()  # the later one


def test_rank_0_alone_sets_damaged_checkpoints_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path, 1)
    damaged = simple(tmp_path, 2)
    (damaged / "state.json").write_text("")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    found = newest(tmp_path, lambda _: None)
    assert found is not None and found.step == 1 and damaged.is_dir()


def test_where_none_is_whole_the_folder_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    folder = simple(tmp_path, 1)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigError) as refusal:
        newest(tmp_path, lambda _: None)
    assert str(refusal.value) == (
        f"resume: no checkpoint in {folder.parent} is whole; to start afresh, remove that folder"
    )
    assert folder.is_dir()


# --- files of tensors -----------------------------------------------------------------------------------


def test_a_large_file_is_hashed_to_its_end(tmp_path: Path) -> None:
    content = os.urandom(1024) * 2500  # more than two of the pieces that it is read in
    (tmp_path / "x").write_bytes(content)
    found = hash_file(tmp_path / "x")
    assert (found.size, found.sha256) == (2_560_000, hashlib.sha256(content).hexdigest())


def test_a_file_is_on_the_disk_when_writing_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    written = write_tensors(tmp_path / "x", {"w|fp32@0": torch.ones(5)})
    assert synced == [written.size] == [(tmp_path / "x").stat().st_size]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8],
)
def test_every_kind_of_number_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0, 1, 7]).to(dtype)
    write_tensors(tmp_path / "x", {"w|first@0": torch.ones(1), "w|m@0": values})
    found = PieceFiles([tmp_path / "x"]).whole("w", "m")
    assert found is not None and found.dtype == dtype and torch.equal(found, values)


def test_pieces_are_put_in_order_whatever_file_has_them(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"v|m@3": torch.tensor([3.0, 4.0]), "v|step@3": torch.tensor([9.0])})
    write_tensors(tmp_path / "b", {"v|m@0": torch.tensor([0.0, 1.0, 2.0]), "u|m@0": torch.zeros(1)})
    files = PieceFiles([tmp_path / "a", tmp_path / "b"])
    assert files.names() == ["u", "v"]
    whole, part, none = files.whole("v", "m"), files.values("v", "m", 1, 3), files.values("v", "m", 2, 0)
    assert whole is not None and whole.tolist() == [0, 1, 2, 3, 4]
    assert part is not None and part.tolist() == [1, 2, 3]
    assert none is not None and none.tolist() == []
    assert files.number("v", "step") == 9.0
    with pytest.raises(ConfigError) as refusal:
        files.values("v", "m", 3, 3)
    assert str(refusal.value) == "the checkpoint's m of v has no element 5; a file is missing"
