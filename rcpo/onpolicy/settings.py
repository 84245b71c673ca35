"""What a folder of on-policy pairs was made with: `sample.yaml`, which ranks and jobs read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rcpo.config.onpolicy import OnPolicyConfig, as_tree, onpolicy_config
from rcpo.config.parsing import parse, read_tree, to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.system.files import replace_text

SETTINGS_FILE = "sample.yaml"


def dated(config: RunConfig, path: Path) -> None:
    """Set the day that a template writes, where none is given: that on which the work in a folder began.

    `path` is the file that it left there, which holds its configuration.
    """
    if config.data.date is None:
        known = OmegaConf.select(read_tree(path), "config.data.date") if path.exists() else None
        config.data.date = known or date.today().isoformat()


@dataclass(frozen=True)
class Settings:
    """A run's configuration (model, data, judge, launch), the nodes beside it, and who answers.

    `run` is the run whose trained weights answer; None: the model that the configuration names.
    """

    config: RunConfig
    nodes: OnPolicyConfig
    run: Path | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        run = None if self.run is None else str(self.run)
        tree = {"run": run, **as_tree(self.nodes), "config": to_container(self.config)}
        replace_text(folder / SETTINGS_FILE, OmegaConf.to_yaml(OmegaConf.create(tree)))

    @staticmethod
    def read(folder: Path) -> Settings:
        """Raise ConfigError for what cannot be used."""
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: {folder} is not a folder of `rcpo sample`")
        tree = read_tree(path)
        inner = tree.config
        assert isinstance(inner, DictConfig)
        config = parse(inner)
        return Settings(config, onpolicy_config(tree, config), None if tree.run is None else Path(tree.run))
