"""Tensors in files of the safetensors format, which nothing can be executed from: written in a stream and
hashed as they pass, read piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcpo.engine.pieces import parse_label
from rcpo.errors import ConfigError

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """A file's size in bytes and SHA-256."""

    size: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write tensors of one axis and return when they are on the disk; raise OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=_CHUNK) as file:
        for part in _parts(tensors):
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file: its header's length, the header, the data, each tensor's when it is its turn."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().view(torch.uint8).numpy().data


def hash_file(path: Path) -> Written:
    """What is in a file; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


class PieceFiles:
    """The pieces of all ranks of a checkpoint, in the files that its writers made, as one."""

    def __init__(self, paths: list[Path]) -> None:
        """Raise ConfigError for a file that holds anything else."""
        # by name and key: start, size, file and label of each piece, in order
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                for label in file.keys():  # noqa: SIM118 - it is not a mapping
                    name, key, start = parse_label(label)
                    (size,) = file.get_slice(label).get_shape()
                    self._pieces.setdefault((name, key), []).append((start, size, file, label))
            except (SafetensorError, ValueError) as error:
                raise ConfigError(f"{path} is refused: it is not a file of tensors ({error})") from error
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def values(self, name: str, key: str, start: int, size: int) -> Tensor | None:
        """Elements `start` … of a parameter's key, (size,), from whatever pieces have them; None without any.

        Raises ConfigError where some are missing.
        """
        pieces = self._pieces.get((name, key))
        if pieces is None:
            return None
        parts, place = [], start
        for first, length, file, label in pieces:
            if first <= place < min(first + length, start + size):
                end = min(first + length, start + size)
                parts.append(file.get_slice(label)[place - first : end - first])
                place = end
        if place < start + size:
            raise ConfigError(f"the checkpoint's {key} of {name} has no element {place}; a file is missing")
        return torch.cat(parts) if parts else torch.zeros(0)

    def whole(self, name: str, key: str) -> Tensor | None:
        """All pieces of a key, in their order; None where it is not there."""
        pieces = self._pieces.get((name, key))
        return None if pieces is None else self.values(name, key, 0, pieces[-1][0] + pieces[-1][1])

    def number(self, name: str, key: str) -> float | None:
        """A key that has one number for the whole parameter; None where it is not there."""
        pieces = self._pieces.get((name, key))
        if pieces is None:
            return None
        _, _, file, label = pieces[0]
        return float(file.get_tensor(label))

    def names(self) -> list[str]:
        """The parameters, sorted."""
        return sorted({name for name, _ in self._pieces})
