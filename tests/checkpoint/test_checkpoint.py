"""Checkpoints on disk: whole or not there, verified, pruned; nothing in them is executed."""

from __future__ import annotations

import copy
import dataclasses
import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import held_out, sums_file, tiny_llama

from rcpo.checkpoint import resume
from rcpo.checkpoint.read import checkpoint_tensors, checkpoint_weights, first_problem
from rcpo.checkpoint.read import newest as newest_checkpoint
from rcpo.checkpoint.write import CheckpointWriter
from rcpo.config.changes import changes, refuse_changes, refuse_other_run
from rcpo.config.data import SourceConfig
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.engine.pieces import find_pieces
from rcpo.errors import ConfigError, RunError
from rcpo.runs.folder import locked, refuse_locked, stored_state
from rcpo.runs.inputs import Standing, read_inputs, standing
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("inputs")
    config = RunConfig()
    config.resume = "auto"
    config.wandb.mode, config.reference.mode = "disabled", "model"
    config.model.name, config.model.path = "local", tiny_llama(folder / "model")
    config.data.name, config.data.path = "pairs", sums_file(folder / "pairs.jsonl", 24)
    config.data.eval_path = held_out(str(config.data.path))
    config.train.batch_size, config.train.micro_batch_size = 8, 8
    config.engine.stage = 1  # has the most kinds of files
    return config


@pytest.fixture(scope="module")
def trained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One step of a run in this process."""
    distributed.initialize()
    session = Session(config, tmp_path_factory.mktemp("run"), training=True)
    session.prepare_reference()
    result = Trainer(session)
    result.train_step()
    return result


@pytest.fixture
def saved(trained: Trainer, tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2 (the same weights)."""
    for step in (1, 2):
        save(trained, tmp_path, step)
    return tmp_path


def save(trained: Trainer, run_dir: Path, step: int, kept: tuple[int, ...] = ()) -> None:
    writer = CheckpointWriter(run_dir, trained.config)
    writer.save(trained.engine, {**trained.state_dict(), "step": step}, kept)
    writer.finish()


def newest(run_dir: Path) -> tuple[int | None, list[str]]:
    """The step that a run in the folder would continue from, and what it says."""
    said: list[str] = []
    found = newest_checkpoint(run_dir, said.append)
    return None if found is None else found.step, said


def shard(run_dir: Path, step: int) -> Path:
    return max((run_dir / "checkpoints" / f"step-{step}" / "tensors").iterdir(), key=os.path.getsize)


def test_a_checkpoint_lists_all_its_files_with_their_hashes(saved: Path) -> None:
    folder = saved / "checkpoints" / "step-2"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert files == {*manifest["files"], "manifest.json"}
    sums = subprocess.run(["sha256sum", *manifest["files"]], cwd=folder, capture_output=True, text=True)
    by_hand = {line.split("  ")[1]: line.split()[0] for line in sums.stdout.splitlines()}
    assert by_hand == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert (saved / "checkpoints" / "latest").read_text() == "step-2\n"
    assert newest(saved) == (2, [])


def test_the_last_ones_stay(trained: Trainer, saved: Path) -> None:
    save(trained, saved, 10)
    names = sorted(entry.name for entry in (saved / "checkpoints").iterdir())
    assert names == ["latest", "step-10", "step-2"]


def test_a_kept_step_stays_as_long_as_it_is_kept(trained: Trainer, saved: Path) -> None:
    for step in (3, 4):
        save(trained, saved, step, kept=(1,))
    assert sorted(entry.name for entry in (saved / "checkpoints").glob("step-*")) == [
        "step-1", "step-3", "step-4",
    ]  # fmt: skip
    save(trained, saved, 5, kept=(4,))
    assert sorted(entry.name for entry in (saved / "checkpoints").glob("step-*")) == ["step-4", "step-5"]


