"""The presets of conf/data, on small sets in the same layout: the same splits, folders and columns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from kinds import tokenizer_of
from test_presets import PRESETS

from rcpo.config.composition import compose
from rcpo.config.data import DataConfig
from rcpo.config.parsing import parse
from rcpo.config.paths import conf_dir
from rcpo.data.dataset import Datasets, load_datasets


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ultrafeedback(folder: Path) -> None:
    """Parquet by split, named in the README as on the hub, where `train_sft` is there too."""

    def row(n: int) -> dict[str, Any]:
        question = f"What is {n}?"
        return {
            "prompt": question, "prompt_id": str(n), "chosen": said(question, f"It is {n}."),
            "rejected": said(question, "" if n == 3 else "No."), "messages": said(question, f"It is {n}."),
            "score_chosen": 8.0, "score_rejected": 3.0,
        }  # fmt: skip

    splits = {"train_prefs": 9, "train_sft": 9, "test_prefs": 4, "test_sft": 4}
    for split, count in splits.items():
        start = 100 if split.startswith("test") else 0
        rows = [row(start + n) for n in range(count)]
        Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    readme = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# A set\n"
    (folder / "README.md").write_text(readme)


def hh(folder: Path) -> None:
    """Gzipped JSON lines in a folder for each part."""
    parts = ("harmless-base", "helpful-base", "helpful-rejection-sampled", "helpful-online")
    for number, part in enumerate(parts):
        (folder / part).mkdir(parents=True)
        for split, count in (("train", 3 + number), ("test", 2)):
            start = f"\n\nHuman: {part} {split} "
            rows = [
                {"chosen": f"{start}{n}?\n\nAssistant: yes", "rejected": f"{start}{n}?\n\nAssistant: no"}
                for n in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / part / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def ultrachat(folder: Path) -> None:
    for split in ("train_sft", "test_sft"):
        rows = [
            {"prompt": f"{split} {n}", "prompt_id": str(n),
             "messages": [*said(f"{split} {n}", "first"), *said("and then?", f"second {n}")]}
            for n in range(5)
        ]  # fmt: skip
        Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in ("train_sft", "test_sft"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")


def kto_mix(folder: Path) -> None:
    for split in ("train", "test"):
        rows = []
        for n in range(6):
            question, answer = said(f"{split} {n}", "yes" if n % 2 else "no")
            rows.append({"prompt": [question], "completion": [answer], "label": n % 2 == 1})
        Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


# what each set of the hub looks like, and what rcpo makes of it: kind, examples, held out
SETS: dict[str, tuple[Any, str, int, int]] = {
    "ultrafeedback": (ultrafeedback, "pairs", 8, 4),  # one answer is empty
    "hh_rlhf": (hh, "pairs", 3 + 4 + 5 + 6, 8),
    "hh_helpful": (hh, "pairs", 4 + 5 + 6, 6),
    "hh_harmless": (hh, "pairs", 3, 2),
    "ultrachat": (ultrachat, "sft", 5, 5),
    "kto_mix": (kto_mix, "unpaired", 6, 6),
}


def load(name: str, folder: Path) -> Datasets:
    config: DataConfig = parse(compose([f"data={name}", f"data.path={folder}", "data.max_dropped=0.2"])).data
    return load_datasets(config, tokenizer_of("qwen"), seed=1)


def test_every_preset_is_tried() -> None:
    known = {file.stem for file in (conf_dir() / "data").glob("*.yaml")} - {"sums", "pairs"}
    assert set(SETS) | set(PRESETS) == known
    assert all("/" in str(parse(compose([f"data={name}"])).data.path) for name in known)


@pytest.mark.parametrize("name", SETS)
def test_a_preset_reads_its_set(name: str, tmp_path: Path) -> None:
    make, kind, train, held_out = SETS[name]
    make(tmp_path)
    data = load(name, tmp_path)
    assert data.evaluation is not None
    assert (data.train.kind, len(data.train), len(data.evaluation)) == (kind, train, held_out)
    assert data.report.shared_prompts == 0


def test_ultrafeedback_s_rows_are_the_conversation(tmp_path: Path) -> None:
    ultrafeedback(tmp_path)
    data, tokenizer = load("ultrafeedback", tmp_path), tokenizer_of("qwen")
    first = data.train[0]
    assert tokenizer.decode(first.prompt).endswith(
        "<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(ids) for ids in (first.chosen, first.rejected)] == [
        "It is 0.<|im_end|>", "No.<|im_end|>",
    ]  # fmt: skip
    assert first.id == "train_prefs-00000-of-00001.parquet:1"
    assert dict(data.report.dropped) == {"empty rejected response": 1}
    assert data.report.examples["empty rejected response"].endswith("train_prefs-00000-of-00001.parquet:4")


def test_ultrachat_learns_the_last_answer(tmp_path: Path) -> None:
    ultrachat(tmp_path)
    example, tokenizer = load("ultrachat", tmp_path).train[2], tokenizer_of("qwen")
    assert tokenizer.decode(example.prompt).endswith("and then?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(example.chosen) == "second 2<|im_end|>" and example.rejected == []


def test_the_same_set_saved_by_the_library_is_the_same(tmp_path: Path) -> None:
    from datasets import load_dataset

    ultrafeedback(tmp_path / "hub")
    load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "c")).save_to_disk(tmp_path / "saved")
    hub, saved = load("ultrafeedback", tmp_path / "hub"), load("ultrafeedback", tmp_path / "saved")
    assert [(e.prompt, e.chosen, e.rejected) for e in hub.train] == [
        (e.prompt, e.chosen, e.rejected) for e in saved.train
    ]
