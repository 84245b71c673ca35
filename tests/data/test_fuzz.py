"""Damaged files and folders: each ends in a clear refusal or in counted drops, never otherwise."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import TOKENIZER

from rcpo.config.data import DataConfig
from rcpo.data.dataset import load_datasets
from rcpo.errors import ConfigError

EACH = 50  # files of each kind

TEXT = [{"prompt": f"{n}+1=", "chosen": f"it is {n + 1}", "rejected": f"no {n}"} for n in range(12)]
WHOLE = [
    {side: f"\n\nHuman: {n}?\n\nAssistant: {answer}" for side, answer in (("chosen", n), ("rejected", n + 1))}
    for n in range(12)
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": f"{n}+1="}],
        "chosen": [{"role": "assistant", "content": f"{n + 1}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(12)
]
LABELS = [{"prompt": f"{n}", "completion": "yes", "label": n % 3 > 0} for n in range(12)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink, columns = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=3)
    return sink.getvalue()


KINDS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes], list[dict[str, Any]]]] = {
    "lines": ("x.jsonl", lines, TEXT),
    "lines of conversations": ("x.jsonl", lines, WHOLE),
    "lines of messages": ("x.jsonl", lines, MESSAGES),
    "lines of labels": ("x.jsonl", lines, LABELS),
    "gzip": ("x.jsonl.gz", lambda rows: gzip.compress(lines(rows), mtime=0), TEXT),
    "array": ("x.json", lambda rows: json.dumps(rows, indent=1).encode(), TEXT),
    "csv": ("x.csv", table, TEXT),
    "parquet": ("x.parquet", parquet, TEXT),
    "parquet of messages": ("x.parquet", parquet, MESSAGES),
    "arrow": ("x.arrow", arrow, MESSAGES),
}
VALUES: list[Any] = [
    None,
    3,
    1.5,
    True,
    "",
    " ",
    [],
    {},
    [{}],
    [[]],
    "\ud800",
    "x" * 500,
    ["a"],
    {"role": "user"},
]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, lost, doubled or put in; or the end lost."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, length = draw.randrange(len(data) + 1), draw.randint(1, 20)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] = draw.randrange(256)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            data[place:place] = draw.choice([b"\x00", b"\n", b'"', b"\xff\xfe", b"{", b"]", b",", b"\\u"])
        else:
            del data[place:]
    return bytes(data)


def damaged_rows(rows: list[dict[str, Any]], draw: random.Random) -> list[Any]:
    """A field lost, of another value or name; a row that is not an object, or there twice."""
    changed: list[Any] = json.loads(json.dumps(rows))
    for _ in range(draw.randint(1, 3)):
        place, kind = draw.randrange(len(changed)), draw.randrange(5)
        row = changed[place]
        name = draw.choice(list(row)) if isinstance(row, dict) and row else None
        if kind == 0 or name is None:
            changed[place] = draw.choice(VALUES)
        elif kind == 1:
            del row[name]
        elif kind == 2:
            row[name] = draw.choice(VALUES)
        elif kind == 3:
            row[draw.choice(["text", "label", "x", ""])] = row.pop(name)
        else:
            changed.insert(place, row)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_its_bad_rows_are_counted(kind: str, tmp_path: Path) -> None:
    name, write, rows = KINDS[kind]
    content, path = write(rows), tmp_path / name
    outcomes = {"whole": 0, "refused": 0, "dropped": 0}
    for seed in range(EACH):
        draw = random.Random(f"{kind} {seed}")
        if write is lines and draw.random() < 0.5:
            path.write_bytes(lines(damaged_rows(rows, draw)))
        else:
            path.write_bytes(damaged_bytes(content, draw))
        outcomes[outcome(path, len(rows))] += 1
    assert sum(outcomes.values()) == EACH
    assert outcomes["refused"] + outcomes["dropped"] > EACH // 4, outcomes  # most damage is found


def outcome(path: Path, count: int) -> str:
    """What became of a file: refused as a whole, some rows dropped, or nothing wrong with it."""

    def load(on_bad: str) -> Any:
        config = DataConfig(
            name="pairs",
            path=str(path),
            cache="off",
            eval_fraction=0,
            template="plain",
            on_bad=on_bad,
            max_dropped=1,
        )
        return load_datasets(config, TOKENIZER, 1)

    refusal = None
    try:
        load("refuse")
    except ConfigError as error:
        refusal = str(error)
        assert path.name in refusal and "\n" not in refusal and refusal.isprintable(), refusal
    try:
        data = load("drop")
    except ConfigError as error:
        assert refusal is not None and path.name in str(error)
        return "refused"
    report = data.report
    dropped = sum(report.dropped.values())
    assert (dropped == 0) == (refusal is None), (refusal, report.dropped)
    assert len(data.train) + dropped == report.counts["read"] <= 2 * count + 3
    for example in data.train:  # what is kept is what the template wrote, to the character
        ids = example.chosen or example.rejected
        assert ids[-1] == TOKENIZER.eos_token_id and len(ids) > 1
    return "dropped" if dropped else "whole"


# --- folders -------------------------------------------------------------------------------------------

ANSWERED = [{"prompt": f"{n}+1=", "chosen": f"is {n + 1}", "rejected": f"no {n}"} for n in range(6)]
SHARDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lines,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows), mtime=0),
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": table,
    "parquet": parquet,
}
# what may lie beside the shards: (name, content, rows that a reader of the whole folder has to see)
STRAYS: list[tuple[str, bytes, int]] = [
    ("README.md", b"# pairs\n", 0),
    ("notes.txt", b"two lines\nof notes\n", 0),
    (".hidden.jsonl", b"not data\n", 0),
    ("__pycache__/x.jsonl", b"not data\n", 0),
    ("more.jsonl", lines(ANSWERED[:2]), 2),
    ("more.csv", table(ANSWERED[:2]), 2),
    ("more.parquet", parquet(ANSWERED[:2]), 2),
    ("below/more.jsonl", lines(ANSWERED[:2]), 2),
    ("test-0.jsonl", lines(ANSWERED[:2]), 0),
    ("state.json", b'{"_data_files": []}', 0),
    ("state.json", b'{"_data_files": [{"filename": "a\\u0000b"}]}', 0),
    ("state.json", b"{", 0),
    ("dataset_dict.json", b"{}", 0),
    ("dataset_infos.json", b"{}", 0),
    ("empty.jsonl", b"", 0),
    ("archive.zip", b"PK", 0),
    ("UPPER.JSONL", lines(ANSWERED[:2]), 2),
    ("a b=c.jsonl", lines(ANSWERED[:2]), 2),
    ("[x].jsonl", lines(ANSWERED[:2]), 2),
]


@settings(max_examples=12)
@given(
    shard=st.sampled_from(sorted(SHARDS)),
    stem=st.sampled_from(["part", "train", "data/train"]),
    count=st.integers(1, 2),
    stray=st.one_of(st.none(), st.sampled_from(STRAYS)),
    cut=st.one_of(st.none(), st.integers(0, 300)),
)
def test_a_folder_is_read_whole_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    shard: str,
    stem: str,
    count: int,
    stray: tuple[str, bytes, int] | None,
    cut: int | None,
) -> None:
    folder, content = tmp_path_factory.mktemp("folder"), SHARDS[shard](ANSWERED)
    written = {f"{stem}-{place}.{shard}": content for place in range(count)}
    if stray is not None:
        written[stray[0]] = stray[1]
    if cut is not None:
        last = f"{stem}-{count - 1}.{shard}"
        written[last] = content[: min(cut, len(content) - 2)]
    for name, data in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    config = DataConfig(name="pairs", path=str(folder), cache="off", eval_fraction=0, template="plain")
    try:
        report = load_datasets(config, TOKENIZER, 1).report
    except ConfigError as error:
        refusal = str(error)
        assert folder.name in refusal or any(Path(name).name in refusal for name in written), refusal
        assert "\n" not in refusal and refusal.isprintable(), refusal
        assert cut is not None or stray is not None, refusal  # a plain folder of shards is read
        return
    if cut is not None and shard == "csv":
        return  # what is left may be a table
    # a cut at a line's end leaves a shorter file that is whole
    whole = written[f"{stem}-{count - 1}.{shard}"] if cut is not None and shard == "jsonl" else b""
    read = len(ANSWERED) * count if cut is None else len(ANSWERED) * (count - 1) + whole.count(b"}")
    assert report.counts["read"] == read + (stray[2] if stray is not None else 0)