def test_damaged_checkpoints_count_among_those_that_stay(trained: Trainer, saved: Path) -> None:
    folder = saved / "checkpoints"
    for step in (5, 6, 7):
        (folder / f"step-{step}.damaged").mkdir()
    (folder / "step-2").rename(folder / "step-2.damaged")
    save(trained, saved, 3)  # keep=2: steps 1 and 3 are whole, so no damaged one stays
    assert sorted(entry.name for entry in folder.glob("step-*")) == ["step-1", "step-3"]
    shutil.rmtree(folder / "step-1")
    (folder / "step-3").rename(folder / "step-3.damaged")
    (folder / "step-2.damaged").mkdir()
    save(trained, saved, 4)
    assert sorted(entry.name for entry in folder.glob("step-*")) == ["step-3.damaged", "step-4"]


def test_writing_goes_on_beside_training_from_a_copy(trained: Trainer, tmp_path: Path) -> None:
    weight = next(trained.engine.policy.parameters())
    before = weight.detach().clone()
    writer = CheckpointWriter(tmp_path, trained.config)
    writer.save(trained.engine, trained.state_dict())
    assert writer.pending and not (tmp_path / "checkpoints" / "step-1").exists()
    held = [piece.holder for piece in find_pieces(trained.engine._engine)]
    values = [holder.detach().clone() for holder in held]
    with torch.no_grad():
        for holder in held:
            holder.add_(1)
    writer.finish()
    with torch.no_grad():
        for holder, value in zip(held, values, strict=True):
            holder.copy_(value)  # other tests have the same trainer
    assert not writer.pending and newest(tmp_path) == (1, [])
    saved = checkpoint_tensors(tmp_path / "checkpoints" / "step-1")
    name = next(name for name, p in trained.engine.policy.named_parameters() if p is weight)
    assert torch.equal(saved.values(name, "fp32", 0, weight.numel()), before.flatten())


def test_a_checkpoint_begun_is_finished_before_the_next(trained: Trainer, tmp_path: Path) -> None:
    config = copy.deepcopy(trained.config)
    config.checkpoint.background = True
    writer = CheckpointWriter(tmp_path, config)
    writer.save(trained.engine, {**trained.state_dict(), "step": 1})
    writer.save(trained.engine, {**trained.state_dict(), "step": 2})
    assert newest(tmp_path) == (1, []) and writer.pending
    writer.finish()
    assert newest(tmp_path) == (2, []) and not writer.pending


