"""Where rows come from: a file, a folder, or a set on the hub; each with a name for its contents.

A folder in the hub's layout is resolved by the datasets library (splits, subsets, patterns, a README's
settings) and its files are read by rcpo, which knows their lines; a set on the hub is read by the library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rcpo.caching import file_hash
from rcpo.config import ConfigError
from rcpo.config.data import SourceSpec
from rcpo.data.readers import ROWS, Piece, arrow_pieces, kind, read_file
from rcpo.visible import first_line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Part:
    """A file, or a split of a set on the hub: how messages name it, how ids do, and its rows."""

    place: str
    label: str
    file: Path | None = None
    dataset: Any = None

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """The rows, a piece at a time."""
        if self.file is not None:
            yield from read_file(self.file, columns)
            return
        try:
            yield from arrow_pieces(_batches(self.dataset), columns)
        except (OSError, ValueError) as error:  # a connection that breaks, a damaged file of the hub
            raise ConfigError(f"{self.place} cannot be read: {first_line(error)}") from error


@dataclass(frozen=True)
class Source:
    """One split of one set. `key` is a hash of its contents, or of the revision that fixes them."""

    name: str
    parts: tuple[Part, ...]
    key: str


def find_source(spec: SourceSpec, memo: Path | None) -> Source:
    """The rows that a specification names; raises ConfigError where there are none.

    `memo` is the folder that remembers the hashes of files, None to hash all of them.
    """
    path = Path(spec.path).expanduser()
    if path.is_file():
        return _of_files(spec, [path], memo)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _of_files(spec, _saved_files(path, spec), memo)
        return _of_files(spec, _folder_files(path, spec), memo)
    return _on_hub(spec)


def _of_files(spec: SourceSpec, files: Sequence[Path], memo: Path | None) -> Source:
    digest = hashlib.sha256()
    parts = []
    for file in files:
        if not kind(file):
            raise ConfigError(f"{file}: neither JSON (Lines), CSV, Parquet nor Arrow by its name")
        digest.update(f"{file.name} {file_hash(file, memo)}\n".encode())
        parts.append(Part(str(file), _label(file, files), file))
    return Source(spec.name, tuple(parts), digest.hexdigest())


def _label(file: Path, files: Sequence[Path]) -> str:
    """The file's name, behind its folder's where another file is called the same."""
    alike = sum(other.name == file.name for other in files) > 1
    return f"{file.parent.name}/{file.name}" if alike else file.name


def _saved_files(folder: Path, spec: SourceSpec) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        if spec.split not in splits:
            _no_split(spec, splits)
        folder = folder / spec.split
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise ConfigError(f"{folder} holds no .arrow file, although the datasets library saved it")
    return files


def _folder_files(folder: Path, spec: SourceSpec) -> list[Path]:
    builder = _builder(str(folder), spec)
    files = builder.config.data_files or {}
    if spec.split not in files:
        _no_split(spec, [str(split) for split in files])
    return [Path(file) for file in files[spec.split]]


def _no_split(spec: SourceSpec, splits: Sequence[str]) -> NoReturn:
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
            f"{spec.key('path')}={spec.path} is no file or folder here, and the hub has no such set that you "
            "may read; mend the name, or log in with `hf auth login` for one that asks for it"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(spec, error) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{spec.key('path')}={spec.path}: {first_line(error)}") from error


def _on_hub(spec: SourceSpec) -> Source:
    """A split of a set on the hub: downloaded once by the library, or streamed; offline, from its cache."""
    import datasets

    builder = _builder(spec.path, spec)
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or {}]
    if splits and spec.split.partition("[")[0] not in splits:
        _no_split(spec, splits)
    try:
        loaded = datasets.load_dataset(
            spec.path,
            spec.subset,
            data_dir=spec.data_dir,
            revision=spec.revision,
            split=spec.split,
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
    return Source(
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
        f"{spec.key('path')}={spec.path} is no file or folder here, and the hub cannot be reached "
        f"({first_line(error)}). Fetch it where there is a network, `hf download {spec.path} --repo-type "
        f"dataset --local-dir DIR`, and give {spec.key('path')}=DIR"
    )
