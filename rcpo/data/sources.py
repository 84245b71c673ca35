"""Where rows come from: a file, a folder, or a set on the hub; each with a name for its contents.

A folder in the hub's layout is resolved by the datasets library (splits, subsets, patterns, a README's
settings) and its files are read by rcpo, which knows their lines; a set on the hub is read by the library.
A single file is the split `train`. `train[:10%]` is a part of a split, as the library has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rcpo.config.data import SourceSpec
from rcpo.data.readers import ROWS, RowBlock, arrow_pieces, count_rows, data_files, kind, read_file
from rcpo.data.splits import WHOLE, read_split
from rcpo.errors import ConfigError
from rcpo.system.files import file_hash
from rcpo.system.text import first_line, visible

if TYPE_CHECKING:
    import pyarrow as pa

Say = Callable[[str], None]
MANY = 5_000  # files of a folder from which on the user hears that it takes a while


@dataclass(frozen=True)
class Part:
    """A file, or a split of a set on the hub: how messages name it, how ids do, and its rows.

    Of a file only those rows are read whose place, counted from 0, is in `window`; None is all of them.
    """

    place: str
    label: str
    file: Path | None = None
    dataset: Any = None
    window: range | None = None

    def pieces(self) -> Iterator[RowBlock]:
        """The rows, a piece at a time."""
        if self.file is not None:
            pieces = read_file(self.file)
            yield from pieces if self.window is None else _within(pieces, self.window)
            return
        try:
            yield from arrow_pieces(_batches(self.dataset))
        except Exception as error:  # of the library that speaks HTTP, or of one that reads a damaged file
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(
                f"{self.place} cannot be read: {reason}; try again, or fetch the set first: "
                "`hf download NAME --repo-type dataset --local-dir DIR` and data.path=DIR"
            ) from error


@dataclass(frozen=True)
class DataSource:
    """One split of one set. `key` is a hash of its contents, or of the revision that fixes them."""

    name: str
    parts: tuple[Part, ...]
    key: str


def find_source(spec: SourceSpec, memo: Path | None, say: Say) -> DataSource:
    """The rows that a specification names; raises ConfigError where there are none.

    `memo` is the folder that remembers the hashes of files, None to hash all of them. `say` takes lines for
    the user, who may have to wait for a large folder.
    """
    path = Path(spec.path).expanduser()
    try:
        if path.is_file():
            return _of_files(spec, {WHOLE: [path]}, memo)
        if path.is_dir():
            saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
            return _of_files(spec, _saved_files(path) if saved else _folder_files(path, spec, say), memo)
    except OSError as error:
        raise ConfigError(f"{spec.key('path')}={spec.path} cannot be read: {first_line(error)}") from error
    return _on_hub(spec)


def _of_files(spec: SourceSpec, splits: Mapping[str, Sequence[Path]], memo: Path | None) -> DataSource:
    """The wanted split or parts of splits of a folder or file."""
    chosen = _windows(spec, splits)
    names = Counter(file.name for file in {file for file, _ in chosen})
    digest = hashlib.sha256()
    parts = []
    for file, window in chosen:
        if not kind(file):
            raise ConfigError(
                f"{file}: neither JSON (Lines), CSV, Parquet nor Arrow by its name; unpack an archive, and "
                "save a spreadsheet as CSV"
            )
        digest.update(f"{file.name} {window} {file_hash(file, memo)}\n".encode("utf-8", "surrogateescape"))
        # where two files have one name, their folders' names tell them apart
        label = file.name if names[file.name] == 1 else f"{file.parent.name}/{file.name}"
        parts.append(Part(str(file), label, file, window=window))
    return DataSource(spec.name, tuple(parts), digest.hexdigest())


def _windows(spec: SourceSpec, splits: Mapping[str, Sequence[Path]]) -> list[tuple[Path, range | None]]:
    """The files of the wanted split, each with the rows that are wanted of it (None: all of them)."""
    if spec.split in splits:
        return [(file, None) for file in splits[spec.split]]
    wanted = read_split(spec)
    for name in wanted.names:
        if name not in splits:
            _no_split(spec, list(splits))
    sizes = {name: [count_rows(file) for file in splits[name]] for name in wanted.names}
    found: list[tuple[Path, range | None]] = []
    for name, first, end in wanted.rows({name: sum(counts) for name, counts in sizes.items()}):
        start = 0
        for file, size in zip(splits[name], sizes[name], strict=True):
            window = range(max(first - start, 0), min(end - start, size))
            if len(window):
                found.append((file, window))
            start += size
    if not found:
        raise ConfigError(f"{spec.key('split')}={spec.split} leaves no row of {spec.path}")
    return found


def _within(pieces: Iterator[RowBlock], window: range) -> Iterator[RowBlock]:
    """Those rows of a file whose place, counted from 0, is in the window."""
    start = 0
    for piece in pieces:
        part = piece.part(max(window.start - start, 0), max(window.stop - start, 0))
        if len(part.numbers):
            yield part
        start += len(piece.numbers)
        if start >= window.stop:
            return


def _saved_files(folder: Path) -> dict[str, list[Path]]:
    """By split, the files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file():
        return {WHOLE: _listed_files(folder)}
    splits = sorted(entry for entry in folder.iterdir() if (entry / "state.json").is_file())
    return {split.name: _listed_files(split) for split in splits}


