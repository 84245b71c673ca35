"""Low-rank adapters of peft on a model of transformers: made, read, switched, merged.

Their layers take the places of the model's own, so the model keeps its class, its head and its forward pass.
Adapters start from B = 0: they then add exactly zero, and the policy is its base.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from rcpo.config.schema import AdapterConfig
from rcpo.errors import ConfigError
from rcpo.models.hub import check_weights
from rcpo.system import distributed
from rcpo.system.text import first_line, visible

log = logging.getLogger(__name__)

warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # rcpo refuses them
warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # a second one is meant
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's

POLICY, REFERENCE = "default", "reference"
_PREFIX = "base_model.model."  # what peft puts before a model's own names in its files
# How peft starts adapters: the base's weights stay; or they change, in a way that peft can repeat.
_BASE_UNCHANGED = (True, False, "gaussian", "eva")
_BASE_MADE_AGAIN = ("pissa", "olora")


def add_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int) -> None:
    """Put new adapters into a model and freeze all else; A from the seed, B = 0."""
    targets = target_names(model, config.target_modules)
    torch.manual_seed(seed)
    try:
        model.add_adapter(LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=targets), POLICY)
    except ValueError as error:
        raise ConfigError(f"adapter.target_modules={config.target_modules}: {error}") from error


def target_names(model: PreTrainedModel, wanted: list[str]) -> str | list[str]:
    """What peft is to adapt: `all-linear` beside other names is every linear layer but the head, and those.

    Weights of experts that are one tensor are not layers; they stay as they are, with a warning.
    """
    if "all-linear" not in wanted:
        return wanted
    whole = sorted(name for name, p in model.named_parameters() if _dimensions(p) > 2)
    if whole and distributed.is_main():
        log.warning(
            "adapter.target_modules=all-linear leaves out %d tensors of experts, such as %s: they are no "
            "linear layers, and stay frozen",
            len(whole),
            whole[0],
        )
    if wanted == ["all-linear"]:
        return "all-linear"
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, nn.Linear) or "Linear" in type(module).__name__)
    ]
    return [*linear, *(name for name in wanted if name != "all-linear")]


def _dimensions(parameter: Any) -> int:
    """Also of a parameter that ZeRO-3 holds in parts."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def read_adapter(model: PreTrainedModel, folder: Path, name: str = POLICY) -> None:
    """Put the adapter in a folder into a model: `POLICY` is trained, `REFERENCE` stays as it is.

    Raises ConfigError for an adapter that is not of this model, or that switching off would not undo.
    """
    settings = adapter_settings(folder)
    settings.inference_mode = name != POLICY
    own = adapter_weights(folder)
    _take_out_copies(model, folder, own)
    try:
        model.add_adapter(settings, name)
    except ValueError as error:
        raise ConfigError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {_said(error)}"
        ) from error
    wanted = [key for key, _ in model.named_parameters() if name in key.split(".")]
    try:
        found: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    except RuntimeError as error:  # sizes
        raise ConfigError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {_said(error)}"
        ) from error
    if found.unexpected_keys or len(own) != len(wanted):
        raise ConfigError(f"the adapter in {folder} is not one of {type(model).__name__}: its layers differ")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    switch(model, POLICY)


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in an adapter's folder, by names without peft's prefix."""
    weights = load_peft_weights(str(folder), device="cpu")
    return {key.removeprefix(_PREFIX): value for key, value in weights.items()}


def _take_out_copies(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Drop embeddings and heads that peft copies from the base beside their adapters.

    Raises ConfigError where they are not the base's: switching the adapter off would not undo them.
    """
    for key in [key for key in weights if "lora_" not in key]:
        copied = weights.pop(key)
        try:
            original = model.get_parameter(key.replace(".base_layer.", "."))
        except AttributeError:
            original = None
        if original is None or not _equal(original, copied):
            raise ConfigError(
                f"the adapter in {folder} also holds {key}, which is not as in {type(model).__name__}: "
                "switching the adapter off would not undo it; merge it first, adapter.merge=true"
            )


def _equal(parameter: Any, values: torch.Tensor) -> bool:
    """Whether a parameter, or this rank's part of it under ZeRO-3, has these values."""
    if getattr(parameter, "ds_shape", parameter.shape) != values.shape:
        return False
    own, values = parameter.detach(), values.to(parameter.dtype).flatten()
    if hasattr(parameter, "ds_tensor"):
        own = parameter.ds_tensor
        values = values[distributed.rank() * own.numel() :][: own.numel()]
    return torch.equal(own.cpu().flatten()[: len(values)], values)


