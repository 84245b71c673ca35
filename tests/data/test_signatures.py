"""Files whose contents are not what their names say are refused by what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcpo.data.readers import count_rows, read_file
from rcpo.errors import ConfigError

LINES = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("x", content)
    return sink.getvalue()


def packed(compression: str) -> Callable[[bytes], bytes]:
    return lambda content: pa.compress(content, codec=compression, asbytes=True)


def framed_lz4(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(_: bytes) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["q"]}), sink)
    return sink.getvalue()


def arrow(_: bytes) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"prompt": ["q"]})
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (gzip.compress, r"is compressed with gzip; add \.gz to its name"),
        (bz2.compress, r"is compressed with bzip2; add \.bz2"),
        (lzma.compress, r"is compressed with xz; add \.xz"),
        (packed("zstd"), r"is compressed with Zstandard; add \.zst"),
        (framed_lz4, r"is compressed with LZ4; add \.lz4"),
        (zipped, "is a ZIP archive"),
        (parquet, r"is a Parquet file; name it so \(\.parquet\)"),
        (arrow, r"is an Arrow file; name it so \(\.arrow\)"),
        (lambda content: content.decode().encode("utf-16"), "is text in UTF-16; save it in UTF-8"),
    ],
)
def test_text_that_is_something_else_is_named(
    tmp_path: Path, name: str, make: Callable[[bytes], bytes], told: str
) -> None:
    (tmp_path / name).write_bytes(make(LINES))
    with pytest.raises(ConfigError, match=rf"{name} {told}"):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz", "x.parquet", "x.arrow"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    for read in (lambda path: list(read_file(path)), count_rows):
        with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer .*git lfs pull"):
            read(tmp_path / name)


def test_a_table_may_begin_with_letters_of_a_signature(tmp_path: Path) -> None:
    for header in (b"PAR1", b"BZh9", b"ARROW1", b"PK"):
        (tmp_path / "x.csv").write_bytes(header + b",b\n1,2\n")
        [piece] = read_file(tmp_path / "x.csv")
        assert list(piece.rows[0]) == [header.decode(), "b"]
