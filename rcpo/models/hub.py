"""Where a model or an adapter lies: the user's folder, or a snapshot of the hub in its cache.

A name of the hub is downloaded once, before the run starts (`fetch`); the ranks then find the snapshot in the
cache (`folder`), and so does a machine without a network. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rcpo.config.model import holds_adapter, is_hub_name
from rcpo.errors import ConfigError
from rcpo.system.text import first_line

_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]  # the card names the licence
_SAFE, _PICKLED, _CODE = ["*.safetensors"], ["*.bin"], ["*.py"]
# other formats of the same weights: repositories keep them in folders of their own, Mistral's as consolidated
_IGNORED = ["*/*", "consolidated*"]
_LFS = b"version https://git-lfs.github.com/spec"  # how a pointer begins
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class ModelSource:
    """What a model is made of: a base model's folder, `init` its weights or fresh ones, an adapter on it."""

    base: Path
    init: str = "pretrained"
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer: an adapter may have been trained with a template of its own."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.base


def source(key: str, name: str, find: Callable[[str, str], Path]) -> ModelSource:
    """A model by folder or name, or an adapter and the base model that it names; `find` looks for each.

    Raises ConfigError where either cannot be had.
    """
    found = find(key, name)
    if not holds_adapter(found):
        return ModelSource(found)
    try:
        base = json.loads((found / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{key}={name}: its adapter_config.json cannot be read: {first_line(error)}; copy it again"
        ) from error
    if not base:
        raise ConfigError(
            f"{key}={name} is an adapter that does not name its base model; give the base model's name as "
            "base_model_name_or_path in its adapter_config.json"
        )
    return ModelSource(find(f"the base model of {key}", base), adapter=found)


def own_folder(source: str) -> Path | None:
    """The folder of this machine that `source` is; None where it is none."""
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def folder(key: str, source: str, revision: str | None = None) -> Path:
    """The folder of a model that `fetch` has fetched. Raises ConfigError where the cache lacks it."""
    own = own_folder(source)
    return own if own is not None else _snapshot(key, source, revision, _TEXTS, cached=True)


def fetch(
    key: str, source: str, revision: str | None = None, *, pickle: bool = False, code: bool = False
) -> Path:
    """The folder of a model or adapter, downloaded if it is not in the cache; `key` names it in errors.

    `pickle` allows weights in PyTorch's old format where there are no others, `code` the repository's own
    modules. Raises ConfigError with a remedy where it cannot be had.
    """
    own = own_folder(source)
    if own is not None:
        return own
    if not is_hub_name(source):
        raise ConfigError(f"{key}={source} is not a folder")
    wanted = [*_TEXTS, *_SAFE, *(_CODE if code else [])]
    found = _snapshot(key, source, revision, wanted)
    if pickle and not any(found.glob("*.safetensors")):
        found = _snapshot(key, source, revision, [*wanted, *_PICKLED])
    return found


def tokenizer_folder(key: str, source: str, revision: str | None = None) -> Path:
    """The folder of a model's tokenizer and configuration, downloaded without weights if need be."""
    own = own_folder(source)
    return own if own is not None else _snapshot(key, source, revision, _TEXTS)


def check_weights(key: str, folder: Path, *, pickle: bool) -> None:
    """Raise ConfigError where a folder lacks its model's or adapter's weights, or has only pickled ones."""
    adapter = holds_adapter(folder)
    safe = "adapter_model.safetensors" if adapter else "model.safetensors"
    if _whole(key, folder, safe):
        return
    if not _whole(key, folder, "adapter_model.bin" if adapter else "pytorch_model.bin"):
        raise ConfigError(f"{key}={folder} holds no weights ({safe}); were they all copied?")
    if not pickle:
        raise ConfigError(
            f"{key}={folder} has its weights only as pickles (*.bin), and loading one can run any program; "
            "if you trust where it comes from: model.allow_pickle=true"
        )


def _whole(key: str, folder: Path, name: str) -> bool:
    """Whether weights of this name are there, in one file or in the pieces of an index, all of them."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        if not (folder / name).is_file():
            return False
        _check_file(key, folder / name)
        return True
    try:
        pieces = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}={folder}: {index.name} is not an index of weights: {error!r}") from error
    missing = sorted(piece for piece in pieces if not (folder / piece).is_file())
    if missing:
        raise ConfigError(f"{key}={folder} lacks {missing[0]} ({len(missing)} of {len(pieces)} files)")
    for piece in sorted(pieces):
        _check_file(key, folder / piece)
    return True


def _check_file(key: str, path: Path) -> None:
    """Raise ConfigError for a file of weights that may not be read, is a Git LFS pointer, or is cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(len(_LFS))
            wanted = _safetensors_size(beginning, file) if path.suffix == ".safetensors" else size
    except OSError as error:
        raise ConfigError(f"{key}={path.parent}: {path.name} cannot be read: {error.strerror}") from error
    if beginning == _LFS:
        raise ConfigError(
            f"{key}={path.parent}: {path.name} is a Git LFS pointer, no weights; run `git lfs pull` there"
        )
    if wanted is None:
        raise ConfigError(
            f"{key}={path.parent}: {path.name} is not a safetensors file, or its header is damaged"
        )
    if size != wanted:
        raise ConfigError(
            f"{key}={path.parent}: {path.name} has {size:,} bytes instead of {wanted:,}; copy or download it "
            "again"
        )


def _safetensors_size(beginning: bytes, file: BinaryIO) -> int | None:
    """The bytes that a safetensors file has by its own header; None where that makes no sense."""
    length = int.from_bytes(beginning[:8], "little")
    if not 2 <= length <= _LARGEST_HEADER:
        return None
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return 8 + length + max(ends, default=0)


def _snapshot(
    key: str, name: str, revision: str | None, patterns: list[str], *, cached: bool = False
) -> Path:
    from huggingface_hub import errors, snapshot_download

    what = f"{key}={name}" + (f" (revision {revision})" if revision else "")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
                local_files_only=cached,
            )
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{what} is gated: accept its terms on https://huggingface.co/{name}, then log in here with "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{what} is not a folder here, and the hub has no such repository for you: check the name; a "
            "private one needs `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{what}: there is no such revision; see its branches and tags") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(_not_cached(what, name, error)) from error
    except errors.HfHubHTTPError as error:
        raise ConfigError(f"{what}: the hub refused: {first_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"{what} could not be downloaded: {first_line(error)}") from error


def _not_cached(what: str, name: str, error: Exception) -> str:
    from huggingface_hub import constants

    if isinstance(_root(error), ConnectionError) or constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"the hub cannot be reached ({type(_root(error)).__name__})"
    return (
        f"{what} is not a folder here and not, or not completely, in the hub's cache "
        f"({constants.HF_HUB_CACHE}), "
        f"and {reason}: where there is a network, run `hf download {name}`, then copy that cache here or set "
        "HF_HOME to it"
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