def adapter_settings(folder: Path) -> LoraConfig:
    """What a folder says of its adapter; raises ConfigError for another kind than LoRA."""
    settings = _read_settings(folder)
    if settings.peft_type != PeftType.LORA:
        raise ConfigError(f"the adapter in {folder} is of type {settings.peft_type.value}; rcpo reads LORA")
    more = settings.modules_to_save or settings.trainable_token_indices
    if settings.bias != "none" or more:
        raise ConfigError(
            f"the adapter in {folder} holds more than low-rank weights (bias={settings.bias}, "
            f"modules_to_save={settings.modules_to_save}), which switching off would not undo: merge it "
            "first, adapter.merge=true"
        )
    if settings.init_lora_weights not in _BASE_UNCHANGED:
        raise ConfigError(
            f"the adapter in {folder} (init_lora_weights={settings.init_lora_weights}) is one of a base "
            "whose weights its initialisation changed, which switching off would not undo: merge it first, "
            "adapter.merge=true"
        )
    settings.init_lora_weights = True  # overwritten by what is read
    return settings


def _read_settings(folder: Path) -> Any:
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"the adapter in {folder} cannot be read: {first_line(error)}") from error
    if settings.peft_type is None:
        raise ConfigError(f"the adapter in {folder} cannot be read: its adapter_config.json has no peft_type")
    return settings


def _said(error: Exception) -> str:
    """What an error says, in one line."""
    return visible(" ".join(str(error).split()), lines=False)[:300]


def switch(model: PreTrainedModel, name: str | None) -> None:
    """Let the adapters of this name act, none of them for None; only `POLICY` is left to be trained."""
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        module.enable_adapters(name is not None)
        if name is not None:
            module.set_adapter(name, inference_mode=name != POLICY)


@contextmanager
def starting_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is what training started from: its copy of that adapter, or no adapter, acts."""
    switch(model, REFERENCE if REFERENCE in model.peft_config else None)
    try:
        yield
    finally:
        switch(model, POLICY)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter in a folder added to its weights, in their own precision.

    Raises ConfigError where the base that the adapter was trained on cannot be made again, and for an adapter
    of another model, of which peft would merge what fits.
    """
    settings = _read_settings(folder)
    init = getattr(settings, "init_lora_weights", True)
    if init not in _BASE_UNCHANGED and init not in _BASE_MADE_AGAIN:
        raise ConfigError(
            f"the adapter in {folder} (init_lora_weights={init}) is one of a base that was changed first; "
            "convert it to plain LoRA: save_pretrained(…, path_initial_model_for_weight_conversion=…) of peft"
        )
    if model.config.tie_word_embeddings and _adapts_tied(model, folder):
        _untie(model)
    name, base = type(model).__name__, {key for key, _ in model.named_parameters(remove_duplicate=False)}
    check_weights("the adapter", folder, pickle=True)
    try:
        own = set(adapter_weights(folder))
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise ConfigError(f"the adapter in {folder} does not fit {name}: {_said(error)}") from error
    wanted = {
        key.removeprefix(_PREFIX) for key in get_peft_model_state_dict(adapted, save_embedding_layers=False)
    }
    others = {key for key in own - wanted if key.replace(".base_layer.", ".") not in base}  # peft copies some
    if differing := others | (wanted - own):
        raise ConfigError(
            f"the adapter in {folder} is not one of {name}: its layers differ ({min(differing)}); give the "
            "base model that it was trained on"
        )
    return adapted.merge_and_unload()


def _adapts_tied(model: PreTrainedModel, folder: Path) -> bool:
    """Whether an adapter acts on one use alone of a matrix that the embedding and the head share."""
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in tied]
    return any(key.startswith(f"{name}.") for key in adapter_weights(folder) for name in names)


def _untie(model: PreTrainedModel) -> None:
    """Give the head a matrix of its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def loses_by_transformers(model: PreTrainedModel) -> bool:
    """Whether transformers would make another model of the adapters: it drops DoRA's magnitudes."""
    return any(settings.use_dora for settings in model.peft_config.values())