def _listed_files(folder: Path) -> list[Path]:
    """The files that a saved dataset's state.json lists: the library puts caches of its own beside them."""
    state = folder / "state.json"
    try:
        listed = [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state} does not list the files of a saved dataset; save it again") from error
    for file in listed:
        if not file.is_file():
            name = visible(file.name, lines=False)
            raise ConfigError(f"{state} lists {name}, which is not there; save the dataset again")
    if not listed:
        raise ConfigError(f"{state} lists no file: the saved dataset is empty")
    return listed


def _folder_files(folder: Path, spec: SourceSpec, say: Say) -> dict[str, list[Path]]:
    """By split, the files of a folder in the hub's layout; refuses files that would not be read."""
    inside = folder / (spec.data_dir or "")
    if not inside.is_dir():
        raise ConfigError(f"{spec.key('data_dir')}={spec.data_dir}: {spec.path} holds no such folder")
    there = data_files(inside)
    if len(there) > MANY:
        say(
            f"{folder}: {len(there):,} files; to find their splits takes a minute for every 30,000. "
            "One file with all the rows is read at once"
        )
    builder = _builder(str(folder), spec)
    splits = {
        str(split): [Path(file) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }
    if not _names_its_files(folder):
        _refuse_unread(spec, folder, there, splits)
    return splits


def _names_its_files(folder: Path) -> bool:
    """Whether a README says which files belong to which split: then leaving some out is meant."""
    readme = folder / "README.md"
    return readme.is_file() and re.search(rb"^configs:", readme.read_bytes(), re.MULTILINE) is not None


def _refuse_unread(
    spec: SourceSpec, folder: Path, there: Sequence[Path], splits: Mapping[str, Sequence[Path]]
) -> None:
    """Raise ConfigError for files of data that the library puts into no split."""
    read = {file.resolve() for files in splits.values() for file in files}
    left = [
        visible(str(file.relative_to(folder)), lines=False) for file in there if file.resolve() not in read
    ]
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise ConfigError(
            f"{spec.key('path')}={spec.path}: {len(left)} of {len(there)} files would not be read ({shown}): "
            "a folder holds files of one kind, and where one file's name has a split (train, test), every "
            f"name needs one; move or rename them, or give a single file: {spec.key('path')}={there[0]}"
        )


def _no_split(spec: SourceSpec, splits: Sequence[str]) -> NoReturn:
    if Path(spec.path).expanduser().is_file():
        raise ConfigError(
            f"{spec.key('split')}={spec.split}: {spec.path} is one file, and its only split is {WHOLE}; "
            f"a part of it is {spec.key('split')}='{WHOLE}[:90%]' or '{WHOLE}[100:200]'"
        )
    raise ConfigError(
        f"{spec.key('split')}={spec.split}: {spec.path} has no such split; there are: {', '.join(splits)}"
    )


def _builder(path: str, spec: SourceSpec) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(
            path, spec.subset, data_dir=spec.data_dir, revision=spec.revision
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ConfigError(
            f"{spec.key('path')}={spec.path} is not a file or folder here, and the hub has no such set that "
            "you may read; correct the name, or log in with `hf auth login` for one that asks for it"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(spec, error) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{spec.key('path')}={spec.path}: {first_line(error)}") from error


def _on_hub(spec: SourceSpec) -> DataSource:
    """A split of a set on the hub: downloaded once by the library, or streamed; offline, from its cache."""
    import datasets

    builder = _builder(spec.path, spec)
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or {}]
    wanted = read_split(spec)
    if splits and not set(wanted.names) <= set(splits):
        _no_split(spec, splits)
    if spec.streaming and wanted.text not in splits:
        raise ConfigError(
            f"{spec.key('split')}={spec.split}: a part of a split cannot be streamed; leave data.streaming "
            "out, or take the first rows of the split with data.max_examples"
        )
    try:
        loaded = datasets.load_dataset(
            spec.path,
            spec.subset,
            data_dir=spec.data_dir,
            revision=spec.revision,
            split=wanted.text,
            streaming=spec.streaming,
        )
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(spec, error) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{spec.key('path')}={spec.path}: {first_line(error)}") from error
    # the builder's hash follows the files' revision on the hub
    fixed = [spec.path, builder.config.name, spec.data_dir, spec.split, builder.hash, _origin(builder)]
    place = f"{spec.path} {spec.split}"
    key = hashlib.sha256(repr(fixed).encode()).hexdigest()
    return DataSource(
        spec.name, (Part(place, f"{spec.path.rpartition('/')[2]}/{spec.split}", dataset=loaded),), key
    )


def _origin(builder: Any) -> list[str]:
    """What the library knows of where the files come from: the set's commit on the hub."""
    files = builder.config.data_files or {}
    return [repr(origin) for split in files.values() for origin in getattr(split, "origin_metadata", [])]


def _batches(dataset: Any) -> Iterator[pa.RecordBatch]:
    for table in dataset.with_format("arrow").iter(ROWS):
        yield from table.combine_chunks().to_batches()


def _unreachable(spec: SourceSpec, error: Exception) -> ConfigError:
    return ConfigError(
        f"{spec.key('path')}={spec.path} is not a file or folder here, and the hub cannot be reached "
        f"({first_line(error)}). Fetch it where there is a network, `hf download {spec.path} --repo-type "
        f"dataset --local-dir DIR`, and give {spec.key('path')}=DIR"
    )
