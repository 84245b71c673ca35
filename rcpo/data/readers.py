"""Files of rows, read a piece at a time: JSON Lines, JSON arrays, CSV, Parquet, Arrow; text also compressed.

A piece is parsed where it is tokenised, maybe in another process: JSON Lines travel as bytes, Arrow as
record batches. Text is read exactly: numbers, dates and "NA" in a CSV stay the strings that they are.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rcpo.data.records import BadRow
from rcpo.data.signatures import refuse_other_content
from rcpo.errors import ConfigError
from rcpo.system.text import first_line

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 512  # in a piece: enough to keep a tokenizer busy, a megabyte or two of text
TABULAR = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro"}
TABULAR |= {".xls", ".xlsx", ".pkl", ".pickle", ".tar", ".zip"}
UNPACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
"""Compressions that text may have."""
PACKED = (*UNPACKED, ".zip")
"""Files that hold rows, whether rcpo reads them or not."""
METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
BOM = b"\xef\xbb\xbf"
_BINARY = (".parquet", ".arrow")


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a file: their numbers, as the user counts them from 1, and the rows, parsed or not.

    `rows` are lines of JSON, mappings, reasons why a row is bad, or an Arrow record batch.
    """

    numbers: Sequence[int]
    rows: Sequence[bytes | dict[str, Any] | BadRow] | pa.RecordBatch

    def parsed(self) -> Iterator[tuple[int, Any]]:
        """Each row's number and its value, or a BadRow in its place."""
        rows = self.rows if isinstance(self.rows, Sequence) else _from_arrow(self.rows)
        for number, row in zip(self.numbers, rows, strict=True):
            try:
                yield number, parse_line(row) if isinstance(row, bytes) else row
            except BadRow as problem:
                yield number, problem

    def part(self, start: int, stop: int) -> RowBlock:
        """The rows from one place to another, both counted from 0 in this piece."""
        stop = min(stop, len(self.numbers))
        rows = self.rows[start:stop] if isinstance(self.rows, Sequence) else _sliced(self.rows, start, stop)
        return RowBlock(self.numbers[start:stop], rows)


Reader = Callable[[Path], Iterator[RowBlock]]


def read_file(path: Path) -> Iterator[RowBlock]:
    """The rows of a file, by its suffix.

    Raises ConfigError for a file of another kind, and for one that is damaged in more than a row.
    """
    reader = _READERS.get(kind(path))
    if reader is None:
        raise ConfigError(
            f"{path}: files of preference data end in {', '.join(_READERS)} "
            f"(text also in {', '.join(UNPACKED)})"
        )
    try:
        _refuse_other_content(path)
        yield from reader(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # gzip.BadGzipFile is an OSError
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error


def _refuse_other_content(path: Path) -> None:
    suffix, packing = _suffixes(path)
    refuse_other_content(path, text=not packing and suffix not in _BINARY)


def kind(path: Path) -> str:
    """The suffix that says how a file is read, lower case, without a compression's; empty where none does."""
    suffix, packing = _suffixes(path)
    readable = packing == "" or (packing in UNPACKED and suffix not in _BINARY)
    return suffix if suffix in _READERS and readable else ""


def _suffixes(path: Path) -> tuple[str, str]:
    """What a name ends in before the suffix of a compression, and that suffix; lower case."""
    last = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), last) if last in PACKED else (last, "")


def count_rows(path: Path) -> int:
    """The rows of a file, bad ones too; raises ConfigError as `read_file` does."""
    if kind(path) == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            _refuse_other_content(path)
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
    return sum(len(piece.numbers) for piece in read_file(path))


def data_files(folder: Path) -> list[Path]:
    """The files below a folder that hold rows by their names, hidden ones left out; raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(parent, name) for name in files if not name.startswith((".", "__"))]
    return sorted(file for file in found if file.name not in METADATA and TABULAR & {*_suffixes(file)})


def parse_line(line: bytes) -> Any:
    """One line of JSON; raises BadRow."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("invalid UTF-8") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long, nesting too deep
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip()):
            raise BadRow(
                "broken JSON that ends too early; write each row in one line, or one array of all rows in a "
                ".json file"
            ) from error
        raise BadRow("broken JSON") from error


def _open(path: Path) -> IO[bytes]:
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _open_arrow(path: Path) -> IO[bytes]:
    """Zstandard and LZ4, which Python's own library lacks."""
    import pyarrow as pa

    compression = "zstd" if path.suffix.lower() == ".zst" else "lz4"
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_arrow,
    ".lz4": _open_arrow,
}


def _json_lines(path: Path) -> Iterator[RowBlock]:
    with _open(path) as file:
        numbered = enumerate(file, start=1)
        while lines := list(islice(numbered, ROWS)):
            if lines[0][0] == 1:
                lines[0] = 1, lines[0][1].removeprefix(BOM)
            kept = [(number, line) for number, line in lines if not line.isspace() and line]
            if kept:
                yield RowBlock([number for number, _ in kept], [line for _, line in kept])


