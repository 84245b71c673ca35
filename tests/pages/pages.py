"""The pages of the repository: every Markdown file that is committed, by its path."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def committed() -> list[str]:
    """Paths of all files, as git knows them; of an unpacked source distribution, what lies there."""
    if not (ROOT / ".git").exists():
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).is_file()]


PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in committed() if name.endswith(".md")}


def blocks(kind: str, page: str | None = None, heading: str | None = None) -> list[str]:
    """The fenced blocks of a kind: of all pages, of one, or below one of its headings of the second level."""
    texts = list(PAGES.values()) if page is None else [PAGES[page]]
    if heading is not None:
        assert f"## {heading}\n" in texts[0], heading
        texts = re.split(r"^## ", texts[0].partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[
            :1
        ]
    return [block for text in texts for block in re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)]


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)