def test_a_step_taken_again_replaces_its_checkpoint(trained: Trainer, saved: Path) -> None:
    shard(saved, 2).write_bytes(b"old")
    save(trained, saved, 2)
    assert newest(saved) == (2, [])
    assert sorted(entry.name for entry in (saved / "checkpoints").iterdir()) == ["latest", "step-1", "step-2"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


KINDS = [(truncate, name) for name in ("tensors", "state.json", "manifest.json")]
KINDS += [
    (flip_a_bit, "tensors"),
    (flip_a_bit, "state.json"),
    (Path.unlink, "tensors"),
    (Path.unlink, "manifest.json"),
]


@pytest.mark.parametrize(("damage", "name"), KINDS)
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_used(
    damage: Any, name: str, saved: Path
) -> None:
    folder = saved / "checkpoints" / "step-2"
    damage(shard(saved, 2) if name == "tensors" else folder / name)
    step, said = newest(saved)
    assert step == 1
    assert len(said) == 1 and str(folder) in said[0] and "damaged" in said[0]
    assert not folder.exists() and folder.with_name("step-2.damaged").is_dir()
    assert newest(saved) == (1, [])


def test_a_hash_in_the_manifest_that_flipped_is_damage_too(saved: Path) -> None:
    manifest = saved / "checkpoints" / "step-2" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["files"]["state.json"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(record))
    assert first_problem(manifest.parent) == "state.json is not what was written"


def test_a_manifest_without_the_runs_state_is_damage_too(saved: Path) -> None:
    manifest = saved / "checkpoints" / "step-2" / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["files"]["state.json"]
    manifest.write_text(json.dumps(record))
    assert first_problem(manifest.parent) == "manifest.json does not list state.json"
    assert newest(saved)[0] == 1


def test_weights_are_read_from_a_whole_checkpoint_alone(trained: Trainer, saved: Path) -> None:
    folder = saved / "checkpoints" / "step-2"
    weights = checkpoint_weights(folder)
    parameters = trained.engine.policy.named_parameters()
    named = {name: weight for name, weight in parameters if weight.requires_grad}
    assert weights.keys() == named.keys() and weights
    for name, weight in named.items():
        torch.testing.assert_close(weights[name], weight.detach().float(), rtol=0, atol=0)
    flip_a_bit(shard(saved, 2))
    with pytest.raises(ConfigError, match=r"step-2 is damaged: .*take another checkpoint"):
        checkpoint_weights(folder)


def test_no_whole_checkpoint_is_no_fresh_start(saved: Path) -> None:
    for step in (1, 2):
        truncate(shard(saved, step))
    with pytest.raises(ConfigError, match="is whole"):
        newest(saved)
    with pytest.raises(ConfigError, match="no checkpoint"):  # and it stays so
        newest(saved)
    shutil.rmtree(saved / "checkpoints")
    assert newest(saved) == (None, [])


def test_what_a_killed_writer_left_is_never_taken_for_whole(trained: Trainer, saved: Path) -> None:
    half = saved / "checkpoints" / ".step-3.new"
    shutil.copytree(saved / "checkpoints" / "step-2", half)
    assert newest(saved) == (2, [])
    save(trained, saved, 4)
    assert not half.exists()


class Program:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_program_in_a_checkpoint_is_refused_unexecuted(trained: Trainer, saved: Path) -> None:
    victim = saved / "executed"
    target = shard(saved, 2)
    torch.save({"extra": Program(victim)}, target)
    manifest = saved / "checkpoints" / "step-2" / "manifest.json"  # whoever writes it writes its hash too
    record = json.loads(manifest.read_text())
    digest = subprocess.run(["sha256sum", target], capture_output=True, text=True).stdout.split()[0]
    record["files"][f"tensors/{target.name}"] = {"size": target.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(record))
    found = newest_checkpoint(saved, lambda _: None)
    assert found is not None and found.step == 2
    with pytest.raises(ConfigError, match="is refused"):
        found.load(trained.engine)
    assert not victim.exists()
    torch.load(io.BytesIO(target.read_bytes()), weights_only=False)  # it is armed
    assert victim.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that two checkpoints do not fit on."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs to be root, with the right to mount")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(trained: Trainer, small_disk: Path) -> None:
    save(trained, small_disk, 1)
    with pytest.raises(RunError, match=r"step-2 could not be written: No space left.*intact"):
        save(trained, small_disk, 2)
    assert newest(small_disk) == (1, [])
    assert sorted(entry.name for entry in (small_disk / "checkpoints").iterdir()) == ["latest", "step-1"]


def test_random_states_survive_json() -> None:
    before = json.loads(json.dumps(distributed.rng_state()))
    first = torch.rand(3), os.urandom(0)
    distributed.set_rng_state(before)
    assert torch.equal(torch.rand(3), first[0])
    distributed.set_rng_state(before)
    assert json.loads(json.dumps(distributed.rng_state())) == before


@pytest.mark.parametrize(("rank", "state"), [(0, 0), (1, 1), (3, 1)])  # on more ranks some share a state
def test_a_checkpoint_restores_the_random_state_of_its_rank(
    rank: int, state: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = newest_checkpoint(saved, lambda _: None)
    assert found is not None
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    states, drawn = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(distributed.rng_state())
        drawn.append(torch.rand(3))
    restored: list[Any] = []
    engine = SimpleNamespace(restore=lambda tensors, record: restored.append(record))
    dataclasses.replace(found, state={**found.state, "rng": states}).load(engine)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), drawn[state]) and restored == [found.state["engine"]]


def test_a_checkpoint_of_another_configuration_is_not_continued(config: RunConfig, saved: Path) -> None:
    other = copy.deepcopy(config)
    other.train.max_grad_norm = 7.0
    with pytest.raises(ConfigError, match=r"train.max_grad_norm: 1.0 -> 7.0"):
        resume.find_checkpoint(other, saved)


