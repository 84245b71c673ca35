"""What Hydra, OmegaConf and YAML refuse, as one message that names the key or the file and the remedy."""

from __future__ import annotations

import difflib
import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]

from rcpo.config.data import SUFFIXES
from rcpo.config.foreign_names import LOSSES, OPTIMIZERS
from rcpo.config.parsing import describe, known_keys
from rcpo.config.paths import conf_dir
from rcpo.config.validation import nearest, unknown_key
from rcpo.errors import ConfigError
from rcpo.system.text import text_lines

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override

_SECRET = re.compile(r"[+~]*(judge|score|slurm\.env)\b")  # such values may hold a key
SEVERAL = "add -m for a run each"  # what to do about several values where a command takes them
# how a model or data set of the user's own is given, where an option of these groups is expected
_OWN = {"model": "model=local model.path", "data": "data=pairs data.path"}
_ALIASES = {"rc": {"true", "false"}}  # options that exist for YAML's sake


@contextmanager
def refusals_explained(
    hydra: Hydra, config_name: str, overrides: Sequence[str], several: str = SEVERAL
) -> Iterator[None]:
    """Turn refusals of a composition into one ConfigError each, with the nearest name that exists.

    `several` is the remedy for a key that was given several values.
    """
    from hydra.errors import HydraException

    try:
        yield
    except ConfigError:
        raise
    except HydraException as error:
        raise ConfigError(_explain(error, hydra, config_name, overrides, several)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_in_file(error) + describe(error)) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "YAML"
        raise ConfigError(f"{place}: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_file_of(error)} is not UTF-8 text; save it as UTF-8") from error
    except YAMLError as error:
        raise ConfigError(f"{_file_of(error)} is not YAML: {text_lines(str(error))[0]}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{_file_of(error)} cannot be read: {reason}") from error
    except RecursionError as error:
        raise ConfigError(
            "a configuration file refers to itself (by an anchor or its defaults list), or is nested too deep"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{_in_file(error) or 'command line: '}{error}") from error


def _file_of(error: BaseException) -> str:
    """The configuration file that was being read when the error was raised."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_config" and "full_path" in frame.f_locals:
            return str(frame.f_locals["full_path"])
    return str(getattr(error, "filename", None) or "a configuration file")


def _in_file(error: BaseException) -> str:
    file = _file_of(error)
    return "" if file == "a configuration file" else f"{file}: "


def refuse_odd_overrides(hydra: Hydra, overrides: Sequence[str], several: str = SEVERAL) -> None:
    """Raise ConfigError for what Hydra takes, or refuse without the key, and no run could use."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(
        list(overrides)
    ):
        key, text = override.key_or_group, override.input_line or ""
        if override.is_delete():
            if key in known_keys():
                raise ConfigError(
                    f"{text}: every key has to have a value; change it with {key}=VALUE instead"
                )
        elif key in ("hydra.run.dir", "hydra.sweep.dir") and override.value() == "":
            raise ConfigError(f"{text}: the folder's name is empty; give one: {key}=DIR")
        elif "." not in key and hydra.config_loader.get_group_options(key):
            _refuse_odd_option(hydra, override, several)


def _refuse_odd_option(hydra: Hydra, override: Override, several: str) -> None:
    """An option is chosen by its name: not by a number, nothing, a list or a mapping."""
    from hydra.core.override_parser.types import ChoiceSweep

    key, value = override.key_or_group, override.value()
    if isinstance(value, list):
        each = f"; for a run with each: -m {key}={','.join(map(str, value))}" if several == SEVERAL else ""
        raise ConfigError(f"{override.input_line}: choose one option{each}")
    if isinstance(value, dict):
        raise ConfigError(f"{override.input_line}: choose an option, and set its keys by {key}.KEY=VALUE")
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        if choice is None or isinstance(choice, bool | int | float):
            shown = "null" if choice is None else str(choice).lower() if isinstance(choice, bool) else choice
            raise ConfigError(no_such_option(hydra, key, str(shown)))


def _is_file(option: str) -> bool:
    return "/" in option or option.lower().endswith(SUFFIXES) or Path(option or "?").exists()


