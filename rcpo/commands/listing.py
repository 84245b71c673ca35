"""`rcpo list` and `help=`: the options of a group and the keys of a node, one line each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config.foreign_names import counterpart
from rcpo.config.paths import conf_dir
from rcpo.config.validation import nearest
from rcpo.errors import ConfigError

if TYPE_CHECKING:
    from rcpo.commands.keys import Entry

KEYS = "keys"
# how people call groups, beside the group's own name
TOPICS = {
    "objectives": "objective",
    "models": "model",
    "data": "data",
    "studies": "study",
    "experiments": "experiment",
    "engines": "engine",
    "optimizers": "optim",
    "adapters": "adapter",
    "gpus": "gpu",
    "scores": "score",
    "pairings": "pairing",
}
_HIDDEN = {"rc": {"true", "false"}}  # options that exist for YAML's sake


def groups(extra: Path | None = None) -> list[str]:
    """The groups of options, those of a folder like `--config-dir` included."""
    folders = [conf_dir(), *([extra] if extra else [])]
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return sorted(found - {"hydra", "__pycache__"})


def topics(extra: Path | None = None) -> list[str]:
    """What `rcpo list` takes: groups, as people call them, and keys."""
    return [*TOPICS, *(name for name in groups(extra) if name not in TOPICS.values()), KEYS]


def options(group: str, extra: Path | None = None) -> dict[str, Path]:
    """The options of a group with their files; shipped ones first."""
    found: dict[str, Path] = {}
    for folder in (conf_dir(), extra):
        if folder is not None:
            for file in sorted((folder / group).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return {name: file for name, file in found.items() if name not in _HIDDEN.get(group, ())}


def first_comment(file: Path) -> str:
    """The first sentence of the comment that a configuration file begins with; empty without one."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip("# ") or not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.strip("# "))
    match = re.match(r".+?(?:[.?](?=\s+[A-Z`])|$)", " ".join(lines))
    return match[0].rstrip(".") if match else ""


def show_topic(topic: str, extra: Path | None, *, markdown: bool) -> int:
    """`rcpo list TOPIC`; returns the exit code, raises ConfigError for a topic that does not exist."""
    if extra is not None and not extra.is_dir():
        raise ConfigError(f"--config-dir {extra} is not a folder")
    print("\n".join(list_topic(topic, extra, markdown)))
    return 0


def list_topic(topic: str, extra: Path | None = None, markdown: bool = False) -> list[str]:
    """The lines of `rcpo list TOPIC`; raises ConfigError for a topic that does not exist."""
    if topic == KEYS:
        from rcpo.commands.keys import nodes, page, summary

        return page().splitlines() if markdown else _columns({node: summary(node) for node in nodes()})
    if markdown:
        raise ConfigError(f"--markdown is for `rcpo list keys`, and {topic} is not keys")
    group, known = TOPICS.get(topic, topic), topics(extra)
    if not topic:
        raise ConfigError(f"list what? Give a topic: {', '.join(known)}")
    if group not in groups(extra):
        raise ConfigError(f"list {topic}: there is no such topic; {nearest(topic, known, limit=40)}")
    return _columns({name: first_comment(file) for name, file in options(group, extra).items()})


def explain(topic: str, tree: Mapping[str, Any], extra: Path | None = None) -> list[str]:
    """The lines of `help=TOPIC`: a node's keys, or one key; `tree` gives the values in effect.

    Raises ConfigError for a topic that does not exist.
    """
    from rcpo.commands.keys import nodes, summary

    if topic in nodes():
        return list(_node(topic, tree, extra))
    if topic in groups(extra):
        return [f"{topic}: choose {topic}=NAME", "", *_indented(list_topic(topic, extra))]
    rows = [row for node in ("", *nodes()) for row in _rows(node, tree)]
    found = [row for row in rows if topic in (row.name, row.name.rpartition(".")[2])]
    found = found or [row for row in rows if row.name.startswith(f"{topic}.")]
    if found:
        return _table(found, tree)
    if topic in ("", "all", "help"):
        return _columns({node: summary(node) for node in nodes()})
    names = {row.name for row in rows} | {row.name.rpartition(".")[2] for row in rows}
    near = difflib.get_close_matches(topic, [*nodes(), *groups(extra), *names], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(nodes())}"
    hint = counterpart(topic) or hint
    raise ConfigError(f"help={topic}: there is no such group or key; {hint}")


def _node(node: str, tree: Mapping[str, Any], extra: Path | None) -> Iterator[str]:
    from rcpo.commands.keys import summary

    yield f"{node}: {summary(node)}"
    if node in groups(extra):
        known = options(node, extra)
        yield f"Choose {node}=NAME: {', '.join(known)}."
        plural = next((name for name, group in TOPICS.items() if group == node), node)
        yield f"`rcpo list {plural}` describes them."
    yield ""
    yield from _table(_rows(node, tree), tree)


def _rows(node: str, tree: Mapping[str, Any]) -> list[Entry]:
    from rcpo.commands.keys import entries, hyperparameters, top_entries

    if not node:
        return top_entries()
    rows = entries(node)
    if node == "objective":
        known = {row.name.partition(".")[2] for row in rows}
        own = {name: value for name, value in (tree.get(node) or {}).items() if name not in known}
        rows += hyperparameters(own)
    return rows


def _table(rows: list[Entry], tree: Mapping[str, Any]) -> list[str]:
    from rcpo.commands.keys import as_yaml

    lines = []
    for row in rows:
        value = _select(tree, row.name, row.default)
        kind = row.type if not row.key.allowed else f"{row.type}: {row.key.allowed}"
        lines.append((f"{row.name}={as_yaml(value)}", kind, row.key.doc))
    wide = min(44, max(len(first) for first, _, _ in lines))
    return [line for first, kind, doc in lines for line in (f"{first:<{wide}}  {kind}", f"    {doc}")]


def _select(tree: Mapping[str, Any], name: str, default: Any) -> Any:
    value: Any = tree
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _columns(rows: Mapping[str, str]) -> list[str]:
    wide = max(map(len, rows), default=0)
    return [f"{name:<{wide}}  {text}".rstrip() for name, text in rows.items()]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
