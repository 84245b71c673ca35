"""Tab completion: what may stand where the cursor is. Nothing heavy is imported: a key press has 0.15 s."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcpo.commands import keys, listing
from rcpo.config.hyperparameters import HYPERPARAMETERS
from rcpo.config.paths import conf_dir

CONFIG_FILE, FINAL = "config.yaml", "final"  # as runs/folder has them, whose import would take too long
RUNS = 200  # folders of runs that are offered at most
_ONPOLICY = ("sample", "score", "pairing")
# the nodes and words that a command takes beside a run's
_OWN_NODES: dict[str, tuple[str, ...]] = {
    "train": ("sweep",),
    "sweep": ("sweep", "study"),
    "plan": ("plan", "gpu"),
    "submit": ("slurm", "sweep", "study", *_ONPOLICY, "iterate"),
    "sample": _ONPOLICY,
    "iterate": (*_ONPOLICY, "iterate"),
    "push": ("push",),
}
_OWN_WORDS = {
    "evaluate": {"run": "folder of a run"},
    "sample": {"run": "folder of a run"},
    "push": {"run": "folder of a run", "repo": "OWNER/NAME on the hub"},
    "submit": {"run": "folder of a run", "rounds": "rounds of rcpo iterate"},
    "iterate": {"rounds": "rounds of rcpo iterate"},
    "data": {"show": "examples to show"},
    "sweep": {"compare": "folder of a sweep"},
}
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "compare")
HYDRA_FLAGS = {
    "--cfg": "print the configuration: job, hydra, or all",
    "--config-dir": "folder with options of your own",
    "--config-name": "name of the primary configuration",
    "--config-path": "folder instead of conf/",
    "--from-trl": "YAML of TRL, LLaMA-Factory, or alignment-handbook to convert",
    "--help": "show the help of the command",
    "--info": "print what Hydra knows",
    "--multirun": "a run for each combination of values",
    "--package": "node to print with --cfg",
    "--resolve": "resolve interpolations with --cfg",
}
_FLAG_VALUES = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}
_FLAG_FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")
_ENDS_OPEN = ("=", ".", "/")  # more is to be typed: no space follows


@dataclass(frozen=True)
class Word:
    """A completion of the whole word under the cursor, and what it means."""

    text: str
    meaning: str = ""

    @property
    def open(self) -> bool:
        """Whether more is to be typed after it."""
        return self.text.endswith(_ENDS_OPEN)


@dataclass(frozen=True)
class Command:
    """What the command line's parser knows of a command: flags, and whether it takes KEY=VALUE."""

    help: str
    flags: dict[str, str]
    takes_keys: bool
    positions: tuple[tuple[str, ...], ...] = ()  # choices of its first arguments


def complete(words: Sequence[str], current: str, commands: dict[str, Command]) -> list[Word]:
    """Completions of `current` after `words`, which begin with the command and lack the program's name."""
    found: dict[str, Word] = {}
    for word in _candidates(words, current, commands):
        if word.text.startswith(current):
            found.setdefault(word.text, word)
    return list(found.values())


def _candidates(words: Sequence[str], current: str, commands: dict[str, Command]) -> Iterator[Word]:
    names = [word for word in words if not word.startswith("-")]
    if not names:
        root = commands[""]
        yield from (
            _flags(root.flags)
            if current.startswith("-")
            else (Word(name, _first_sentence(command.help)) for name, command in commands.items() if name)
        )
        return
    name, command = names[0], commands.get(names[0])
    if command is None:
        return
    if words[-1] in _FLAG_VALUES and command.takes_keys:
        yield from map(Word, _FLAG_VALUES[words[-1]])
    elif words[-1] in _FLAG_FOLDERS:
        yield from _paths(current, "", folders=True)
    elif words[-1] == "--from-trl":
        yield from _paths(current, "")
    elif current.startswith("-"):
        yield from _flags(command.flags | (HYDRA_FLAGS if command.takes_keys else {}))
    elif len(names) <= len(command.positions):
        yield from map(Word, command.positions[len(names) - 1])
    elif name == "list":
        yield from map(Word, listing.topics(_own_folder(words)))
    elif command.takes_keys:
        yield from _settings(name, words, current)
    else:
        yield from _runs(current, "")


def _flags(flags: dict[str, str]) -> Iterator[Word]:
    yield from (Word(flag, meaning) for flag, meaning in flags.items())


def _settings(command: str, words: Sequence[str], current: str) -> Iterator[Word]:
    """KEY=VALUE and GROUP=OPTION."""
    name, sign, value = current.partition("=")
    plus = re.match(r"[+~]*", name)
    prefix = plus[0] if plus else ""
    if sign:
        yield from _values(command, words, name[len(prefix) :], f"{name}=", value)
    else:
        yield from (
            Word(f"{prefix}{word.text}", word.meaning) for word in _names(command, words, name[len(prefix) :])
        )


