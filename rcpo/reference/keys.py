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

FORMAT = 1  # raise where rcpo computes other numbers from the same ingredients
WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.index.json", "adapter_config.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def entry_key(ingredients: dict[str, str]) -> str:
    """The name of the cache entry that these ingredients make."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def weights_hash(folder: Path, memo: Path | None) -> str:
    """Of a model folder's configuration, weights and adapter, an adapter's base model included.

    `memo` is the folder that remembers the hashes of files, None to hash all of them.
    """
    files = _matching(folder, WEIGHTS)
    digest = hashlib.sha256(_files_hash(files, memo).encode())
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and Path(base).is_dir() and Path(base).resolve() != folder.resolve():
            digest.update(weights_hash(Path(base), memo).encode())
    return digest.hexdigest()


def tokenizer_hash(folder: Path, memo: Path | None) -> str:
    """Of the tokenizer's files in a model folder."""
    return _files_hash(_matching(folder, TOKENIZER), memo)


def fresh_hash(folder: Path, seed: int, memo: Path | None) -> str:
    """Of fresh weights: they follow from the architecture and the seed."""
    return f"seed {seed} {file_hash(folder / 'config.json', memo)}"


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
