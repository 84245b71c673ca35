"""Pages: links and names that exist, a map that matches the folders, nothing said twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, committed, prose

from rcpo.config.nodes import COMMAND_NODES
from rcpo.config.parsing import known_keys

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
# what a key may start with without being one: names of metrics and of files
FILES = re.compile(r"\.(py|json|jsonl|yaml|md|html|parquet|log|sbatch|gz|txt|jinja)$")
EXAMPLES = {"my_conf/objective/mine.yaml"}  # of the reader's own


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"`|\[|\]\([^)]*\)", "", heading.strip().lower())
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(page: str) -> set[str]:
    return {slug(title) for title in re.findall(r"^#+ (.+)$", prose(PAGES[page]), flags=re.MULTILINE)}


def links() -> list[tuple[str, str]]:
    return [(page, target) for page, text in PAGES.items() for target in LINK.findall(prose(text))]


def test_there_are_pages_with_links() -> None:
    assert len(PAGES) > 12 and len(links()) > 30


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent.joinpath(path).resolve() if path else (ROOT / page).resolve()
    assert found.exists(), f"{page}: {target}"
    if anchor:
        assert anchor in anchors(str(found.relative_to(ROOT))), f"{page}: {target}"


def test_the_readme_leads_to_every_page() -> None:
    targets = {target for page, target in links() if page == "README.md"}
    linked = {target for target in targets if not re.match(r"[a-z]+:|#", target) and "#" not in target}
    assert set(PAGES) - {"README.md"} <= linked


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md", ".github/CHANGELOG.md"}))
def test_a_page_starts_with_its_purpose_and_an_example(page: str) -> None:
    lines = PAGES[page].splitlines()
    assert re.match(r"# \S", lines[0])
    assert any(line.startswith("```") for line in lines[:14]), page


def test_the_map_of_the_readme_is_the_tree() -> None:
    [tree] = re.findall(r"^    rcpo/\n((?:      .+\n)+)", PAGES["README.md"], flags=re.MULTILINE)
    shown = re.findall(r"^      (\w+)/", tree, flags=re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "rcpo").glob("*/__init__.py")}
    assert len(shown) == len(set(shown)) and set(shown) == folders


def test_the_rows_of_the_contributing_page_are_those_of_the_test() -> None:
    from test_structure import ROWS

    block = re.findall(
        r"^((?:    [a-z_ ]+(?:\([^)]*\))?\n)+)", PAGES[".github/CONTRIBUTING.md"], flags=re.MULTILINE
    )
    shown = [re.sub(r"\(.*\)", "", line).split() for line in block[0].splitlines()]
    assert shown[::-1] == [[name for name in row if name != "__main__"] for row in ROWS]


def named_paths() -> set[tuple[str, str]]:
    """Paths of the repository that pages name, in code and in prose."""
    roots = r"(?:rcpo|conf|scripts|tests)"
    found = set()
    for page, text in PAGES.items():
        for path in re.findall(rf"(?<![\w./-])({roots}/[\w./-]*\w)", text):
            found.add((page, path))
    return found


@pytest.mark.parametrize(("page", "path"), sorted(named_paths()))
def test_a_path_that_is_named_exists(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page}: {path}"


def test_keys_that_are_named_exist() -> None:
    nodes = {key.partition(".")[0] for key in known_keys() if "." in key}
    known = {*known_keys(), *(f"{node}." for node in COMMAND_NODES)}
    wrong = []
    for page, text in PAGES.items():
        for code in INLINE.findall(prose(text)):
            for key in re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_]+)(?=[=\s`.]|$)", code):
                if (
                    key.partition(".")[0] in nodes - {"objective"}
                    and not FILES.search(key)
                    and key not in known
                ):
                    wrong.append(f"{page}: {key}")
    assert not wrong


def test_python_of_pages_parses() -> None:
    assert len([ast.parse(block) for block in blocks("python")]) > 4


def sentences(text: str) -> set[str]:
    """Sentences of ten words and more, of prose and of tables."""
    flat = re.sub(r"\s+", " ", prose(text))
    return {part.strip() for part in re.split(r"(?<=[.:;|]) ", flat) if len(part.split()) >= 10}


def test_no_two_pages_say_the_same() -> None:
    pages = defaultdict(list)
    for page, text in PAGES.items():
        for sentence in sentences(text):
            pages[sentence].append(page)
    assert {sentence: found for sentence, found in pages.items() if len(found) > 1} == {}


def test_pages_are_committed_where_readers_find_them() -> None:
    assert {"README.md", ".github/CONTRIBUTING.md", "conf/README.md", "rcpo/method/README.md"} <= set(PAGES)
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "keys.md")
    assert all(Path(name).name in names for name in PAGES), committed()
