"""The reference of a session: the same numbers held or precomputed, from the cache, on several ranks."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import transformers
from ranks import on_ranks
from sessions import heldout_logratios
from tiny import held_out, sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import broken_pass

from rcpo.config.schema import AdapterConfig, ObjectiveConfig, RunConfig
from rcpo.data.collate import collate_indices
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.engine.zero import Engine
from rcpo.errors import RunError
from rcpo.method.types import PAIR, SIDES, TokenBatch
from rcpo.models.contents import tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.reference import prepare as reference_pass
from rcpo.reference.entry import HEADER, Stored
from rcpo.reference.parts import ResumableSink
from rcpo.reference.rows import Rows, StoredReference
from rcpo.system import distributed
from rcpo.system.signals import Stopped
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

PAIRS = 24
KTO = {"beta": 0.1, "lambda_chosen": 1.0, "lambda_rejected": 1.0}
WORKER = str(Path(__file__).parents[1] / "workers" / "reference_ranks.py")


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def another_model(folder: Path, source: str) -> str:
    """The same architecture and tokenizer with other weights."""
    tiny_llama(folder)
    other = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path: Path, model: str) -> RunConfig:
    pairs = sums_file(tmp_path / "pairs.jsonl", PAIRS)
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, held_out(pairs)
    config.train.batch_size, config.train.micro_batch_size = 8, 4
    config.eval.batch_size = 5
    config.data.layout = "separate"  # so that rounding is all that differs
    config.reference.cache = str(tmp_path / "cache")
    return config


@pytest.fixture
def alone(config: RunConfig) -> RunConfig:
    """Nothing is held out, so that there is one entry."""
    config.data.eval_path, config.data.eval_fraction = None, 0.0
    return config


def never() -> bool:
    return False


def prepared(
    config: RunConfig, *, training: bool = True, stop: Callable[[], bool] = never
) -> tuple[Session, list[str]]:
    said: list[str] = []
    session = Session(config, Path("unused"), training=training)
    session.prepare_reference(said.append, stop)
    return session, said


def entries(config: RunConfig) -> list[Path]:
    assert config.reference.cache is not None
    return sorted(Path(config.reference.cache, "reference").glob("*.logps"))


def reference_logps(session: Session) -> np.ndarray:
    """Of all training pairs, in the batches of the pass: other padding moves a token by 1e-6."""
    reference = session.forward.reference
    assert reference is not None
    batches = session.eval_batches(session.datasets.train)
    return torch.cat([reference(batch) for batch in batches]).numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("name", ["dpo", "tidpo", "kto"])
def test_precomputed_is_what_a_held_model_gives(config: RunConfig, name: str) -> None:
    if name == "tidpo":
        config.objective = ObjectiveConfig(name=name, reduction="importance", hyperparameters={"beta": 0.1})
    elif name == "kto":
        config.objective = ObjectiveConfig(name=name, hyperparameters=KTO)
    sessions = [prepared(config)[0], prepared(config)[0]]
    config.reference.mode = "model"
    held = prepared(config)[0]
    for session in sessions:
        assert difference(reference_logps(session), reference_logps(held)) < 1e-6
    rows = [Trainer(session).train_step() for session in (*sessions, held)]
    again = [Trainer(session).train_step() for session in (*sessions, held)]
    for row in (*rows, *again):
        base = rows[-1] if row in rows else again[-1]
        for metric in ("loss", "logratios/chosen", "logratios/rejected", "rewards/margins"):
            assert row[metric] == pytest.approx(base[metric], abs=2e-6), metric


def test_the_log_probs_are_those_of_transformers(config: RunConfig, model: str) -> None:
    session, _ = prepared(config)
    own = AutoModelForCausalLM.from_pretrained(model).eval()
    batch = session.collate(session.datasets.train, [7, -1, 3])
    assert session.forward.reference is not None
    found = torch.split(session.forward.reference(batch), batch.lengths.tolist())
    for place, (index, side) in enumerate([(7, 0), (None, 0), (3, 0), (7, 1), (None, 1), (3, 1)]):
        if index is None:
            assert not found[place].any()  # a filler
            continue
        example = session.datasets.train[index]
        response = [example.chosen, example.rejected][side]
        with torch.no_grad():
            logits = own(torch.tensor([example.prompt + response])).logits[0]
        expected = torch.log_softmax(logits, -1)[len(example.prompt) - 1 : -1]
        expected = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(found[place], expected, atol=1e-5)


def test_a_second_session_reads_and_its_values_are_mapped(alone: RunConfig) -> None:
    _, first = prepared(alone)
    session, second = prepared(alone)
    assert [line.split(":")[1].split()[0] for line in first] == ["computed"]
    assert [line.split(":")[1].split()[0] for line in second] == ["read"]
    (path,) = entries(alone)
    tokens = int(session.datasets.train.lengths[:, 1:].sum())
    assert path.stat().st_size == HEADER + 4 * tokens and f"({tokens:,} tokens)" in second[0]
    reference = session.forward.reference
    assert isinstance(reference, StoredReference) and isinstance(reference._logps, np.memmap)


def test_no_cache_is_no_difference(config: RunConfig) -> None:
    kept = reference_logps(prepared(config)[0])
    config.reference.cache = "off"
    session, said = prepared(config)
    assert (reference_logps(session) == kept).all()
    assert len(said) == 2 and all("not kept" in line for line in said)


def change_weights(config: RunConfig, folder: Path) -> None:
    assert config.model.path is not None
    config.model.path = another_model(folder / "other", config.model.path)


def change_tokenizer(config: RunConfig, folder: Path) -> None:
    config.model.path = tiny_llama(folder / "same")
    path = folder / "same" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def change_dataset(config: RunConfig, folder: Path) -> None:
    text = Path(config.data.path or "").read_text().replace("it is 109", "it is 108", 1)
    config.data.path = str(folder / "changed.jsonl")
    (folder / "changed.jsonl").write_text(text)


def change_truncation(config: RunConfig, folder: Path) -> None:
    config.data.max_length = 12


def change_dtype(config: RunConfig, folder: Path) -> None:
    config.train.dtype = "bf16"


def change_layout(config: RunConfig, folder: Path) -> None:
    config.data.layout = "separate" if config.data.layout == "shared" else "shared"


def change_sides(config: RunConfig, folder: Path) -> None:
    config.objective = ObjectiveConfig(name="kto", hyperparameters=KTO)


CHANGES = [
    change_weights, change_tokenizer, change_dataset, change_truncation, change_dtype, change_layout,
    change_sides,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_ingredient_is_in_the_key(alone: RunConfig, tmp_path: Path, change) -> None:
    config = alone
    prepared(config)
    assert len(entries(config)) == 1
    change(config, tmp_path)
    _, said = prepared(config)
    assert "computed" in said[0] and len(entries(config)) == 2
    ingredients = [json.loads(path.read_bytes()[:HEADER])["ingredients"] for path in entries(config)]
    different = {name for name in ingredients[0] if ingredients[0][name] != ingredients[1][name]}
    name = change.__name__.removeprefix("change_")
    assert different == {"dataset" if name == "truncation" else name}


@pytest.mark.parametrize("name", ["format", "attention", "device", "torch", "transformers"])
def test_so_is_what_chooses_the_kernels(alone: RunConfig, name: str) -> None:
    prepared(alone)
    (path,) = entries(alone)
    ingredients = json.loads(path.read_bytes()[:HEADER])["ingredients"]
    assert reference_pass.keys.entry_key(ingredients) == path.stem
    assert reference_pass.keys.entry_key(ingredients | {name: "another"}) != path.stem
    assert name in ingredients


def only_difference(config: RunConfig) -> set[str]:
    """What is different between two entries' ingredients."""
    first, second = [json.loads(path.read_bytes()[:HEADER])["ingredients"] for path in entries(config)]
    return {name for name in first if first[name] != second[name]}


