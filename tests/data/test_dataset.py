"""Configured data to tokenised splits."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from permissions import no_permission
from transformers import AutoTokenizer

import rcpo.data
from rcpo.config.data import DataConfig, SourceConfig
from rcpo.data.dataset import load_datasets
from rcpo.data.encode import prompt_key
from rcpo.data.formats import read_row
from rcpo.errors import ConfigError

TOKENIZER = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / "assets" / "tiny")


def pairs(count: int, name: str = "q", **changes: str) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{n}", "chosen": "yes", "rejected": "no", **changes} for n in range(count)]


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(seed: int = 1, **settings: Any) -> Any:
    return load_datasets(DataConfig(name="pairs", **settings), TOKENIZER, seed)


def test_sums_are_ready_to_train_and_to_generate() -> None:
    data = load_datasets(DataConfig(name="sums"), TOKENIZER, seed=1)
    assert data.evaluation is not None and data.checker is not None
    assert (data.report.train, data.report.evaluation) == (len(data.train), len(data.evaluation))
    assert len(data.train) == 6400
    assert len(data.evaluation) == len(data.prompts) > 700
    texts = [TOKENIZER.decode(example.prompt[1:]) for example in data.evaluation]
    assert texts == data.prompts
    answer = TOKENIZER.decode(data.evaluation[5].chosen[:-1])
    assert data.checker(data.prompts[5], answer)
    trained = {tuple(example.prompt) for example in data.train}
    assert not any(tuple(example.prompt) in trained for example in data.evaluation)
    assert data.report.shared_prompts == 0
    other = load_datasets(DataConfig(name="sums"), TOKENIZER, seed=2)
    assert other.evaluation is not None
    assert other.evaluation.fingerprint == data.evaluation.fingerprint
    assert other.train.fingerprint != data.train.fingerprint


def test_a_fraction_that_leaves_no_sum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves no sum"):
        load_datasets(DataConfig(name="sums", eval_fraction=1.0), TOKENIZER, seed=1)


def test_texts_without_a_prompt_are_split_too(tmp_path: Path) -> None:
    texts = [{"text": f"text {n}"} for n in (*range(10), *range(10))]
    data = load(path=write(tmp_path / "x.jsonl", texts), eval_fraction=0.2)
    sides = [{tuple(one.chosen) for one in side} for side in (data.train, data.evaluation)]
    assert (len(data.train), len(data.evaluation)) == (16, 4)  # the same text twice is on one side
    assert not sides[0] & sides[1]


def test_loading_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(30))
    first, second, other = (load(seed, path=path, eval_fraction=0.2) for seed in (1, 1, 2))
    assert first.train.fingerprint == second.train.fingerprint != other.train.fingerprint
    assert (len(first.train), len(first.evaluation)) == (24, 6)
    assert first.prompts == [] and first.checker is None
    assert not set(first.train.ids) & set(first.evaluation.ids)


def test_what_is_held_out_depends_on_the_prompts_in_the_file_alone(tmp_path: Path) -> None:
    """Not on the template, the system prompt, or the day that a template writes."""
    text = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "b"} for n in range(40)]
    turns = [row | {"prompt": f"\n\nHuman: {row['prompt']}\n\nAssistant:"} for row in text]
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in text]
    found = []
    for name, rows in (("text", text), ("turns", turns), ("messages", messages)):
        path = write(tmp_path / f"{name}.jsonl", rows)
        for settings in ({"template": "chatml"}, {"template": "zephyr", "system_prompt": "Today is 1 May"}):
            data = load(path=path, eval_fraction=0.25, **settings)
            found.append(([place.partition(":")[2] for place in data.evaluation.ids], data.split))
    assert len(found) == 6 and len(found[0][0]) == 10
    assert all(other == found[0] for other in found[1:])
    assert load(2, path=path, eval_fraction=0.25, template="chatml").split != found[0][1]


def test_held_out_pairs_may_come_from_a_file(tmp_path: Path) -> None:
    data = load(
        path=write(tmp_path / "train.jsonl", pairs(10)), eval_path=write(tmp_path / "e.jsonl", pairs(12))
    )
    assert (len(data.train), len(data.evaluation), data.report.counts["read"]) == (10, 12, 22)
    assert data.report.shared_prompts == 10
    assert "10 held-out pairs" in data.report.lines()[-1]


def test_nothing_is_held_out_on_request(tmp_path: Path) -> None:
    data = load(path=write(tmp_path / "x.jsonl", pairs(5)), eval_fraction=0.0)
    assert data.evaluation is None and len(data.train) == 5


def test_bad_rows_are_refused_with_their_line_or_dropped_and_counted(tmp_path: Path) -> None:
    bad = pairs(2, "r", rejected=" ")
    path = write(tmp_path / "x.jsonl", [*pairs(3), {"prompt": "p", "rejected": "r"}, *bad, *pairs(1, "s")])
    for _ in range(2):  # made, and read from the cache
        with pytest.raises(ConfigError, match=rf"^{path}:4: no field 'chosen'; .* data.on_bad=drop"):
            load(path=path)
        data = load(path=path, on_bad="drop", max_dropped=0.5, eval_fraction=0)
        assert list(data.train.ids) == [f"x.jsonl:{n}" for n in (1, 2, 3, 7)]
        assert dict(data.report.dropped) == {"no field 'chosen'": 1, "empty rejected response": 2}
        assert data.report.examples["empty rejected response"] == f"{path}:5"
        assert any("2 empty rejected response (first:" in line for line in data.report.lines())
        assert json.loads(json.dumps(data.report.as_dict(), allow_nan=False))["read"] == 7


def test_a_split_that_loses_every_pair_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(5))
    with pytest.raises(ConfigError, match=r"in 5 rows: 5 prompt leaves no room.*x.jsonl:1\)"):
        load(path=path, max_length=2, on_bad="drop")
    with pytest.raises(ConfigError, match=r"no usable example in 0 rows"):
        load(path=write(tmp_path / "empty.jsonl", []))


def test_a_folder_in_the_hub_s_layout_has_splits_and_folders(tmp_path: Path) -> None:
    for part, count in (("helpful-base", 3), ("harmless-base", 4)):
        write(tmp_path / part / "train.jsonl", pairs(count, part[:3]))
        write(tmp_path / part / "test.jsonl", pairs(2, part))
    folder = str(tmp_path)
    data = load(path=folder, eval_split="test")
    assert (len(data.train), len(data.evaluation)) == (7, 4)
    assert sorted(set(data.train.ids)) == sorted(
        [f"harmless-base/train.jsonl:{n}" for n in range(1, 5)]
        + [f"helpful-base/train.jsonl:{n}" for n in range(1, 4)]
    )
    assert len(load(path=folder, data_dir="helpful-base", eval_split="test").train) == 3
    with pytest.raises(ConfigError, match=r"data.split=nix: .* there are: train, test"):
        load(path=folder, split="nix")
    with pytest.raises(ConfigError, match=r"data.eval_split=nix: .* there are: train, test"):
        load(path=folder, eval_split="nix")
    with pytest.raises(ConfigError, match=r"data.data_dir=nix: .* holds no such folder"):
        load(path=folder, data_dir="nix")


def test_a_bad_row_in_a_folder_has_its_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "train-1.jsonl", pairs(2))
    write(tmp_path / "train-2.jsonl", [*pairs(1), "x"])
    with pytest.raises(ConfigError, match=r"train-2.jsonl:2: not a JSON object"):
        load(path=str(tmp_path))


def test_a_readme_s_subsets_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a" / "one.jsonl", pairs(3))
    write(tmp_path / "b" / "two.jsonl", pairs(4))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n"
        "- config_name: b\n  data_files:\n  - split: prefs\n    path: b/*.jsonl\n---\n"
    )
    assert len(load(path=str(tmp_path), subset="a", eval_fraction=0).train) == 3
    assert len(load(path=str(tmp_path), subset="b", split="prefs", eval_fraction=0).train) == 4
    with pytest.raises(ConfigError, match=r"data.path=.*'c' not found. Available"):
        load(path=str(tmp_path), subset="c")


def test_what_the_library_saved_is_read(tmp_path: Path) -> None:
    splits = {
        "train": datasets.Dataset.from_list(pairs(5)),
        "test": datasets.Dataset.from_list(pairs(2, "t")),
    }
    splits["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    assert len(load(path=str(tmp_path / "one"), eval_fraction=0).train) == 5
    data = load(path=str(tmp_path / "all"), eval_split="test")
    assert (len(data.train), len(data.evaluation)) == (5, 2)
    with pytest.raises(ConfigError, match=r"data.split=nix: .* there are: test, train"):
        load(path=str(tmp_path / "all"), split="nix")


def test_the_same_rows_from_every_kind_of_file_are_the_same_tokens(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(pairs(6))
    whole.to_parquet(tmp_path / "x.parquet")
    whole.to_csv(tmp_path / "x.csv")
    whole.to_json(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text(json.dumps(pairs(6)))
    found = [load(path=str(path), eval_fraction=0).train[:] for path in sorted(tmp_path.glob("x.*"))]
    assert len(found) == 4
    for examples in found[1:]:
        assert [(e.prompt, e.chosen, e.rejected) for e in examples] == [
            (e.prompt, e.chosen, e.rejected) for e in found[0]
        ]


def test_the_library_s_cache_files_beside_a_saved_set_are_not_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(pairs(5)).save_to_disk(tmp_path / "one")
    saved = datasets.load_from_disk(tmp_path / "one")
    saved.map(lambda row: {"prompt": row["prompt"] + "!"})  # leaves cache-*.arrow beside the data
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    assert len(load(path=str(tmp_path / "one"), eval_fraction=0).train) == 5
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=r"state.json lists data-00000.*not there"):
        load(path=str(tmp_path / "one"), eval_fraction=0)


def test_a_saved_set_of_no_files_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list(pairs(5)).save_to_disk(tmp_path / "one")
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    with pytest.raises(ConfigError, match=r"state.json lists no file: the saved dataset is empty"):
        load(path=str(tmp_path / "one"), eval_fraction=0)


def test_parts_of_a_split_as_the_library_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(1050))
    library = datasets.load_dataset("json", data_files=path, cache_dir=str(tmp_path / "hf"))["train"]
    for split in ("[:10%]", "[100:200]", "[-7:]", "[33%:34%]", "[1049:]"):
        rows = datasets.load_dataset(
            "json", data_files=path, split=f"train{split}", cache_dir=str(tmp_path / "hf")
        )
        first = library["prompt"].index(rows[0]["prompt"])
        for name in (split, f"train{split}"):
            ids = list(load(path=path, split=name, eval_fraction=0).train.ids)
            assert ids == [f"x.jsonl:{first + n + 1}" for n in range(len(rows))], name
    data = load(path=path, split="train[:90%]", eval_split="train[90%:]")
    assert (len(data.train), len(data.evaluation), data.report.shared_prompts) == (945, 105, 0)
    assert list(load(path=path, split="train[:1]+train[-1:]", eval_fraction=0).train.ids) == [
        "x.jsonl:1",
        "x.jsonl:1050",
    ]


def test_a_part_may_span_the_files_of_a_folder(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"train-{number}.jsonl", pairs(4, f"f{number}-"))
    ids = list(load(path=str(tmp_path), split="train[2:9]", eval_fraction=0).train.ids)
    assert ids == [*(f"train-0.jsonl:{n}" for n in (3, 4)), *(f"train-1.jsonl:{n}" for n in (1, 2, 3, 4)),
                   "train-2.jsonl:1"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "settings", "reason"),
    [
        ("split", {"split": "test"}, r"data.split=test: .* one file, and its only split is train"),
        ("eval_split", {"eval_split": "test"}, r"data.eval_split=test: .* one file"),
        ("eval_split", {"eval_split": "train"}, r"data.eval_split=train of .* is what is trained on"),
        (
            "split",
            {"split": "train[::2]"},
            r"data.split=train\[::2\] is not a split: write train",
        ),
        ("split", {"split": "train[:ten%]"}, r"data.split=train\[:ten%\] is not a split"),
        ("split", {"split": "train[50:]"}, r"data.split=train\[50:\] leaves no row"),
    ],
)
def test_a_split_that_a_file_does_not_have_is_refused(
    tmp_path: Path, key: str, settings: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(path=write(tmp_path / "x.jsonl", pairs(30)), **settings)


def test_a_file_to_hold_out_is_read_whole_whatever_part_is_trained_on(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", pairs(9)), write(tmp_path / "b.jsonl", pairs(8, "b"))
    data = load(path=train, split="train[:5]", eval_path=held_out)
    assert (len(data.train), len(data.evaluation)) == (5, 8)
    data = load(path=train, eval_path=held_out, eval_split="train[:3]")
    assert (len(data.train), len(data.evaluation)) == (9, 3)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("part-0.jsonl", "part-1.jsonl", "part-2.csv"), "part-2.csv"),
        (("train_a.jsonl", "more.jsonl"), "more.jsonl"),
        (("a.jsonl", "b.jsonl", "c.xlsx"), "c.xlsx"),
    ],
)
def test_a_folder_that_would_be_read_in_part_is_refused(
    tmp_path: Path, names: tuple[str, ...], left: str
) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, pairs(3, f"{number}-"))
    write(tmp_path / "LICENSE.txt", [])
    with pytest.raises(ConfigError, match=rf"path=.* 1 of {len(names)} files would not be read \({left}\)"):
        load(path=str(tmp_path))
    (tmp_path / left).unlink()
    assert len(load(path=str(tmp_path), eval_fraction=0).train) == 3 * (len(names) - 1)


def test_a_large_folder_says_that_it_takes_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcpo.data.sources.MANY", 2)
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", pairs(2, f"{number}-"))
    said: list[str] = []
    config = DataConfig(name="pairs", path=str(tmp_path), cache="off", eval_fraction=0)
    load_datasets(config, TOKENIZER, 1, said.append)
    assert f"{tmp_path}: 3 files; to find their splits" in said[0]


@pytest.mark.parametrize("inside", [".", "secret"])
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "secret" / "x.jsonl", pairs(3))
    folder = tmp_path / inside
    with no_permission(folder), pytest.raises(ConfigError, match=r"data.path=.* cannot be read: .*ermission"):
        load(path=str(tmp_path))


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(3))
    with (
        no_permission(Path(path)),
        pytest.raises(ConfigError, match=r"x.jsonl.*read: .*ermission"),
    ):
        load(path=path)


def test_a_mixture_of_sources_by_weight(tmp_path: Path) -> None:
    small, large = write(tmp_path / "s.jsonl", pairs(4, "s")), write(tmp_path / "l.jsonl", pairs(10, "l"))
    sources = [SourceConfig(path=small, weight=2), SourceConfig(path=large, weight=0.5)]
    data = load(sources=sources, eval_fraction=0)
    ids = list(data.train.ids)
    assert sorted(ids[:8]) == sorted([f"s.jsonl:{n}" for n in range(1, 5)] * 2)
    assert len(ids) == 13 and len(set(ids[8:])) == 5
    assert list(load(sources=sources, eval_fraction=0).train.ids) == ids
    assert list(load(2, sources=sources, eval_fraction=0).train.ids) != ids
    held_out = load(sources=sources, eval_fraction=0.3)
    assert len(held_out.evaluation) == 4  # of the 14 prompts
    assert not set(held_out.train.ids) & set(held_out.evaluation.ids)


def test_weights_that_leave_no_example_are_refused(tmp_path: Path) -> None:
    small = write(tmp_path / "s.jsonl", pairs(4, "s"))
    with pytest.raises(ConfigError, match=r"data.sources: their weights leave no example to train on; raise"):
        load(sources=[SourceConfig(path=small, weight=0.01)], eval_fraction=0)  # 0.04 examples


def test_at_most_max_examples_are_read_and_nothing_is_said_of_the_rows_behind_them(tmp_path: Path) -> None:
    rows = [*pairs(4), {"prompt": "p"}, *pairs(2000, "r")]
    path = write(tmp_path / "x.jsonl", rows)
    data = load(path=path, max_examples=4, eval_fraction=0)  # the bad row behind them is not reached
    assert list(data.train.ids) == [f"x.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert data.report.counts["read"] == 4 and not data.report.dropped
    with pytest.raises(ConfigError, match=r"x.jsonl:5: no field 'chosen'"):
        load(path=path, max_examples=5, eval_fraction=0)
    data = load(path=path, max_examples=600, on_bad="drop", eval_fraction=0)
    assert (len(data.train), data.report.counts["read"], sum(data.report.dropped.values())) == (600, 601, 1)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_responses_that_begin_with_the_prompt_are_counted(tmp_path: Path, template: str | None) -> None:
    """Files of whole texts repeat the prompt in both; a template of the columns takes it out, as told."""
    rows = [{"prompt": f"{n}+1=", "chosen": f"{n}+1=2", "rejected": f"{n}+1=3"} for n in range(4)]
    rows.append({"prompt": "5+1=", "chosen": "5+1=6", "rejected": "7"})
    path = write(tmp_path / "x.jsonl", rows)
    told = "\n".join(load(path=path, template=template, eval_fraction=0).report.lines())
    assert "4 rows have responses that begin with the whole prompt" in told
    columns = {side: f"{{{{ {side}[prompt | length:] }}}}" for side in ("chosen", "rejected")}
    assert columns["chosen"] in told
    columns["prompt"] = "prompt"
    whole = write(tmp_path / "y.jsonl", rows[:4])
    data = load(path=whole, columns=columns, template=template, eval_fraction=0)
    plain = [{"prompt": f"{n}+1=", "chosen": "2", "rejected": "3"} for n in range(4)]
    wanted = load(path=write(tmp_path / "z.jsonl", plain), template=template, eval_fraction=0)
    assert [example.parts for example in data.train] == [example.parts for example in wanted.train]
    assert "begin with the whole prompt" not in "\n".join(data.report.lines())


def test_a_column_without_a_name_is_reported_as_such(tmp_path: Path) -> None:
    """pandas writes its index so."""
    path = tmp_path / "x.csv"
    path.write_text(",prompt,chosen,rejected\n0,q,a,b\n")
    [form] = load(path=str(path), eval_fraction=0).report.forms.values()
    assert form == "preference pairs; not read: a column without a name"


def test_more_than_a_few_dropped_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*pairs(18), {"prompt": "p"}, {"chosen": "c"}])
    reason = (
        r"x.jsonl: 2 of 20 rows \(10.0%\) cannot be used, more than data.max_dropped=0.05 allows: "
        r"1 no field .*, 1 no field 'rejected' .*; fix the file"
    )
    with pytest.raises(ConfigError, match=reason):
        load(path=path, on_bad="drop")
    assert len(load(path=path, on_bad="drop", max_dropped=0.1, eval_fraction=0).train) == 18


def test_a_row_of_several_bad_pairs_is_one_row(tmp_path: Path) -> None:
    """Of twenty rows one has three equal answers and another one: three of its six pairs are identical."""
    row = {"answers": ["1", "2", "3", "4"], "scores": [4, 3, 2, 1]}
    rows = [{"prompt": f"{n}+1=", **row} for n in range(20)]
    rows[7] |= {"answers": ["1", "1", "1", "2"]}
    path = write(tmp_path / "x.jsonl", rows)
    data = load(path=path, pairing="all", on_bad="drop", max_dropped=0.05, eval_fraction=0)
    assert len(data.train) == 19 * 6 + 3
    assert data.report.dropped == {"identical responses": 3}
    with pytest.raises(
        ConfigError, match=r"1 of 20 rows \(5\.0%\) cannot be used, more than .*=0\.04 allows"
    ):
        load(path=path, pairing="all", on_bad="drop", max_dropped=0.04, eval_fraction=0)


def test_a_prompt_is_not_guessed_from_what_answers_have_in_common(tmp_path: Path) -> None:
    rows = [
        {"task_text": "i", "chosen": f"45 kilometers is {n}", "rejected": f"45 kilometers is {n + 1}"}
        for n in range(20)
    ]
    for suffix in ("jsonl", "parquet"):
        path = tmp_path / f"x.{suffix}"
        getattr(datasets.Dataset.from_list(rows), "to_json" if suffix == "jsonl" else "to_parquet")(path)
        with pytest.raises(ConfigError, match=r"no field 'prompt'.* data.columns.prompt=task_text"):
            load(path=str(path), on_bad="drop", eval_fraction=0)
        assert len(load(path=str(path), columns={"prompt": "task_text"}, eval_fraction=0).train) == 20


def test_kinds_of_data_do_not_mix(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", pairs(2))
    other = write(tmp_path / "other.jsonl", [{"prompt": "p", "completion": "c"}])
    assert load(path=other, eval_fraction=0).train.kind == "sft"
    with pytest.raises(ConfigError, match=r"one kind of rows at a time, found pairs .* sft"):
        load(sources=[SourceConfig(path=one), SourceConfig(path=other)])


def test_unpaired_rows_have_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "yes", "label": n % 2 == 0} for n in range(4)]
    train = load(path=write(tmp_path / "x.jsonl", rows), eval_fraction=0).train
    assert train.kind == "unpaired"
    assert train.lengths.tolist() == [[3, 4, 0, 0], [3, 0, 4, 0], [3, 4, 0, 0], [3, 0, 4, 0]]


@pytest.mark.parametrize(("label", "lacking"), [(True, "unwanted"), (False, "wanted")])
def test_unpaired_rows_of_one_label_alone_are_refused(tmp_path: Path, label: bool, lacking: str) -> None:
    rows = [{"prompt": f"p{n}", "completion": "yes", "label": label} for n in range(4)]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ConfigError, match=f"all 4 completions to train on is .*without {lacking} ones"):
        load(path=path, eval_fraction=0)


def test_unknown_fields_and_templates_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(3))
    with pytest.raises(ConfigError, match=r"data.columns.promt: there is no such field"):
        load(path=path, columns={"promt": "prompt"})
    with pytest.raises(ConfigError, match=r"data.template=chatlm: there is no such template"):
        load(path=path, template="chatlm")
    with pytest.raises(ConfigError, match=r"data.template=tokenizer: the tokenizer has no chat template"):
        load(path=path, template="tokenizer")
    with pytest.raises(ConfigError, match=r"data.system_prompt needs a chat template"):
        load(path=path, system_prompt="be kind")
    messages = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(ConfigError, match=r"the data holds messages, and the tokenizer has no chat template"):
        load(path=write(tmp_path / "m.jsonl", messages))


def test_a_set_that_cannot_be_fetched_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"data.path=nobody/nothing .*hub cannot be reached.*hf download"):
        load(path="nobody/nothing")


def test_messages_with_times_and_ids_are_one_prompt_where_their_words_are(tmp_path: Path) -> None:
    """Times and decimals, as in WildChat's Parquet files, neither fail nor make another prompt."""

    def said(role: str, text: str, number: int) -> dict[str, Any]:
        extra = {"timestamp": datetime(2024, 1, 1, number), "cost": Decimal(number), "id": number}
        return {"role": role, "content": text, **extra}

    rows = [
        {"messages": [said("user", f"{n % 3}+1=", n), said("assistant", "2", n), said("user", "more", n),
                      said("assistant", f"a{n}", n)]}
        for n in range(12)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    data = load(path=str(tmp_path / "x.parquet"), template="chatml", eval_fraction=0.34)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (8, 4)  # one of three prompts, four times
    assert len(set(data.evaluation.prompts.tolist())) == 1 and data.report.shared_prompts == 0
    plain = {"messages": [{"role": one["role"], "content": one["content"]} for one in rows[0]["messages"]]}
    keys = {prompt_key(read_row(row)) for row in (rows[0], rows[3], plain)}
    assert len(keys) == 1
