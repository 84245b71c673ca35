"""Rows of JSONL files, good and bad."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.config import ConfigError
from rcpo.data.pairs import BadRow, parse_row, read_pairs, split_prompts
from rcpo.data.records import TextPair
from rcpo.data.report import DataReport

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'
BAD_ROWS = {
    b'{"prompt": "p", "chosen": "c"': "broken JSON",
    b"nonsense": "broken JSON",
    b"[" * 100_000: "broken JSON",
    b'{"prompt": "p", "chosen": ' + b"1" * 5000 + b', "rejected": "r"}': "broken JSON",
    b'["p", "c", "r"]': "not a JSON object",
    b"null": "not a JSON object",
    b'{"prompt": "p", "rejected": "r"}': "no field 'chosen'",
    b'{"prompt": "p", "chosen": "c"}': "no field 'rejected'",
    b'{"prompt": null, "chosen": "c", "rejected": "r"}': "field 'prompt' is not a string",
    b'{"prompt": "p", "chosen": ["c"], "rejected": "r"}': "field 'chosen' is not a string",
    b'{"prompt": "p", "chosen": "c", "rejected": 3}': "field 'rejected' is not a string",
    b'{"prompt": " ", "chosen": "c", "rejected": "r"}': "empty prompt",
    b'{"prompt": "p", "chosen": "", "rejected": "r"}': "empty chosen response",
    b'{"prompt": "p", "chosen": "c", "rejected": " \\n"}': "empty rejected response",
    b'{"prompt": "p", "chosen": "c", "rejected": "c"}': "identical responses",
    b'{"chosen": "Human: a", "rejected": "Human: b"}': "no common beginning that ends in 'Assistant:'",
    b'{"chosen": "Assistant:", "rejected": "Assistant: b"}': "empty chosen response",
    b'{"prompt": "p", "chosen": "caf\xe9", "rejected": "r"}': "invalid UTF-8",
    b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}': "invalid Unicode",
}


def write(path: Path, *lines: bytes) -> Path:
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: bytes, reason: str, name: str) -> None:
    path = write(tmp_path / name, GOOD, b"", row, GOOD)
    with pytest.raises(ConfigError) as refusal:
        read_pairs(path, DataReport(name))
    assert str(refusal.value).startswith(f"{path}:3: ")
    assert reason in str(refusal.value)
    assert "data.on_bad=drop" in str(refusal.value)


def test_bad_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *BAD_ROWS, GOOD, *BAD_ROWS)
    report = DataReport("x", drop=True)
    assert read_pairs(path, report) == [TextPair("x.jsonl:20", "p", "c", "r")]
    assert report.read == 2 * 19 + 1
    assert sum(report.dropped.values()) == 2 * 19
    assert report.dropped["broken JSON"] == 2 * 4
    assert report.dropped["empty chosen response"] == 2 * 2
    assert report.examples["identical responses"] == f"{path}:15"
    assert any("8 broken JSON" in line for line in report.lines())
    assert json.dumps(report.as_dict(), allow_nan=False)


@given(place=st.integers(0, len(GOOD) - 1), piece=st.binary(max_size=4))
def test_a_damaged_row_is_a_pair_or_a_bad_row(place: int, piece: bytes) -> None:
    damaged = GOOD[:place] + piece + GOOD[place + 1 :]
    try:
        pair = parse_row(damaged, "n")
    except BadRow as problem:
        assert str(problem)
    else:
        row = json.loads(damaged)
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])


def test_two_conversations_share_their_prompt() -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    row = {"chosen": start + " yes", "rejected": start + " yesterday"}
    assert parse_row(json.dumps(row).encode(), "n") == TextPair("n", start, " yes", " yesterday")
    # Turns that both share belong to the prompt.
    turns = start + " A\n\nHuman: B\n\nAssistant:"
    pair = parse_row(json.dumps({"chosen": turns + " x", "rejected": turns + " y"}).encode(), "n")
    assert pair == TextPair("n", turns, " x", " y")
    # They differ before the last turn: the prompt ends at the last turn that both have.
    longer = {
        "chosen": start + " A\n\nHuman: 1\n\nAssistant: x",
        "rejected": start + " A\n\nHuman: 2\n\nAssistant: x",
    }
    pair = parse_row(json.dumps(longer).encode(), "n")
    assert (pair.prompt, pair.chosen) == (start, " A\n\nHuman: 1\n\nAssistant: x")


def test_text_is_never_changed(tmp_path: Path) -> None:
    row = {"prompt": " é\u2028\r\n", "chosen": "\ufeffc ", "rejected": "\x00 𝕩\t"}
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode())
    assert read_pairs(path, DataReport("x")) == [TextPair("x.jsonl:1", *row.values())]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-12]),
        ("plain.jsonl.gz", GOOD),
        ("damaged.jsonl.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 30),
    ],
    ids=["cut", "plain", "damaged"],  # the same on every test worker
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pairs(tmp_path / name, DataReport(name, drop=True))


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl", DataReport("none"))
    with pytest.raises(ConfigError, match="no usable pair"):
        read_pairs(write(tmp_path / "empty.jsonl", b"", b" "), DataReport("empty"))
    with pytest.raises(ConfigError, match=r"no usable pair .* in 1 rows"):
        read_pairs(write(tmp_path / "bad.jsonl", b"{}"), DataReport("bad", drop=True))


@given(prompts=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_held_out_and_training_share_no_prompt(prompts: list[str], seed: int) -> None:
    pairs = [TextPair(str(place), prompt, "c", "r") for place, prompt in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(ConfigError, match="leaves none to train on"):
            split_prompts(pairs, 0.3, seed)
        return
    train, held_out = split_prompts(pairs, 0.3, seed)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    assert sorted(train + held_out, key=lambda pair: int(pair.id)) == pairs
    assert len({pair.prompt for pair in held_out}) == max(1, round(0.3 * len(set(prompts))))
    again = split_prompts(pairs[::-1], 0.3, seed)
    assert {pair.id for pair in again[1]} == {pair.id for pair in held_out}


def test_the_seed_decides_what_is_held_out() -> None:
    pairs = [TextPair(str(n), str(n), "c", "r") for n in range(100)]
    first, second = (split_prompts(pairs, 0.1, seed)[1] for seed in (1, 2))
    assert len(first) == len(second) == 10
    assert first != second
    assert split_prompts(pairs, 0.0, 1) == (pairs, [])