def no_such_option(hydra: Hydra, group: str, option: str) -> str:
    """The message for an option that does not exist: the names most like it, or all."""
    options = sorted({*hydra.config_loader.get_group_options(group)} - _ALIASES.get(group, set()))
    holding = [name for name in options if option and name.partition("_")[0].endswith(option)]
    near = difflib.get_close_matches(option.lower(), options, n=1, cutoff=0.6)
    theirs = {"objective": LOSSES, "optim": OPTIMIZERS}.get(group, {}).get(option)
    file = Path(f"{option}.yaml")
    if file.parent.name == group and file.is_file():
        hint = f"for your own file, write --config-dir {file.parent.parent} {group}={file.stem}"
    elif group in _OWN and _is_file(option):
        hint = f"for one of your own, write {_OWN[group]}={option}"
    elif theirs:
        hint = f"did you mean {theirs}?"
    elif holding and not near and len(holding) <= 3:
        hint = f"did you mean {' or '.join(holding)}?"
    else:
        hint = nearest(option, options, limit=40)
    for source in hydra.config_loader.get_sources():
        other = Path(source.path) / group / f"{option}.yml"
        if other.is_file():
            hint = f"{other} would have to end in .yaml"
    return f"{group}={option}: there is no such {group}; {hint}"


def _explain(error: Exception, hydra: Hydra, config_name: str, overrides: Sequence[str], several: str) -> str:
    from hydra.errors import MissingConfigException, OverrideParseException

    if not str(error) and isinstance(error.__cause__, OmegaConfBaseException):
        return describe(error.__cause__)
    lines = [line.strip() for line in text_lines(str(error)) if line.strip(" ^")]
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(str(error.override))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _explain_missing(error.missing_cfg_file, hydra, lines[0])
    if lines[0].startswith("Ambiguous value for argument"):
        override = lines[0].split("'", 1)[1].rsplit("'", 1)[0]
        key, _, value = override.partition("=")
        return (
            f"{override} holds several values: {several}, write {key}=[{value}] for a list, or "
            f"quote a text with commas: {_quoted(key, value)}"
        )
    if match := re.match(r"Multiple values for (\S+)\.", lines[0]):
        return f"{match[1]} has an option already: leave out the plus sign, {match[1]}=OPTION"
    unknown = re.search(r"Could not (?:override|delete|append)[^']*'([^']+)'", lines[0])
    if unknown:
        return _explain_unknown(unknown[1], hydra, config_name, overrides, error, lines[0])
    cause = error.__cause__
    reason = f" ({describe(cause)})" if isinstance(cause, OmegaConfBaseException) else ""
    if lines[0].endswith(":") and len(lines) > 1:
        reason = f" {lines[1]}"
    return f"command line: {lines[0]}{reason}"


def _explain_unreadable(override: str) -> str:
    """An override that Hydra's grammar does not take: mostly a value that wants quotes."""
    key, sign, value = override.partition("=")
    secret = sign and _SECRET.match(key)
    start = f"cannot read {f'{key}=…' if secret else override!r} on the command line"
    if sign and value.startswith("="):
        return f"{start}: it has two equals signs in a row; overrides are KEY=VALUE"
    reason = _grammar_refuses(override) or "it is not KEY=VALUE"
    if sign and "while evaluating" not in reason and _grammar_refuses(f"{key}={_in_quotes(value)}") is None:
        hint = f"{key}='…'" if secret else _quoted(key, value)
        return f"{start}: {_in_words(reason)}; overrides are KEY=VALUE, with quotes here: {hint}"
    return f"{start}: {_in_words(reason)}; overrides are KEY=VALUE"


def _grammar_refuses(override: str) -> str | None:
    """Why Hydra's grammar cannot read an override, None where it can."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return text_lines(str(error))[0]
    return None


def _in_words(reason: str) -> str:
    """The reason of Hydra's grammar, without its vocabulary."""
    reason = re.sub(r"^\w+ while evaluating '.*?': ", "", reason)
    if reason.startswith("no viable alternative"):
        return "a bracket or a quotation mark stands alone"
    if reason.startswith("missing EQUAL"):
        return "it has no equals sign"
    if "'<EOF>'" in reason:
        return "it breaks off"
    if match := re.search(r"(?:error at:|input) '(.*?)'( expecting .*)?$", reason):
        return f"{match[1][:20]!r} is not expected there"
    return reason


