"""What is written beside the weights: what ends an answer, and the date on which prompts are written."""

import json
import os
from datetime import date
from pathlib import Path

import pytest
from tiny import sums_file, tiny_llama
from transformers import GenerationConfig, LlamaConfig

from rcpo.config.changes import changes
from rcpo.config.data import check_data
from rcpo.config.parsing import load_run_config, save_run_config, to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.system.files import put_in_place
from rcpo.training.export import save_model
from rcpo.training.session import Session, first_day

BASE, LEARNED, TOKENIZERS = 5, 1, 2  # token ids: the base model's end, <bos> and <eos> of the tiny tokenizer
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<bos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def configured(folder: Path, template: str | None) -> RunConfig:
    """A base model that ends what it says with a token of its own; a template, or none."""
    distributed.initialize()
    config = RunConfig()
    config.wandb.mode, config.reference.mode, config.probe.size = "disabled", "model", 0
    config.model.name, config.model.path = "local", tiny_llama(folder / "model")
    for settings in (LlamaConfig.from_pretrained(config.model.path), GenerationConfig()):
        settings.eos_token_id = BASE
        settings.save_pretrained(config.model.path)
    config.data.name, config.data.path = "pairs", sums_file(folder / "pairs.jsonl", 24)
    config.data.cache = "off"
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 8, 8, 1
    if template is not None:
        (folder / "turns.jinja").write_text(template)
        config.data.template = str(folder / "turns.jinja")
    (folder / "run").mkdir()
    save_run_config(config, folder / "run" / "config.yaml")
    return config


def ends(folder: Path) -> object:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(("template", "learned"), [(None, TOKENIZERS), (TURNS, LEARNED)])
def test_generation_stops_at_what_ends_a_learned_turn(
    tmp_path: Path, template: str | None, learned: int
) -> None:
    session = Session(configured(tmp_path, template), tmp_path / "run", training=True)
    save_model(session, "final")
    assert ends(tmp_path / "run" / "final") == [BASE, learned]
    assert GenerationConfig.from_pretrained(tmp_path / "run" / "final").eos_token_id == [BASE, learned]


def test_generation_stops_with_an_adapter_and_with_the_model_that_it_is_merged_into(tmp_path: Path) -> None:
    config = configured(tmp_path, TURNS)
    config.adapter.name, config.adapter.save_merged = "lora", True
    config.adapter.target_modules = ["q_proj"]
    save_model(Session(config, tmp_path / "run", training=True), "final")
    for folder in (tmp_path / "run" / "final", tmp_path / "run" / "final" / "merged"):
        assert ends(folder) == [BASE, LEARNED]


def test_an_end_that_the_model_lists_is_listed_once(tmp_path: Path) -> None:
    config = configured(tmp_path, None)
    assert config.model.path is not None
    GenerationConfig(eos_token_id=[TOKENIZERS, BASE]).save_pretrained(config.model.path)
    save_model(Session(config, tmp_path / "run", training=True), "final")
    assert ends(tmp_path / "run" / "final") == [TOKENIZERS, BASE]


def test_a_run_keeps_the_date_on_which_it_began(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y') }}|" + TURNS
    run_dir = tmp_path / "run"
    config = configured(tmp_path, dated)
    first = Session(config, run_dir, training=True).datasets.train.fingerprint
    assert config.data.date == date.today().isoformat()
    assert load_run_config(run_dir).data.date == config.data.date  # for an evaluation on another day
    # a continued run, whose command line gives no date
    (run_dir / "finished.json").write_text(json.dumps({"config": {"data": {"date": "2020-02-29"}}}))
    assert first_day(run_dir) == "2020-02-29"
    (run_dir / "finished.json").unlink()
    config.data.date = "2020-02-29"
    assert Session(config, run_dir, training=False).datasets.train.fingerprint != first


def test_a_date_is_recorded_only_where_the_template_writes_it(tmp_path: Path) -> None:
    config = configured(tmp_path, TURNS)
    Session(config, tmp_path / "run", training=True)
    assert config.data.date is None and load_run_config(tmp_path / "run").data.date is None


def test_a_date_is_written_as_iso_8601_does(tmp_path: Path) -> None:
    config = configured(tmp_path, TURNS)
    for value in ("31.1.2026", "today", "2026-02-30"):
        config.data.date = value
        with pytest.raises(ConfigError, match=f"data.date={value} is not a date: write it as 2026-01-31"):
            check_data(config.data)


def test_a_continued_run_may_leave_its_date_out_but_not_change_it() -> None:
    before, now = RunConfig(), RunConfig()
    before.data.date = "2026-01-31"
    assert changes(to_container(before), now) == []
    now.data.date = "2026-02-01"
    assert changes(to_container(before), now) == ["data.date: 2026-01-31 -> 2026-02-01"]


def test_a_folder_has_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """finished.json is synced: after a power failure it must not stand beside a final/ of empty files."""
    (tmp_path / ".final.new" / "merged").mkdir(parents=True)
    for name in ("model.safetensors", "merged/model.safetensors"):
        (tmp_path / ".final.new" / name).write_text("new")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_text("old")
    synced: dict[int, bool] = {}  # by inode, whether the new folder had its name
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: synced.update({os.fstat(file).st_ino: not (tmp_path / ".final.new").exists()}),
    )
    put_in_place(tmp_path / ".final.new", tmp_path / "final")
    inside = [tmp_path / "final", *(tmp_path / "final").rglob("*")]
    expected = {path.stat().st_ino: False for path in inside} | {tmp_path.stat().st_ino: True}
    assert synced == expected and len(inside) == 4
    assert (tmp_path / "final" / "model.safetensors").read_text() == "new"
