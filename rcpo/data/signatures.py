"""What the first bytes of a file say that it is, where its name says otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from rcpo.errors import ConfigError

_LONGEST = 64  # bytes that are looked at
_ANY = (
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec"),
        "is a Git LFS pointer without rows; run `git lfs pull` in its folder",
    ),
)
_TEXT = (
    *_ANY,
    (re.compile(rb"\xff\xfe|\xfe\xff"), "is text in UTF-16; save it in UTF-8"),
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; add .gz to its name"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "is compressed with bzip2; add .bz2 to its name"),
    (re.compile(rb"\xfd7zXZ\x00"), "is compressed with xz; add .xz to its name"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "is compressed with Zstandard; add .zst to its name"),
    (re.compile(rb"\x04\x22\x4d\x18"), "is compressed with LZ4; add .lz4 to its name"),
    (re.compile(rb"PK\x03\x04"), "is a ZIP archive, as spreadsheets are; unpack or export it"),
    (re.compile(rb"PAR1\x15"), "is a Parquet file; name it so (.parquet)"),
    (re.compile(rb"ARROW1\x00"), "is an Arrow file; name it so (.arrow)"),
)


def refuse_other_content(path: Path, *, text: bool) -> None:
    """Raise ConfigError for a file that is not what its name says; `text`: its name says plain text.

    Raises OSError where it cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(_LONGEST)
    for sign, told in _TEXT if text else _ANY:
        if sign.match(beginning):
            raise ConfigError(f"{path} {told}")