def _in_quotes(value: str) -> str:
    """A value in the quotes of Hydra's grammar."""
    if '"' not in value and not value.endswith("\\"):
        return f'"{value}"'
    escaped = re.sub(r"(\\*)(')", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _quoted(key: str, value: str) -> str:
    """The override as it has to be typed in a shell for its value to be taken as it is."""
    return shlex.quote(f"{key}={_in_quotes(value)}")


def _explain_missing(file: str, hydra: Hydra, line: str) -> str:
    name = file.removesuffix(".yaml")
    # a path may stand where an option is expected; hydra/launcher is a group in a group
    for group, _, option in (name.partition("/"), name.rpartition("/")):
        if group not in ("", "hydra") and hydra.config_loader.get_group_options(group):
            return no_such_option(hydra, group, option)
    return f"configuration file {file} was not found ({line})"


def _explain_unknown(
    given: str, hydra: Hydra, config_name: str, overrides: Sequence[str], error: Exception, line: str
) -> str:
    cause, key = error.__cause__, given.split("@")[0]
    if isinstance(cause, OmegaConfBaseException) and "not in struct" not in str(cause):
        return describe(cause)
    if "@" in given:
        return f"{given}: options have their fixed place here; choose one with {key}=OPTION, without the @"
    if "Could not append" in line:
        return f"{key} is already there: leave out the plus sign, {key}=VALUE"
    roots = {root for root in known_keys() if "." not in root}
    cfg = _composed(hydra, config_name, overrides)
    known = roots.union(known_keys() if cfg is None else _keys(cfg))
    if key in known:  # here; a sweep composes other choices too
        return f"{key}: not every run of this sweep has that key" if "." in key else f"{key}: {line}"
    group, _, leaf = key.partition(".")
    first = leaf.partition(".")[0]
    having = [] if f"{group}.{first}" in known else _options_with(hydra, group, first)
    chosen = None if cfg is None else OmegaConf.select(cfg, f"hydra.runtime.choices.{group}")
    if leaf and having and chosen is not None:
        siblings = sorted(
            n.partition(".")[2] for n in known if n.startswith(f"{group}.") and n.count(".") == 1
        )
        names = ", ".join(having[:5]) + (", …" if len(having) > 5 else "")
        return (
            f"unknown key {key}: {group}={chosen} has {', '.join(siblings)}; {leaf} belongs to "
            f"{group}={names}: choose {'it' if len(having) == 1 else 'one'} too"
        )
    if key in known_keys() and chosen is not None:
        return f"unknown key {key}: {group}={chosen} leaves it out; add it with a plus sign: +{key}=VALUE"
    return unknown_key(key, known)


def _options_with(hydra: Hydra, group: str, leaf: str) -> list[str]:
    """The shipped options of a group whose own file has a key, the plainest first.

    Their text is searched: to read it as YAML would take a second for a group of thirty.
    """
    found = []
    for option in hydra.config_loader.get_group_options(group) if leaf else []:
        file = conf_dir() / group / f"{option}.yaml"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if "@package _global_" in text:
            section = re.search(rf"^{group}:\n((?: .*\n|\n|#.*\n)*)", text, re.MULTILINE)
            text = re.sub("^  ", "", section[1], flags=re.MULTILINE) if section else ""
        if re.search(rf"^{re.escape(leaf)}:", text, re.MULTILINE):
            found.append(option)
    return sorted(found, key=lambda option: (option not in ("pairs", "local"), option))


def _keys(cfg: DictConfig) -> list[str]:
    return [key for root in cfg if root != "hydra" for key in _keys_of(cfg, str(root))]


def _keys_of(tree: DictConfig, name: str, prefix: str = "") -> Iterator[str]:
    """A key of a tree and those of the mapping under it, with dots."""
    yield f"{prefix}{name}"
    node = tree._get_node(name)
    if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
        for leaf in node:
            yield from _keys_of(node, str(leaf), f"{prefix}{name}.")


def _composed(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> DictConfig | None:
    """What the user's choice of groups alone gives; None where that is what Hydra refuses."""
    from hydra.errors import HydraException
    from hydra.types import RunMode

    choices = [o for o in overrides if re.match(r"[\w/]+=[^=,\[({]*$", o) and "." not in o.partition("=")[0]]
    choices = [o for o in choices if hydra.config_loader.get_group_options(o.partition("=")[0])]
    try:
        return hydra.compose_config(config_name, choices, run_mode=RunMode.RUN)
    except HydraException:
        return None
