"""Where a model comes from, in words for others to read: base model, licence, data, commands, versions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig

from rcpo import __version__
from rcpo.config.data import eval_sources, train_sources
from rcpo.config.model import is_hub_name
from rcpo.config.parsing import structure
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.runs.folder import read_object
from rcpo.runs.inputs import EVALUATION_SETTINGS, PAIRS

CARD = "README.md"
UNKNOWN = "unknown"  # a licence, as the hub writes it
TINY_LICENSE = "apache-2.0"  # the packaged model is rcpo's own
LINE = 96  # characters of a command before it goes on in the next line
SUMS = "sums, rcpo's embedded task"


def model_name(config: RunConfig) -> str:
    """What came out, in a word: base model, objective, and calibration."""
    return "-".join([base_name(config), config.objective.name, *(["rc"] if config.rc.enabled else [])])


def base_name(config: RunConfig) -> str:
    return config.model.name if config.model.path is None else Path(config.model.path).name


def base_model(config: RunConfig) -> str | None:
    """The base model's name on the hub: as given, or by the card of a folder; None where unknown."""
    path = config.model.path
    if path is None:
        return None
    if not Path(path).expanduser().is_dir():
        return path if is_hub_name(path) else None
    named = _base_card(config).get("base_model")
    return named if isinstance(named, str) else None


def license_of(config: RunConfig) -> str:
    """The licence that the base model's card names, as the hub writes it; `unknown` without one."""
    if config.model.path is None:
        return TINY_LICENSE
    found = _base_card(config).get("license")
    return found if isinstance(found, str) else UNKNOWN


def _base_card(config: RunConfig) -> Mapping[str, Any]:
    """The metadata of the base model's card, from its folder or the hub's cache; empty without one."""
    assert config.model.path is not None
    file: Any = Path(config.model.path).expanduser() / CARD
    if not file.parent.is_dir():
        known = is_hub_name(config.model.path)  # else a folder that is gone
        file = known and try_to_load_from_cache(config.model.path, CARD, revision=config.model.revision)
        if not isinstance(file, str):
            return {}
    try:
        block = re.match(r"---\s*\n(.*?)\n---", Path(file).read_text(encoding="utf-8"), re.DOTALL)
        found = yaml.safe_load(block[1]) if block else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def data_names(config: RunConfig) -> list[str]:
    """The sets that were trained on: names on the hub, or names of files without their folders."""
    if config.data.name == "sums":
        return [SUMS]
    return list(dict.fromkeys(_short(spec.path) for spec in train_sources(config.data)))


def hub_sets(config: RunConfig) -> list[str]:
    names = [] if config.data.name == "sums" else [spec.path for spec in train_sources(config.data)]
    return list(dict.fromkeys(name for name in names if "/" in name and _short(name) == name))


def _short(path: str) -> str:
    """A name on the hub as it is, a path of this machine as its last part."""
    return path if is_hub_name(path) and not Path(path).expanduser().exists() else Path(path).name


def held_out_data(config: RunConfig, run_dir: Path) -> str:
    """What the figures of evaluation.json were measured on, in words."""
    made = read_object(run_dir / EVALUATION_SETTINGS).get(PAIRS)
    if isinstance(made, dict):  # `rcpo evaluate`, perhaps on other data than the run's
        try:
            config = structure(DictConfig(made["config"]))
        except (KeyError, ConfigError):
            return "unknown data"
    if config.data.name != "sums" and (sources := eval_sources(config.data)):
        return ", ".join(dict.fromkeys(f"{_short(spec.path)} ({spec.split})" for spec in sources))
    return f"{100 * config.data.eval_fraction:g} % of the prompts of {', '.join(data_names(config))}"


def commands(environment: Mapping[str, Any]) -> list[str]:
    """The command that started the run, and the one that continued it last, as they are typed."""
    started = [environment.get("first_command"), environment.get("command")]
    lines = [_typed(words) for words in started if isinstance(words, list) and words]
    return list(dict.fromkeys(lines))


def _typed(words: Sequence[str]) -> str:
    """A command line for a shell: the program by its name, the user's home as ~."""
    home = str(Path.home())
    shown = [Path(words[0]).name, *(re.sub(rf"(?<![\w/]){re.escape(home)}(?=/)", "~", w) for w in words[1:])]
    lines = [""]
    for word in map(_quoted, shown):
        if lines[-1] and len(lines[-1]) + len(word) > LINE:
            lines.append("   ")  # a continuation, indented by four
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _quoted(word: str) -> str:
    """In quotes where a shell would read it otherwise; a ~ is expanded by rcpo itself."""
    return word if re.fullmatch(r"[\w@%+=:,./~-]+", word) else shlex.quote(word)


def versions(environment: Mapping[str, Any]) -> str:
    """The versions that a result depends on, in a line."""
    packages = environment.get("packages")
    known = packages if isinstance(packages, dict) else {}
    names = ("torch", "transformers", "deepspeed", "peft")
    found = [f"{name} {known[name]}" for name in names if known.get(name)]
    commit = environment.get("git")
    if isinstance(commit, dict) and commit.get("commit"):
        changed = ", with changes" if commit.get("dirty") else ""
        found.insert(0, f"commit {str(commit['commit'])[:12]}{changed}")
    return ", ".join([f"rcpo {__version__}", *found])