def _names(command: str, words: Sequence[str], typed: str) -> Iterator[Word]:
    node, dot, _ = typed.partition(".")
    nodes = [*keys.RUN_NODES, *_OWN_NODES.get(command, ())]
    if dot and node in nodes and node != "study":
        depth = typed.count(".") + 1
        for entry in [*keys.entries(node), *(_hyperparameters(words) if node == "objective" else ())]:
            parts = entry.name.split(".")
            if len(parts) > depth:
                yield Word(".".join(parts[:depth]) + ".")
            else:
                yield Word(f"{entry.name}=", entry.key.doc)
        return
    known = listing.groups(_own_folder(words))
    yield from (Word(f"{word}=", meaning) for word, meaning in _OWN_WORDS.get(command, {}).items())
    yield from (Word(f"{group}=", f"choose an option of {group}") for group in known if _fits(group, command))
    yield from (Word(f"{node}.", _summary(node)) for node in nodes if node != "study")
    yield from (Word(f"{entry.name}=", entry.key.doc) for entry in keys.top_entries())
    yield Word("help=", "show the keys of a group")
    yield Word("hydra.sweep.dir=" if command == "sweep" else "hydra.run.dir=", "folder of the run")


def _summary(node: str) -> str:
    """What a node is about; "" for one whose import would take too long."""
    return keys.summary(node) if node in keys.RUN_NODES else ""


def _fits(group: str, command: str) -> bool:
    """Whether a command reads a group; groups of the user's own are for all."""
    of_commands = {node for nodes in _OWN_NODES.values() for node in nodes}
    return group not in of_commands or group in _OWN_NODES.get(command, ())


def _values(command: str, words: Sequence[str], name: str, prefix: str, value: str) -> Iterator[Word]:
    own = _own_folder(words)
    if name == "help":
        yield from (Word(f"{prefix}{node}", _summary(node)) for node in keys.nodes())
    elif name == "run" and name in _OWN_WORDS.get(command, {}):
        yield from _runs(value, prefix)
    elif name in _FOLDERS:
        yield from _paths(value, prefix, folders=True)
    elif name in listing.groups(own):
        several = prefix + value[: value.rfind(",") + 1]  # -m objective=dpo,simpo
        for option, file in listing.options(name, own).items():
            yield Word(f"{several}{option}", listing.first_comment(file))
    else:
        yield from _key_values(words, name, prefix, value)


def _key_values(words: Sequence[str], name: str, prefix: str, value: str) -> Iterator[Word]:
    node = name.partition(".")[0]
    entries = keys.top_entries() if "." not in name else keys.entries(node) if node in keys.nodes() else []
    if node == "objective":
        entries += list(_hyperparameters(words))
    for entry in entries:
        if entry.name == name:
            several = prefix + value[: value.rfind(",") + 1]
            kinds = entry.type.split(" or ")
            yield from (Word(f"{several}{choice}") for choice in entry.key.choices)
            yield from (Word(f"{several}{choice}") for choice in ("true", "false") if choice in kinds)
            if name == "resume":
                yield Word(f"{prefix}auto", "continue in hydra.run.dir")
                yield from _runs(value, prefix)
            elif entry.key.path:
                yield from _paths(value, prefix)
            if "null" in kinds:
                yield Word(f"{several}null")


def _hyperparameters(words: Iterable[str]) -> Iterator[keys.Entry]:
    """Those that the file of the chosen objective has."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("objective=")]
    for name in _keys_in_file("objective", (chosen or ["dpo"])[-1].rpartition(",")[2]):
        if name in HYPERPARAMETERS:
            yield keys.Entry(f"objective.{name}", "", None, HYPERPARAMETERS[name])


def _keys_in_file(group: str, option: str) -> list[str]:
    """The keys of an option's file and of those in its defaults list, found without a YAML parser."""
    file = conf_dir() / group / f"{option}.yaml"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    above = [name for name in re.findall(r'^  - "?(\w+)"?$', text, flags=re.MULTILINE) if name != "_self_"]
    found = [name for base in above if base != option for name in _keys_in_file(group, base)]
    return [*found, *re.findall(r"^(\w+):", text, flags=re.MULTILINE)]


def _own_folder(words: Sequence[str]) -> Path | None:
    """What `--config-dir` names."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--config-dir", "-cd") and following:
            return Path(following).expanduser()
        if word.startswith("--config-dir="):
            return Path(word.partition("=")[2]).expanduser()
    return None


def _paths(value: str, prefix: str, *, folders: bool = False) -> Iterator[Word]:
    """Files and folders that begin as `value` does; hidden ones where it asks for them."""
    head, slash, start = value.rpartition("/")
    folder = Path(f"{head}{slash}" or ".").expanduser()
    for entry in _scanned(folder):
        if entry.name.startswith(start) and (start.startswith(".") or not entry.name.startswith(".")):
            if entry.is_dir():
                yield Word(f"{prefix}{head}{slash}{entry.name}/")
            elif not folders:
                yield Word(f"{prefix}{head}{slash}{entry.name}")


def _runs(value: str, prefix: str) -> Iterator[Word]:
    """Folders of runs below outputs/, the newest first; then folders on the way to others."""
    found = _run_folders(Path("outputs"))[:RUNS]
    yield from (Word(f"{prefix}{folder}", _of_run(folder)) for folder in found)
    for word in _paths(value, prefix, folders=True):
        path = word.text.removeprefix(prefix).rstrip("/")
        yield Word(prefix + path) if (Path(path) / CONFIG_FILE).is_file() else word


def _run_folders(root: Path) -> list[Path]:
    folders = [Path(entry.path) for entry in _scanned(root) if entry.is_dir()]
    nested = [Path(entry.path) for folder in folders for entry in _scanned(folder) if entry.is_dir()]
    found = [folder for folder in (*folders, *nested) if (folder / CONFIG_FILE).is_file()]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def _of_run(folder: Path) -> str:
    return "trained" if (folder / FINAL).is_dir() else "not finished"


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:;])\s", text.strip(), maxsplit=1)[0].rstrip(".")