def test_coupled_pairs_are_not_continued_in_other_micro_batches(trained: Trainer, saved: Path) -> None:
    found = newest_checkpoint(saved, lambda _: None)
    assert found is not None
    now, contents = copy.deepcopy(trained.config), trained.session.contents
    stored = copy.deepcopy(found.state) | {"world_size": 2}
    now.train.micro_batch_size = stored["config"]["train"]["micro_batch_size"] = None
    other = dataclasses.replace(found, state=stored)
    resume.refuse_other_contents(other, contents, now, couples_batch=False)
    with pytest.raises(
        ConfigError, match=r"train.micro_batch_size .*: 4 -> 8"
    ):  # 8 pairs of two ranks, of one
        resume.refuse_other_contents(other, contents, now, couples_batch=True)
    stored["world_size"] = 1
    resume.refuse_other_contents(other, contents, now, couples_batch=True)


def test_other_ranks_and_stages_go_on_and_it_is_said(config: RunConfig, saved: Path) -> None:
    other = RunConfig(**{**vars(config), "engine": type(config.engine)(stage=2)})
    found = resume.find_checkpoint(other, saved)
    assert found is not None
    assert "by 1 process(es) with engine.stage=1; 1 with engine.stage=2" in (
        resume.other_layout(found, other) or ""
    )
    assert resume.other_layout(found, config) is None


def test_published_calibration_is_refused_on_another_number_of_ranks(config: RunConfig, saved: Path) -> None:
    state = {**(stored_state(saved) or {}), "world_size": 2}
    refuse_other_run(state, "outputs/x", config, 1)
    other = RunConfig(**{**vars(config), "rc": type(config.rc)(enabled=True, update="microbatch")})
    state["config"] = to_container(other)
    with pytest.raises(ConfigError, match="processes: 2 -> 1"):
        refuse_other_run(state, "outputs/x", other, 1)


def test_a_fresh_run_does_not_write_over_checkpoints(config: RunConfig, saved: Path) -> None:
    fresh = RunConfig(**{**vars(config), "resume": None})
    with pytest.raises(ConfigError, match="resume=auto"):
        resume.find_checkpoint(fresh, saved)


def test_changes_are_shown_key_by_key_and_refused() -> None:
    old = to_container(RunConfig())
    assert changes(old, RunConfig()) == []
    new = RunConfig(seed=2)
    new.train.max_steps, new.log.every, new.checkpoint.keep, new.data.path = 9, 5, 7, "elsewhere.jsonl"
    new.objective.hyperparameters = {"beta": 0.2, "epsilon": 0.0}
    found = changes(old, new)
    assert found == ["seed: 1 -> 2", "train.max_steps: None -> 9", "objective.beta: 0.1 -> 0.2"]
    with pytest.raises(ConfigError) as refusal:
        refuse_changes(found, "outputs/x", new)
    assert all(line in str(refusal.value) for line in [*found, "resume_changed=allow"])
    new.resume_changed = "allow"
    refuse_changes(found, "outputs/x", new)


def test_a_key_that_an_old_checkpoint_lacks_had_its_default() -> None:
    old = to_container(RunConfig())
    del old["train"]["max_grad_norm"]
    assert changes(old, RunConfig()) == []
    other = RunConfig()
    other.train.max_grad_norm = None
    assert changes(old, other) == ["train.max_grad_norm: 1.0 -> None"]


def test_a_run_that_ended_is_complete_and_not_taken_again(
    config: RunConfig, trained: Trainer, tmp_path: Path
) -> None:
    assert resume.finished_standing(config, tmp_path) is None
    finished = {**trained.state_dict(), "inputs": read_inputs(config), "evaluated": True}
    (tmp_path / "finished.json").write_text(json.dumps(finished))
    assert resume.finished_standing(config, tmp_path) == Standing([], [])
    longer = RunConfig(**{**vars(config), "seed": 5, "resume_changed": "allow"})
    with pytest.raises(ConfigError, match="left no checkpoint to continue from with seed: 1 -> 5"):
        resume.finished_standing(longer, tmp_path)
    save(trained, tmp_path, 1)
    assert resume.finished_standing(longer, tmp_path) == Standing(["seed: 1 -> 5"], [])


