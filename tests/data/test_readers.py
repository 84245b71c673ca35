"""Files of every kind, good and bad: rows with their numbers, text exactly as it is."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.readers import ROWS, data_files, read_file
from rcpo.data.records import BadRow
from rcpo.data.sources import Part
from rcpo.errors import ConfigError

ROW = {"prompt": " é\u2028\r\n", "chosen": "\ufeffc ", "rejected": "\x00 𝕩\t"}


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
    ".lz4": lambda content: pa.Codec("lz4").compress(content, asbytes=True),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(PACK[path.suffix](content) if path.suffix in PACK else content)
    return path


def rows(path: Path) -> list[tuple[int, Any]]:
    return [row for piece in read_file(path) for row in piece.parsed()]


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def arrow_file(path: Path, table: pa.Table, *, stream: bool = False) -> Path:
    with pa.OSFile(str(path), "wb") as sink:
        make = pa.ipc.new_stream if stream else pa.ipc.new_file
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


NAMES = ["x.jsonl", "x.json", "X.JSONL", *(f"x.jsonl{suffix}" for suffix in PACK)]


@pytest.mark.parametrize("name", NAMES)
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"\xef\xbb\xbf" + lines(ROW) + b"\n  \r\n" + lines({"a": 1}, [2])[:-1])
    assert rows(path) == [(1, ROW), (4, {"a": 1}), (5, [2])]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.json.zst"])
def test_a_json_array(tmp_path: Path, name: str) -> None:
    text = json.dumps([ROW, {"a": [1, {"b": "]"}]}, 3], indent=2, ensure_ascii=False)
    assert rows(write(tmp_path / name, text.encode())) == [(1, ROW), (2, {"a": [1, {"b": "]"}]}), (3, 3)]
    assert rows(write(tmp_path / name, b" [ ] ")) == []


def test_csv_is_text(tmp_path: Path) -> None:
    content = '\ufeffprompt,chosen,rejected\r\n"a ""b"",\nc",NA,2020-01-01\r\n\r\nx,y\r\n007,1e3,null\r\n'
    found = rows(write(tmp_path / "x.csv", content.encode()))
    assert found[0] == (2, {"prompt": 'a "b",\nc', "chosen": "NA", "rejected": "2020-01-01"})
    assert found[1][0] == 5 and isinstance(found[1][1], BadRow)
    assert found[2] == (6, {"prompt": "007", "chosen": "1e3", "rejected": "null"})
    tabs = write(tmp_path / "x.tsv", b"prompt\tchosen\np\tc,d\n")
    assert rows(tabs) == [(2, {"prompt": "p", "chosen": "c,d"})]


def test_parquet_and_arrow(tmp_path: Path) -> None:
    values = [{"prompt": f"p{n}", "chosen": [{"role": "user", "content": "q"}], "other": n} for n in range(5)]
    table = pa.Table.from_pylist(values)
    wanted = list(enumerate(values, start=1))
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert rows(tmp_path / "x.parquet") == wanted
    assert rows(arrow_file(tmp_path / "f.arrow", table)) == wanted
    assert rows(arrow_file(tmp_path / "s.arrow", table, stream=True)) == wanted


def test_broken_text_in_arrow_is_a_bad_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"also"]).view(pa.string())
    found = rows(arrow_file(tmp_path / "x.arrow", pa.table({"prompt": column})))
    assert [type(row) for _, row in found] == [dict, BadRow, dict]


def test_many_rows_come_in_pieces(tmp_path: Path) -> None:
    count = 2 * ROWS + 3
    path = write(tmp_path / "x.jsonl", lines(*range(count)))
    assert [len(piece.numbers) for piece in read_file(path)] == [ROWS, ROWS, 3]
    assert rows(path) == [(n + 1, n) for n in range(count)]
    table = pa.table({"prompt": [str(n) for n in range(count)]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert [number for number, _ in rows(tmp_path / "x.parquet")] == list(range(1, count + 1))


def test_a_part_of_an_arrow_piece_may_be_empty(tmp_path: Path) -> None:
    [piece] = list(read_file(arrow_file(tmp_path / "x.arrow", pa.table({"prompt": ["a", "b"]}))))
    assert list(piece.part(0, 1).parsed()) == [(1, {"prompt": "a"})]
    assert list(piece.part(1, 1).parsed()) == [] and len(piece.part(1, 1).rows) == 0


def test_a_line_in_another_encoding_is_a_bad_row(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "x.jsonl", b'{"a": "caf\xe9"}\n' + lines({"a": 1})))
    assert isinstance(found[0][1], BadRow) and str(found[0][1]) == "invalid UTF-8"
    assert found[1] == (2, {"a": 1})


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # Python's own
    path = write(tmp_path / "x.csv", b"prompt,chosen\nq," + b"a" * 200_000 + b"\n")
    assert rows(path) == [(2, {"prompt": "q", "chosen": "a" * 200_000})]


def test_a_folders_data_are_all_its_files_that_can_hold_rows(tmp_path: Path) -> None:
    data = ["a.jsonl", "b/c.csv.gz", "b/d.parquet", "e.xlsx", "f.tar"]  # of the last two the user hears
    others = [".hidden.jsonl", "__x.jsonl", ".git/x.jsonl", "__pycache__/x.jsonl", "README.md", "state.json"]
    for name in (*data, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in data_files(tmp_path)] == data
    with pytest.raises(FileNotFoundError):
        data_files(tmp_path / "none")


GOOD = lines({"prompt": "p", "chosen": "c", "rejected": "r"})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-12], "cannot be read"),
        ("plain.jsonl.gz", GOOD, "cannot be read"),
        ("damaged.jsonl.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 30, "cannot be read"),
        ("array.json", b'[{"a": 1},\n{"a": }]', "array.json:2: broken JSON"),
        ("cut.json", b'[{"a": 1},\n{"a": 2}', "cut.json:2: broken JSON"),
        ("more.json", b'[{"a": 1}] x', "more.json:1: broken JSON"),
        ("comma.json", b"[1, ]", "comma.json:1: broken JSON"),
        ("space.json", b"[1 2]", "space.json:1: broken JSON"),
        ("latin.json", b'[{"a": 1},\n{"a": "caf\xe9"}]', "latin.json:2: invalid UTF-8"),
        ("first.json", b'\n[{"a": "caf\xe9"}]', "first.json:2: invalid UTF-8"),
        ("below.json", b"\n[1 2]", "below.json:2: broken JSON"),
        ("latin.csv", b"a,b\n1,caf\xe9\n", "latin.csv:2: not UTF-8"),
        ("quote.csv", b'a,b\n1,"2\n', "quote.csv:.*not CSV"),
        (
            "excel.csv",
            b'prompt;chosen;rejected\n"a, b";c;d\n',
            "excel.csv:1: the columns are separated by semi",
        ),
        ("twice.csv", b"a,a\n1,2\n", "a column's name is there twice"),
        ("x.parquet", b"PAR1 and nothing", "cannot be read as Parquet"),
        ("x.arrow", b"ARROW1 and nothing", "cannot be read as Arrow"),
        ("y.arrow", b"nothing", "cannot be read as Arrow"),
        ("x.txt", GOOD, "files of preference data end in"),
        ("x.parquet.gz", GOOD, "files of preference data end in"),
    ],
    ids=str,
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        rows(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        rows(tmp_path / "none.jsonl")


strings = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(values=st.lists(st.fixed_dictionaries({"prompt": strings, "chosen": strings}), min_size=1, max_size=5))
def test_any_text_is_read_exactly_from_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    wanted = list(enumerate(values, start=1))
    assert rows(write(folder / "x.jsonl", lines(*values))) == wanted
    assert rows(write(folder / "x.json", json.dumps(values).encode())) == wanted
    table = pa.Table.from_pylist(values)
    pq.write_table(table, folder / "x.parquet")
    assert rows(folder / "x.parquet") == wanted
    assert rows(arrow_file(folder / "x.arrow", table, stream=True)) == wanted
    cells = (
        ",".join('"' + row[key].replace('"', '""') + '"' for key in ("prompt", "chosen")) for row in values
    )
    text = "prompt,chosen\r\n" + "".join(f"{line}\r\n" for line in cells)
    assert [row for _, row in rows(write(folder / "x.csv", text.encode()))] == values


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"x.csv{suffix}", b"prompt,chosen,rejected\n" + b"q,a,b\n" * 500)
    assert len(rows(whole)) == 500
    cut = tmp_path / f"cut.jsonl{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"cut\.jsonl.* cannot be read"):
        rows(cut)


def test_a_stream_that_breaks_off_is_told_whichever_library_says_so() -> None:
    """The hub's client raises its HTTP library's errors, which are not OSErrors."""

    class Breaking:
        def with_format(self, _: str) -> Any:
            return self

        def iter(self, _: int) -> Iterator[pa.Table]:
            yield pa.table({"prompt": ["q"]})
            raise httpx.ReadTimeout("The read operation timed out")

    pieces = Part("o/n train", "n/train", dataset=Breaking()).pieces()
    assert list(next(pieces).numbers) == [1]
    with pytest.raises(
        ConfigError, match=r"o/n train cannot be read: ReadTimeout: The read .*; try again, or"
    ):
        next(pieces)
