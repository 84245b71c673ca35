"""How files of rows are read: what each name means, pieces and their numbers, and where damage lies."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcpo.data.readers import ROWS, RowBlock, count_rows, data_files, kind, parse_line, read_file
from rcpo.data.records import BadRow
from rcpo.errors import ConfigError

BOM = "\ufeff".encode()


def rows(path: Path) -> list[tuple[int, Any]]:
    return [row for piece in read_file(path) for row in piece.parsed()]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def reason(path: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        rows(path)
    return str(refusal.value)


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.jsonl", ".jsonl"),
        ("x.ndjson", ".ndjson"),
        ("x.json", ".json"),
        ("x.CSV", ".csv"),
        ("x.tsv", ".tsv"),
        ("x.parquet", ".parquet"),
        ("x.arrow", ".arrow"),
        ("x.jsonl.gz", ".jsonl"),
        ("x.CSV.BZ2", ".csv"),
        ("x.tsv.xz", ".tsv"),
        ("x.json.zst", ".json"),
        ("x.ndjson.lz4", ".ndjson"),
        ("x.y.jsonl", ".jsonl"),
        ("x.jsonl.zip", ""),  # rows by its name, but not a kind that is read
        ("x.parquet.gz", ""),
        ("x.arrow.zst", ""),
        ("x.jsonl.gz.gz", ""),
        ("x.gz", ""),
        ("x.txt", ""),
        ("jsonl", ""),
        (".jsonl", ""),
    ],
)
def test_a_name_says_how_a_file_is_read(name: str, expected: str) -> None:
    assert kind(Path("some.jsonl") / name) == expected


def test_a_folder_has_the_files_that_may_hold_rows(tmp_path: Path) -> None:
    wanted = ["a.jsonl.zip", "b.tsv", "c.ORC", "d.json.lz4", "deep/er/e.feather", "z.zip"]
    others = [
        "f.gz",
        "g.txt.gz",
        "_h.md",
        "dataset_info.json",
        "deep/dataset_infos.json",
        "i",
        "deep/.j/k.csv",
    ]
    for name in (*wanted, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert data_files(tmp_path) == [tmp_path / name for name in wanted]


def test_a_name_without_a_reader_is_told_all_that_there_are(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    assert reason(path) == (
        f"{path}: files of preference data end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow "
        "(text also in .gz, .bz2, .xz, .zst, .lz4)"
    )


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".GZ", gzip.compress),
        (".Bz2", bz2.compress),
        (".XZ", lzma.compress),
        (".ZST", lambda content: pa.Codec("zstd").compress(content, asbytes=True)),
        (".LZ4", lambda content: pa.Codec("lz4").compress(content, asbytes=True)),
    ],
)
def test_the_case_of_a_compressions_suffix_does_not_matter(suffix: str, pack: Any, tmp_path: Path) -> None:
    assert rows(write(tmp_path / f"x.csv{suffix}", pack(b"a,b\n1,2\n"))) == [(2, {"a": "1", "b": "2"})]


# --- rows are counted as they are read -------------------------------------------------------------------


def test_rows_are_counted_the_bad_ones_too(tmp_path: Path) -> None:
    table = pa.table({"a": [str(n) for n in range(1200)]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert count_rows(tmp_path / "x.parquet") == count_rows(tmp_path / "x.arrow") == 1200
    assert count_rows(write(tmp_path / "x.jsonl", b'{"a": 1}\n\n{"a":\n[]\n')) == 3  # without the empty line
    assert count_rows(write(tmp_path / "x.csv", b"a,b\n1,2\n1\n")) == 2
    assert count_rows(write(tmp_path / "x.json", b"[1, {}, null]")) == 3
    assert count_rows(write(tmp_path / "none.jsonl", b"")) == 0


def test_rows_of_a_damaged_file_are_not_counted(tmp_path: Path) -> None:
    for name, content, words in [
        ("x.parquet", b"PAR1", "x.parquet cannot be read as Parquet"),
        ("x.arrow", b"ARROW1", "x.arrow cannot be read as Arrow"),
        ("x.json", b"[1", "x.json:1: broken JSON"),
    ]:
        with pytest.raises(ConfigError, match=words):
            count_rows(write(tmp_path / name, content))
    with pytest.raises(ConfigError, match=r"none\.parquet cannot be read as Parquet"):
        count_rows(tmp_path / "none.parquet")


# --- pieces ---------------------------------------------------------------------------------------------


def test_a_part_keeps_its_numbers_and_ends_where_the_piece_does() -> None:
    lines = RowBlock([2, 5, 6], [b"1", b"{", b"3"])
    part = lines.part(1, 9)
    assert list(part.numbers) == [5, 6] and part.rows == [b"{", b"3"]
    (number, bad), last = part.parsed()
    assert number == 5 and isinstance(bad, BadRow) and last == (6, 3)
    batch = pa.RecordBatch.from_pylist([{"a": 1}, {"a": 2}, {"a": 3}])
    arrow = RowBlock(range(11, 14), batch)
    assert list(arrow.part(1, 9).parsed()) == [(12, {"a": 2}), (13, {"a": 3})]
    assert list(arrow.part(0, 2).parsed()) == [(11, {"a": 1}), (12, {"a": 2})]
    assert list(arrow.part(2, 1).parsed()) == []


def test_numbers_and_rows_have_one_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        list(RowBlock([1, 2], [b"1"]).parsed())


def test_a_row_that_a_reader_found_bad_stays_so() -> None:
    problem = BadRow("why")
    assert list(RowBlock([4], [problem]).parsed()) == [(4, problem)]


def test_lines_keep_their_numbers_over_pieces_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", BOM + b"0\n" + b"\n" * ROWS + BOM + b"1\n2")
    (first, zero), (second, bad), (third, two) = rows(path)
    assert (first, zero) == (1, 0) and (third, two) == (ROWS + 3, 2)
    assert second == ROWS + 2 and isinstance(bad, BadRow)  # a mark is only one at the beginning
    assert rows(write(tmp_path / "e.jsonl", b"")) == []
    [piece] = read_file(write(tmp_path / "b.jsonl", b"\n" * (ROWS + 1) + b"1\n"))  # no piece without a row
    assert list(piece.numbers) == [ROWS + 2]


def test_an_array_comes_in_pieces_counted_from_one(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", json.dumps(list(range(ROWS + 2))).encode())
    pieces = list(read_file(path))
    assert [len(piece.numbers) for piece in pieces] == [ROWS, 2]
    assert list(pieces[1].numbers) == [ROWS + 1, ROWS + 2] and pieces[1].rows == [ROWS, ROWS + 1]


def test_a_table_comes_in_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b"a\n" + b"1\n" * (ROWS + 1))
    assert [list(piece.numbers)[::ROWS] for piece in read_file(path)] == [[2], [ROWS + 2]]
    assert rows(write(tmp_path / "e.csv", b"")) == [] and rows(write(tmp_path / "h.csv", b"a,b\n")) == []


def test_large_batches_are_cut(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(2 * ROWS + 1))})
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table.slice(0, ROWS + 1))
        file.write_table(table.slice(ROWS + 1))
    pieces = list(read_file(path))
    assert [len(piece.numbers) for piece in pieces] == [ROWS, 1, ROWS]
    assert rows(path) == [(n + 1, {"a": n}) for n in range(2 * ROWS + 1)]


ENDS = "broken JSON that ends too early; write each row in one line, or one array of all rows in a .json file"


# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{\n", ENDS),
        (b'{"prompt": "q",\n', ENDS),
        (b'{"prompt": "q', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b"9" * 5000, "broken JSON"),
        (b'"\xff"', "invalid UTF-8"),
    ],
    ids=["over lines", "a field a line", "cut", "nested", "long", "bytes"],
)
def test_a_bad_line_has_a_reason(line: bytes, expected: str) -> None:
    with pytest.raises(BadRow) as problem:
        parse_line(line)
    assert str(problem.value) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", []),
        (b"\n\t [ \r\n]\n", []),
        (BOM + b"[1]", [1]),
        (b" [1,2 , 3\n,\n4] \n", [1, 2, 3, 4]),
        (b'["a, b]", [","], {"c": "]"}]', ["a, b]", [","], {"c": "]"}]),
        (b'[\n"' + b"x" * 9000 + b'",\n"\xc3\xa9"]', ["x" * 9000, "é"]),
    ],
)
def test_the_elements_of_an_array(content: bytes, expected: list[Any], tmp_path: Path) -> None:
    assert rows(write(tmp_path / "x.json", content)) == list(enumerate(expected, start=1))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[\n1\n2]", 3),
        (b"[1,\n\n]", 3),
        (b"[,1]", 1),
        (b"[1,\n,2]", 2),
        (b"[1\n", 2),
        (b"[\n\n", 3),
        (b"[1]\n\n]", 3),
        (b"[]\n[]", 2),
        (b"[1,\n{'a': 1}]", 2),
        (b"\n[" + b"[" * 100_000, 2),
    ],
    ids=repr,
)
def test_a_broken_array_names_the_line(content: bytes, line: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", content)
    assert reason(path) == (
        f"{path}:{line}: broken JSON; correct it, or give JSON Lines to leave such rows out"
    )


def test_an_array_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", BOM + b'[\n"a",\n' + b'"' + b"x" * 5000 + b'\xe9",\n"\xe9"]')
    assert reason(path) == f"{path}:3: invalid UTF-8; give JSON Lines to leave such rows out"


# --- CSV ------------------------------------------------------------------------------------------------


def test_a_broken_table_names_the_line_and_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b'a,b\n1,2\n1,"2"3\n4,5\n')
    begins = "not CSV, in the row that begins here"
    assert reason(path) == f"{path}:3: {begins}: ',' expected after '\"'; correct it"
    path = write(tmp_path / "open.csv", b'a,b\n1,"2\n3"\n\n4,"5\n6,7\n')  # the last quote never ends
    assert reason(path) == f"{path}:5: {begins}: unexpected end of data; correct it"


def test_a_row_of_several_lines_has_the_number_of_its_first_one(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b'a,b\n1,"2\n\n3"\n\n4,5\n6\n')
    found = rows(path)
    assert found[:2] == [(2, {"a": "1", "b": "2\n\n3"}), (6, {"a": "4", "b": "5"})]
    assert found[2][0] == 7


def test_a_table_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b"a,b\n" + b"1,2\n" * 5000 + b"1,caf\xe9\n" + b"1,2\n" * 5000)
    assert reason(path) == f"{path}:5002: not UTF-8; save the file as UTF-8"


def test_the_header_of_a_table(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "x.csv", b"a;b,c\n1,2\n")) == [(2, {"a;b": "1", "c": "2"})]
    assert rows(write(tmp_path / "y.csv", b"a\n1;2\n")) == [(2, {"a": "1;2"})]
    path = write(tmp_path / "z.csv", b"a;b\n1;2\n")
    assert reason(path) == (
        f"{path}:1: the columns are separated by semicolons; save the file with commas, or with tabs as .tsv"
    )
    path = write(tmp_path / "t.csv", b"a\tb\n1\t2\n")
    assert reason(path) == f"{path}:1: the columns are separated by tabs; name the file .tsv"
    path = write(tmp_path / "w.tsv", b"a\tb\ta\n")
    assert reason(path) == f"{path}:1: a column's name is there twice"


@pytest.mark.parametrize("line", [b"1\n", b"1,2,3\n"])
def test_a_row_of_another_width_is_bad(line: bytes, tmp_path: Path) -> None:
    (number, problem), good = rows(write(tmp_path / "x.csv", b"a,b\n" + line + b"\n3,4\n"))
    assert number == 2 and isinstance(problem, BadRow)
    assert str(problem) == "not as many fields as the first line"
    assert good == (4, {"a": "3", "b": "4"})


# --- Arrow ----------------------------------------------------------------------------------------------


def test_damage_in_arrow_has_a_reason_and_leaves_the_rows_beside_it() -> None:
    column = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    batch = pa.RecordBatch.from_arrays([column], ["a"])
    (one, a), (two, problem), (three, c) = RowBlock(range(1, 4), batch).parsed()
    assert (one, a) == (1, {"a": "a"}) and (three, c) == (3, {"a": "c"})
    assert two == 2 and str(problem) == "invalid UTF-8"
    borders = pa.array([0, 1, 9, 2], pa.int32()).buffers()[1]  # the second ends behind the text
    outside = pa.Array.from_buffers(pa.string(), 3, [None, borders, pa.py_buffer(b"ab")])
    found = list(RowBlock([1, 2, 3], pa.RecordBatch.from_arrays([outside], ["a"])).parsed())
    assert found[0] == (1, {"a": "a"})
    assert [(number, str(row)) for number, row in found[1:]] == [
        (2, "broken Arrow data"), (3, "broken Arrow data"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_two_columns_of_one_name_are_refused(kind: str, tmp_path: Path) -> None:
    one = pa.array(["a"])
    table = pa.Table.from_arrays([one, one, one], names=["chosen", "rejected", "chosen"])
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as file:
            file.write_table(table)
    assert reason(path) == f"{path}: the column 'chosen' is there twice; rename or remove one"