def test_another_attention_computes_anew(alone: RunConfig) -> None:
    prepared(alone)
    alone.model.attention = "eager"
    assert "computed" in prepared(alone)[1][0]
    assert only_difference(alone) == {"attention"}


def test_the_versions_that_compute_are_in_the_key(alone: RunConfig) -> None:
    prepared(alone)
    (path,) = entries(alone)
    ingredients = json.loads(path.read_bytes()[:HEADER])["ingredients"]
    assert ingredients["torch"] == torch.__version__
    assert ingredients["transformers"] == transformers.__version__
    assert ingredients["device"] == distributed.device().type
    assert ingredients["attention"] == "sdpa" and ingredients["quantization"] == "None"


def test_weights_in_four_bits_have_an_entry_of_their_own(alone: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    alone.model.path, alone.adapter = tiny_llama(tmp_path / "wide", hidden=64), AdapterConfig(name="lora")
    prepared(alone)
    alone.adapter.quantization = "nf4"
    assert "computed" in prepared(alone)[1][0]
    assert only_difference(alone) == {"quantization"}


def test_an_adapter_s_own_tokenizer_is_the_one_that_counts(tmp_path: Path) -> None:
    base, adapter = Path(tiny_llama(tmp_path / "base")), tmp_path / "adapter"
    adapter.mkdir()
    assert ModelSource(base, adapter=adapter).tokenizer == base
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    source = ModelSource(base, adapter=adapter)
    assert source.tokenizer == adapter
    assert tokenizer_hash(source.tokenizer, None) != tokenizer_hash(base, None)


def test_what_changes_no_number_hits(config: RunConfig, tmp_path: Path, model: str) -> None:
    prepared(config)
    config.seed, config.rc.enabled, config.train.epochs, config.eval.batch_size = 5, True, 2, 7
    config.objective = ObjectiveConfig(name="ipo", reduction="mean", hyperparameters={"tau": 0.1})
    config.model.path = tiny_llama(tmp_path / "copy")
    assert all("read" in line for line in prepared(config)[1])
    config.model.path, config.reference.path = another_model(tmp_path / "other", model), model
    session, said = prepared(config)  # named as another model's reference, it is the same model
    assert all("read" in line for line in said)
    assert Trainer(session).train_step()["logratios/chosen"] != pytest.approx(0.0, abs=1e-3)


def test_another_reference_is_loaded_once_and_freed(
    config: RunConfig, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.reference.path = another_model(tmp_path / "other", model)
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = reference_pass.read_model

    def remember(source: ModelSource, config: RunConfig) -> torch.nn.Module:
        found = load(source, config)
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(reference_pass, "read_model", remember)
    session, said = prepared(config)
    gc.collect()
    assert "computed" in said[0] and len(loaded) == 1 and loaded[0]() is None
    values = reference_logps(session)
    prepared(config)
    assert len(loaded) == 1  # a hit needs no model
    config.reference.mode = "model"
    held, _ = prepared(config)
    gc.collect()
    assert len(loaded) == 2 and loaded[1]() is not None
    assert difference(values, reference_logps(held)) < 1e-6


def test_fresh_weights_are_known_by_their_values(alone: RunConfig) -> None:
    config = alone
    config.model.init = "random"
    session, said = prepared(config)
    assert "computed" in said[0]
    assert "read" in prepared(config)[1][0]
    config.seed = 2
    assert "computed" in prepared(config)[1][0] and len(entries(config)) == 2
    config.seed, config.reference.mode = 1, "model"
    assert difference(reference_logps(session), reference_logps(prepared(config)[0])) < 1e-6


def test_a_trained_policy_is_never_the_reference(config: RunConfig) -> None:
    config.reference.cache = "off"
    session, _ = prepared(config)
    before = reference_logps(session)
    trainer = Trainer(session)
    for _ in range(3):
        trainer.train_step()
    session.prepare_reference()  # a second call finds the reference set up
    assert (reference_logps(session) == before).all()
    assert (reference_logps(prepared(config)[0]) == before).all()  # as a resumed run makes it, before loading


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_finished_run_is_held_against_its_start(config: RunConfig, tmp_path: Path, init: str) -> None:
    config.model.init, config.reference.cache = init, "off"
    session = Session(config, tmp_path, training=True)
    session.prepare_reference()
    before = heldout_logratios(session)
    trainer = Trainer(session)
    for _ in range(3):
        trainer.train_step()
    trained = heldout_logratios(session)
    trainer.save_final()
    finished = Session(config, tmp_path, training=False, final=tmp_path / "final")
    finished.prepare_reference()
    assert difference(before, np.zeros_like(before)) < 1e-6 and np.abs(trained).max() > 1e-3
    assert difference(heldout_logratios(finished), trained) < 1e-5


def test_a_short_run_scores_the_examples_that_it_uses(config: RunConfig) -> None:
    config.train.max_steps = 2
    config.eval.max_examples = 3
    session, said = prepared(config)
    used = {index for step in range(2) for index in session.batches.indices(step)}
    lengths = session.datasets.train.lengths
    assert f"({int(lengths[sorted(used), 1:].sum()):,} tokens)" in said[0] and len(used) == 16
    assert f"({int(lengths[:3, 1:].sum()):,} tokens)" in said[1]
    for _ in range(2):
        assert "read" in prepared(config)[1][0]
    trainer = Trainer(session)
    rows = [trainer.train_step() for _ in range(2)]
    config.reference.mode = "model"
    held = Trainer(prepared(config)[0])
    for row in rows:
        assert row["loss"] == pytest.approx(held.train_step()["loss"], abs=1e-6)


def test_evaluation_alone_scores_what_is_held_out(config: RunConfig) -> None:
    _, said = prepared(config, training=False)
    assert len(said) == 1 and "held out" in said[0]


@pytest.mark.parametrize(("dtype", "shift"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_numbers_of_another_policy_are_refused_at_the_start(
    config: RunConfig, dtype: str, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.train.dtype = dtype
    session, _ = prepared(config)
    stored = session.forward.reference
    assert isinstance(stored, StoredReference)
    batch = session.collate(session.datasets.train, session.rank_microbatches(0)[0])
    wrong = StoredReference(stored._rows, np.array(stored._logps) + np.float32(shift))
    reference_pass.check_start(session.engine, stored, batch, dtype)
    with pytest.raises(RunError, match="differ by 0"):
        reference_pass.check_start(session.engine, wrong, batch, dtype)
    # a session makes the check itself
    monkeypatch.setattr(reference_pass._Fill, "__call__", _wrong_fill)
    config.reference.cache = "off"
    with pytest.raises(RunError, match="a token"):
        prepared(config)


def _wrong_fill(_: Any, sink: Any) -> None:
    """Write log-probs that are all the same."""
    sink.write(0, np.full(sink.total, -0.1, np.float32))


def test_rows_are_where_the_responses_are() -> None:
    examples = [
        Example("a", [1, 2, 3], [4, 5, 6, 7], [8]),
        Example("b", [1], [2, 3], [4, 5]),
        Example("c", [1, 2, 3, 4], [5], [6, 7, 8]),
    ]
    dataset = PairDataset.of(examples, max_length=6)
    # mismatched: b's chosen after a, c's after b, a's four tokens after c's prompt of four, cut to 6 − 4
    assert dataset.response_lengths(SIDES[:3]).tolist() == [[4, 1, 2], [2, 2, 1], [1, 3, 2]]
    for index in range(3):
        assert len(dataset.mismatched(index)) == dataset.response_lengths(SIDES[:3])[index, 2]
    assert Rows(dataset, PAIR).offsets.tolist() == [0, 4, 5, 7, 9, 10, 13]
    assert Rows(dataset, PAIR, np.array([1])).offsets.tolist() == [0, 0, 0, 2, 4, 4, 4]


def test_a_response_without_tokens_is_no_piece_and_stands_for_none() -> None:
    dataset = PairDataset.of([Example("a", [1], [2], []), Example("b", [1], [], [3, 4])])
    rows = Rows(dataset, PAIR)
    assert rows.offsets.tolist() == [0, 1, 1, 1, 3] and rows.lengths.tolist() == [1, 0, 0, 2]
    both = collate_indices(dataset, [0, 1, -1], pad_id=0)
    (first, second) = (collate_indices(dataset, [index], pad_id=0) for index in (0, 1))
    logps = torch.tensor([-1.0, -9.0, -2.0, -3.0])  # a's chosen, the filler's, b's rejected
    nothing = np.zeros(4, bool)
    pieces = [(place, values.tolist()) for place, values in rows.pieces(both, logps, nothing)]
    assert pieces == [(0, [-1.0]), (1, [-2.0, -3.0])]  # none that a lacks, at 1 too
    found = rows.at(np.array([0]))
    assert found.tolist() == [True, True, True, False]
    assert rows.within(first, found) and not rows.within(second, found) and not rows.within(both, found)
    assert [place for place, _ in rows.pieces(both, logps, found)] == [1]
    assert rows.within(both, rows.at(np.array([0, 1])))


def ending_at(*asked: int) -> Callable[[], bool]:
    """Says that the run is to end each time that its count, from 1 on, is one of these."""
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count in asked

    return stop


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each batch that an engine scores: that of its pairs."""
    found: list[int] = []
    forward = Engine.forward

    def counted(engine: Engine, batch: TokenBatch) -> Any:
        found.append(batch.num_pairs)
        return forward(engine, batch)

    monkeypatch.setattr(Engine, "forward", counted)
    return found


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_a_stopped_pass_goes_on_where_it_was_and_gives_the_same_bytes(
    alone: RunConfig, tmp_path: Path, forwards: list[int], layout: str
) -> None:
    alone.data.layout = layout
    prepared(alone)
    assert forwards == [5, 5, 5, 5, 4, 4]  # 24 pairs, and a micro-batch for the check of the start
    (unbroken,) = entries(alone)
    alone.reference.cache = str(tmp_path / "broken")
    forwards.clear()
    for computed in ([5, 5], [5]):  # the second stop comes in the third batch, of which two are left out
        with pytest.raises(Stopped, match="while the reference was computed"):
            prepared(alone, stop=ending_at(2 if computed == [5, 5] else 3))
        assert forwards == computed
        forwards.clear()
    assert not entries(alone) and len(list((tmp_path / "broken").rglob("*.part"))) == 2
    session, said = prepared(alone)
    assert forwards == [5, 4, 4]
    lengths = session.datasets.train.lengths
    order = np.argsort(-(lengths[:, 0] + np.maximum(lengths[:, 1], lengths[:, 2])), kind="stable")
    if layout == "shared":
        order = np.argsort(-lengths.sum(axis=1), kind="stable")
    share = lengths[order[:15], 1:].sum() / lengths[:, 1:].sum()
    assert said[0] == (
        f"reference log-probs (train): {share:.0%} found, computed by a pass that did not come to its end"
    )
    assert len(said) == 2 and "kept in" in said[1]
    (resumed,) = entries(alone)
    assert resumed.read_bytes() == unbroken.read_bytes()
    assert sorted(path.suffix for path in resumed.parent.iterdir()) == [".lock", ".logps"]


def test_parts_are_written_as_often_as_progress_is_told(
    alone: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(reference_pass, "PROGRESS_EVERY", -1.0)
    monkeypatch.setattr(ResumableSink, "keep", lambda sink: kept.append(1))
    _, said = prepared(alone)
    assert len(kept) == 5 and sum("% computed" in line for line in said) == 5


def test_batches_of_another_size_use_what_they_can(alone: RunConfig, forwards: list[int]) -> None:
    with pytest.raises(Stopped):
        prepared(alone, stop=ending_at(2))  # 10 pairs
    forwards.clear()
    alone.eval.batch_size = 4
    _, said = prepared(alone)
    assert forwards == [4, 4, 4, 4, 4]  # two of six are left out, the third is half there; and the check's
    assert "found" in said[0]
    found = reference_logps(prepared(alone)[0])
    alone.reference.cache = "off"
    assert difference(found, reference_logps(prepared(alone)[0])) < 1e-6


def test_off_leaves_no_part(alone: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_pass, "PROGRESS_EVERY", -1.0)
    alone.reference.cache = "off"
    with pytest.raises(Stopped):
        prepared(alone, stop=ending_at(2))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_parts_of_other_ranks_and_of_a_killed_run_are_used(alone: RunConfig, tmp_path: Path) -> None:
    alone.engine.stage = 3  # where each forward pass needs all ranks

    def run(name: str, ranks: int, *how: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir()
        on_ranks(ranks, broken_pass.run, alone, folder, *how, timeout=240)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]

    first = run("stopped", 2, 1, "stop")  # five pairs on each; the second rank alone is asked to stop
    assert [result["forwards"] for result in first] == [1, 1]
    assert all("stopped while" in result["said"][-1] for result in first)
    with pytest.raises(RuntimeError, match="ended with -9"):
        run("killed", 1, 4, "kill")  # two batches are there, a third is kept, the fourth is lost
    last = run("whole", 2, None, "end")
    # of the ten pairs of the second batches the first rank's five are there, yet it takes part; the third
    # batches have two pairs each; then comes the check of the start
    assert [result["forwards"] for result in last] == [3, 3]
    assert "found" in last[0]["said"][0] and "kept in" in last[0]["said"][1] and not last[1]["said"]
    (resumed,) = entries(alone)
    assert sorted(path.suffix for path in resumed.parent.iterdir()) == [".lock", ".logps"]
    alone.engine.stage, alone.reference.cache = 0, str(tmp_path / "another")
    prepared(alone)
    (unbroken,) = entries(alone)
    values = [
        Stored(path, path.stem, (path.stat().st_size - HEADER) // 4).values for path in (resumed, unbroken)
    ]
    assert resumed.name == unbroken.name and difference(*values) < 1e-6


@pytest.mark.slow
def test_two_ranks_share_one_entry(config: RunConfig, tmp_path: Path, model: str) -> None:
    other = another_model(tmp_path / "other", model)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [model, other, str(config.data.path), str(tmp_path), "0,3"]
    result = forked.run([*launcher, WORKER, *arguments])
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    config.reference.path = other
    alone = reference_logps(prepared(config)[0]).sum()
    for stage in "03":
        for name in ("first", "second", "apart", "off"):
            record = found[f"{name} {stage}"]
            assert record["difference"] < 1e-6, (name, record)
            assert record["total"] == pytest.approx(alone, abs=1e-3), (name, record)
        first, second, apart, off = (found[f"{name} {stage}"] for name in ("first", "second", "apart", "off"))
        assert ("computed" in first["said"]) == (stage == "0") and "read" in second["said"]
        assert [record["mapped"] for record in (first, second, apart, off)] == [2, 2, 1, 0]
        assert "not kept" in off["said"]
