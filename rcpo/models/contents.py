"""Hashes of models and tokenizers by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rcpo.models.hub import ModelSource
from rcpo.system.files import file_hash

WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.index.json", "*.py")


ADAPTER = ("adapter_config.json", "adapter_model.*")


TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def source_hash(source: ModelSource, seed: int, memo: Path | None) -> str:
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


def generation_hash(folder: Path, memo: Path | None) -> str:
    """Of what a model's folder says of generation, such as a penalty of repetitions."""
    return _files_hash(_matching(folder, ("generation_config.json",)), memo)


def _files_hash(files: Iterable[Path], memo: Path | None) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_hash(path, memo)}\n".encode())
    return digest.hexdigest()


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: os.fsencode(path.name))
