"""What the configuration says of models and adapters, checked as far as this machine's folders tell."""

from __future__ import annotations

import re
from pathlib import Path

from rcpo.config.paths import is_file, readable_folder
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError


def check_models(config: RunConfig) -> None:
    """Raise ConfigError for a source that is not a model or an adapter, and for what adapters rule out."""
    if config.model.name != "tiny" and config.model.path is None:
        raise ConfigError(
            f"model={config.model.name} needs model.path: a folder in the hub's format, or a name on the hub"
        )
    for key, source in (
        ("model.path", config.model.path),
        ("adapter.path", config.adapter.path),
        ("reference.path", config.reference.path),
    ):
        if source is None:
            continue
        folder = readable_folder(key, source)
        if folder is not None:
            check_folder(key, folder)
        elif is_file(key, source):
            raise ConfigError(f"{key}={source} is a file; give the folder that holds it")
        elif not is_hub_name(source):
            raise ConfigError(f"{key}={source} is not a folder, and cannot be a name on the hub (owner/name)")
    _check_adapter(config)


def _check_adapter(config: RunConfig) -> None:
    adapter, stage = config.adapter, config.engine.stage
    if adapter.quantization is not None and adapter.name == "none":
        raise ConfigError(
            f"adapter.quantization={adapter.quantization}: weights in 4 bits cannot be trained; choose "
            "adapter=qlora"
        )
    if adapter.quantization is not None and stage == 3:
        raise ConfigError(
            f"adapter.quantization={adapter.quantization} with engine.stage=3: ZeRO-3 cannot split 4-bit "
            "weights; use engine=zero2 (each process holds them whole), or adapter=lora"
        )
    if adapter.merge and adapter.path is None:
        raise ConfigError("adapter.merge=true has nothing to merge; give the adapter: adapter.path=DIR")
    if adapter.name != "none" and config.model.init == "random":
        raise ConfigError(
            "model.init=random with an adapter would freeze random weights; use adapter=none or "
            "model.init=pretrained"
        )


def is_hub_name(source: str) -> bool:
    """Whether a text can be a repository's name on the hub: `owner/name` or `name`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any(any(folder.glob(name)) for name in ("model*.safetensors*", "pytorch_model*.bin*"))


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft, and no weights of a model; its config.json may be there."""
    return (folder / "adapter_config.json").is_file() and not holds_weights(folder)


def check_folder(key: str, folder: Path) -> None:
    """Raise ConfigError where a folder does not hold what its key is for; a reference may be either."""
    model = (folder / "config.json").is_file()
    if key == "adapter.path":
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{key}={folder} holds no adapter_config.json; give an adapter as peft saves it"
            )
    elif holds_adapter(folder):
        if key == "model.path":
            raise ConfigError(
                f"{key}={folder} holds an adapter, not a model: give its base model as {key}, and "
                f"adapter=lora adapter.path={folder}"
            )
    elif (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}={folder} holds a whole model and an adapter, which transformers would add to it; move "
            "adapter_config.json away if it is merged already, or the model's weights if it is not"
        )
    elif not model:
        raise ConfigError(
            f"{key}={folder} holds no config.json; give a model folder as save_pretrained writes it"
        )