@pytest.mark.parametrize(
    ("change", "trained_otherwise", "evaluated_otherwise"),
    [
        ({"eval.max_examples": 4}, [], ["eval.max_examples: None -> 4"]),
        ({"eval.batch_size": 4}, [], []),
        ({"eval.tasks": ["gsm8k"]}, [], []),  # of `rcpo evaluate` alone
        ({"eval.judge": True}, [], []),
        ({"eval.every": 4}, ["eval.every: 0 -> 4"], []),
        ({"probe.size": 4}, ["probe.size: 16 -> 4"], []),
        ({"data.path": "other"}, ["the training data (by content)"], []),
        ({"data.path": "copy"}, [], []),
        ({"data.eval_path": "other"}, [], ["the held-out data (by content)"]),
        ({"data.sources": "other"}, ["the training data (by content)"], []),
    ],
)
def test_a_complete_run_has_the_same_data_and_evaluation(
    config: RunConfig,
    trained: Trainer,
    tmp_path: Path,
    change: dict[str, Any],
    trained_otherwise: list[str],
    evaluated_otherwise: list[str],
) -> None:
    assert config.data.path is not None
    files = {"other": sums_file(tmp_path / "other.jsonl", 23), "copy": str(tmp_path / "pairs.jsonl")}
    shutil.copy(config.data.path, files["copy"])
    state = {**trained.state_dict(), "inputs": read_inputs(config), "evaluated": True}
    now = copy.deepcopy(config)
    for key, value in change.items():
        node, leaf = key.split(".")
        given = files.get(str(value), value)
        setattr(getattr(now, node), leaf, [SourceConfig(path=given)] if leaf == "sources" else given)
    found = standing(tmp_path, state, now, read_inputs(now))
    assert found.trained == trained_otherwise
    assert found.evaluated == evaluated_otherwise


def test_data_that_changed_in_place_are_other_data(
    config: RunConfig, trained: Trainer, tmp_path: Path
) -> None:
    now = copy.deepcopy(config)
    now.data.path = now.data.eval_path = sums_file(tmp_path / "pairs.jsonl", 24)
    state = {**trained.state_dict(), "inputs": read_inputs(now), "evaluated": True}
    assert standing(tmp_path, state, now, read_inputs(now)).complete
    sums_file(tmp_path / "pairs.jsonl", 25)
    found = standing(tmp_path, state, now, read_inputs(now))
    assert found == Standing(["the training data (by content)"], ["the held-out data (by content)"])


def test_other_data_and_another_model_are_refused(trained: Trainer, saved: Path) -> None:
    found = newest_checkpoint(saved, lambda _: None)
    assert found is not None
    for what in ("the training examples", "the model it starts from"):
        contents = {**found.state["contents"], what: "another hash"}
        other = dataclasses.replace(found, state={**found.state, "contents": contents})
        with pytest.raises(ConfigError, match=what):
            now = trained.session
            resume.refuse_other_contents(other, now.contents, now.config, couples_batch=False)


def test_the_stored_configuration_is_that_of_the_run(config: RunConfig, saved: Path) -> None:
    assert (stored_state(saved) or {})["config"] == to_container(config)
    assert stored_state(saved / "nothing") is None


def test_a_file_system_without_locks_keeps_no_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:  # as of Lustre, mounted without `flock`
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    (message,) = caplog.messages
    assert f"{tmp_path} cannot be locked (Function not implemented)" in message


def test_two_runs_in_a_folder_the_second_is_refused(tmp_path: Path) -> None:
    refuse_locked(tmp_path)
    with locked(tmp_path):
        with pytest.raises(ConfigError, match=f"in use: process {os.getpid()} on"):
            refuse_locked(tmp_path)
        with pytest.raises(ConfigError, match="in use"), locked(tmp_path):
            pass
    refuse_locked(tmp_path)