def _json(path: Path) -> Iterator[RowBlock]:
    """An array of objects, or JSON Lines under another name."""
    with _open(path) as file:
        start = file.read(4096)
        if not start.removeprefix(BOM).lstrip().startswith(b"["):
            yield from _json_lines(path)
            return
        content = (start + file.read()).removeprefix(BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: invalid UTF-8; give JSON Lines to leave such rows out") from error
    rows = enumerate(_array(text, path), start=1)
    while some := list(islice(rows, ROWS)):
        yield RowBlock([number for number, _ in some], [row for _, row in some])


def _array(text: str, path: Path) -> Iterator[Any]:
    """The elements of a JSON array one by one: the text is in memory, all that it says is not."""
    decoder = json.JSONDecoder()
    place, separator = text.index("[") + 1, ""
    while True:
        place = _skip_space(text, place)
        if text[place : place + 1] == "]" and separator != ",":
            place = _skip_space(text, place + 1)
            if place < len(text):
                raise _broken_array(text, place, path)
            return
        if separator not in ("", ","):
            raise _broken_array(text, place, path)
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _broken_array(text, place, path) from error
        yield value
        place = _skip_space(text, place)
        separator = text[place : place + 1]
        place += separator == ","


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _broken_array(text: str, place: int, path: Path) -> ConfigError:
    line = text.count("\n", 0, place) + 1
    return ConfigError(f"{path}:{line}: broken JSON; correct it, or give JSON Lines to leave such rows out")


def _csv(path: Path) -> Iterator[RowBlock]:
    csv.field_size_limit(2**31 - 1)  # its own limit is shorter than many responses
    delimiter = "\t" if kind(path) == ".tsv" else ","
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(header) == 1 and ";" in header[0]:
                raise ConfigError(
                    f"{path}:1: the columns are separated by semicolons; "
                    "save the file with commas, or with tabs as .tsv"
                )
            if len(header) == 1 and "\t" in header[0]:
                raise ConfigError(f"{path}:1: the columns are separated by tabs; name the file .tsv")
            if len(set(header)) < len(header):
                raise ConfigError(f"{path}:1: a column's name is there twice")
            rows = _csv_rows(reader, header, path)
            while some := list(islice(rows, ROWS)):
                yield RowBlock([number for number, _ in some], [row for _, row in some])
        except csv.Error as error:
            raise ConfigError(f"{path}:1: not CSV: {first_line(error)}; correct it") from error
        except UnicodeDecodeError as error:
            line = _undecodable_line(path)
            raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


def _csv_rows(reader: Any, header: list[str], path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The rows with the line on which each begins; a cell in quotes may hold several lines."""
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:  # where the next row begins is not known any more
            raise ConfigError(
                f"{path}:{line}: not CSV, in the row that begins here: {first_line(error)}; correct it"
            ) from error
        if values is None:
            return
        if len(values) == len(header):
            yield line, dict(zip(header, values, strict=True))
        elif values:
            yield line, BadRow("not as many fields as the first line")


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8; the decoder's error counts from the piece that it was given."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _parquet(path: Path) -> Iterator[RowBlock]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _refuse_columns_twice(path, file.schema_arrow)
        yield from arrow_pieces(file.iter_batches(ROWS))
    except pa.ArrowException as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _arrow(path: Path) -> Iterator[RowBlock]:
    """Both of Arrow's formats: a stream, as the datasets library writes it, or a file."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file:
                file = pa.ipc.open_file(mapped)
                _refuse_columns_twice(path, file.schema)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                stream = pa.ipc.open_stream(mapped)
                _refuse_columns_twice(path, stream.schema)
                batches = iter(stream)
            yield from arrow_pieces(batches)
    except pa.ArrowException as error:
        raise ConfigError(f"{path} cannot be read as Arrow: {first_line(error)}") from error


def _refuse_columns_twice(path: Path, schema: pa.Schema) -> None:
    """Raise ConfigError for two columns of one name, of which a row would show the last alone."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: the column {twice[0]!r} is there twice; rename or remove one")


def arrow_pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[RowBlock]:
    """Record batches as pieces, rows counted from 1."""
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            yield RowBlock(range(first, first + part.num_rows), part)
            first += part.num_rows


def _sliced(batch: pa.RecordBatch, start: int, stop: int) -> pa.RecordBatch:
    return batch.slice(start, max(0, stop - start))


def _from_arrow(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a batch, looked through first: borders that lie outside it would end the process."""
    if _problem(batch) is None:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        problem = _problem(row)
        yield row.to_pylist()[0] if problem is None else problem


def _problem(batch: pa.RecordBatch) -> BadRow | None:
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        return BadRow("invalid UTF-8" if "UTF8" in str(error) else "broken Arrow data")
    return None


_READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
