"""Hydra's compositions for tests, which make thousands: what rcpo's own options give is made once.

Hydra reads the files, the defaults list, and the options anew for each composition, a fifth of a second.
All three depend on the chosen options alone, so a test that changes values gets a copy of one merged tree,
into which Hydra puts the values. Hydra alone composes what comes from other folders or from its
configuration store, and refuses what it refuses.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.object_type import ObjectType

from rcpo.config.paths import conf_dir

SHIPPED = conf_dir()
_HYDRAS = ("pkg://hydra.conf", "structured://")  # where Hydra's own options come from
# where Hydra's functions are, before anything is kept
PLAIN = [
    (ConfigRepository, "load_config", ConfigRepository.load_config),
    (defaults_list, "_create_interpolation_map", defaults_list._create_interpolation_map),
    (config_loader_impl, "create_defaults_list", config_loader_impl.create_defaults_list),
    (
        ConfigLoaderImpl,
        "_compose_config_from_defaults_list",
        ConfigLoaderImpl._compose_config_from_defaults_list,
    ),
]


def keep(patch: pytest.MonkeyPatch) -> None:
    """From here on, Hydra keeps what it reads, lists, and merges of the shipped options."""
    kept = (_read_once, _mapped_where_read, _listed_once, _merged_once)
    for (owner, name, _), once in zip(PLAIN, kept, strict=True):
        patch.setattr(owner, name, once(getattr(owner, name)))


def _is_shipped(repo: Any, config_name: str | None) -> bool:
    """Whether these are rcpo's options and Hydra's own, and no others."""
    places = [f"{source.scheme()}://{source.path}" for source in repo.get_sources()]
    return (
        config_name is not None
        and set(places) <= {*_HYDRAS, f"file://{SHIPPED}"}
        and (SHIPPED / f"{config_name}.yaml").is_file()
    )


def _read_once(read: Any) -> Any:
    kept: dict[str, bytes] = {}  # a copy by pickle takes a quarter of one by deepcopy

    def load_config(repo: ConfigRepository, config_path: str) -> Any:
        source = repo._find_object_source(config_path, ObjectType.CONFIG)
        hydras = source is not None and source.scheme() != "file" and config_path.startswith("hydra/")
        if source is None or not (hydras or source.path == str(SHIPPED)):
            return read(repo, config_path)
        if config_path not in kept:
            kept[config_path] = pickle.dumps(read(repo, config_path))
        return pickle.loads(kept[config_path])

    return load_config


def _mapped_where_read(map_choices: Any) -> Any:
    """The choices that a defaults list's interpolations read; most lists have none."""

    def create_interpolation_map(overrides: Any, defaults_list: Sequence[Any], self_added: bool) -> Any:
        if any(each.is_interpolation() for each in defaults_list):
            return map_choices(overrides, defaults_list, self_added)
        return None

    return create_interpolation_map


def _listed_once(create: Any) -> Any:
    kept: dict[Any, DefaultsList] = {}

    def create_defaults_list(
        repo: Any,
        config_name: str | None,
        overrides_list: Sequence[Any],
        prepend_hydra: bool,
        skip_missing: bool,
    ) -> DefaultsList:
        arguments = {"prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
        if not _is_shipped(repo, config_name):
            return create(repo, config_name, overrides_list, **arguments)
        values, choices = [], []
        for each in overrides_list:
            if not each.is_sweep_override():
                chooses = not isinstance(each.value(), dict) and repo.group_exists(each.key_or_group)
                (choices if chooses else values).append(each)
        key = (config_name, prepend_hydra, skip_missing, *(each.input_line for each in choices))
        if key not in kept:
            kept[key] = create(repo, config_name, choices, **arguments)
        made = kept[key]
        return DefaultsList(made.defaults, made.defaults_tree, values, made.overrides)

    return create_defaults_list


def _merged_once(compose: Any) -> Any:
    kept: dict[str, bytes] = {}

    def merge(loader: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> Any:
        names = [each.config_path for each in defaults if each.primary]
        if not _is_shipped(repo, names[-1] if names else None):
            return compose(loader, defaults=defaults, repo=repo)
        key = repr(list(defaults))
        if key not in kept:
            kept[key] = pickle.dumps(compose(loader, defaults=defaults, repo=repo))
        return pickle.loads(kept[key])

    return merge
