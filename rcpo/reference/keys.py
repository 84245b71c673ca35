"""What cached log-probs depend on, each as a hash of its contents, so that no stale entry is ever taken.

A model folder is hashed file by file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rcpo.caching import file_hash
from rcpo.hub import Source

FORMAT = 2  # raise where rcpo computes other numbers from the same ingredients
WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.index.json", "*.py")
ADAPTER = ("adapter_config.json", "adapter_model.*")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def entry_key(ingredients: dict[str, str]) -> str:
    """The name of the cache entry that these ingredients make."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def source_hash(source: Source, seed: int, memo: Path | None) -> str:
    """Of a model's configuration and weights, or the seed of fresh ones, and of the adapter on it.

    `memo` is the folder that remembers the hashes of files, None to hash all of them.
    """
    if source.init == "random":
        base = f"seed {seed} {file_hash(source.base / 'config.json', memo)}"
    else:
        base = _files_hash(_matching(source.base, WEIGHTS), memo)
    if source.adapter is None:
        return base
    adapter = _files_hash(_matching(source.adapter, ADAPTER), memo)
    return hashlib.sha256(f"{base} {adapter}".encode()).hexdigest()


def tokenizer_hash(folder: Path, memo: Path | None) -> str:
    """Of the tokenizer's files in a model folder."""
    return _files_hash(_matching(folder, TOKENIZER), memo)


def positions_hash(positions: np.ndarray | None) -> str:
    """Of the examples that are scored; `all` where none is left out."""
    return "all" if positions is None else hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()


def _files_hash(files: Iterable[Path], memo: Path | None) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_hash(path, memo)}\n".encode())
    return digest.hexdigest()


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: os.fsencode(path.name))
