"""Low-rank adapters of peft on a model of transformers: made, read, switched, merged.

Their layers take the places of the model's own, so the model keeps its class, its head and its forward pass.
Adapters start from B = 0: they then add exactly zero, and the policy is its base.
"""

from __future__ import annotations

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
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from rcpo.config import AdapterConfig, ConfigError

warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # a second one is meant
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's

POLICY, REFERENCE = "default", "reference"
_PREFIX = "base_model.model."  # what peft puts before a model's own names in its files


def add_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int) -> None:
    """Puts new adapters into a model and freezes all else; A from the seed, B = 0."""
    targets: str | list[str] = config.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    torch.manual_seed(seed)
    try:
        model.add_adapter(LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=targets), POLICY)
    except ValueError as error:
        raise ConfigError(f"adapter.target_modules={config.target_modules}: {error}") from error


def read_adapter(model: PreTrainedModel, folder: Path, name: str = POLICY) -> None:
    """Puts the adapter in a folder into a model: `POLICY` is trained, `REFERENCE` stays as it is.

    Raises ConfigError for an adapter that is not of this model, or that switching off would not undo.
    """
    settings = adapter_settings(folder)
    settings.inference_mode = name != POLICY
    try:
        model.add_adapter(settings, name)
    except ValueError as error:
        raise ConfigError(f"the adapter in {folder} does not fit {type(model).__name__}: {error}") from error
    weights = load_peft_weights(str(folder), device="cpu")
    own = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    found: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    wanted = [key for key, _ in model.named_parameters() if f".{name}." in key]
    if found.unexpected_keys or len(own) != len(wanted):
        raise ConfigError(f"the adapter in {folder} is not one of {type(model).__name__}: its layers differ")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    switch(model, POLICY)


def adapter_settings(folder: Path) -> LoraConfig:
    """What a folder says of its adapter; raises ConfigError for another kind than LoRA."""
    settings = PeftConfig.from_pretrained(str(folder))
    if settings.peft_type != PeftType.LORA:
        raise ConfigError(f"the adapter in {folder} is of type {settings.peft_type.value}; rcpo reads LORA")
    more = settings.modules_to_save or settings.trainable_token_indices
    if settings.bias != "none" or more:
        raise ConfigError(
            f"the adapter in {folder} holds more than low-rank weights (bias={settings.bias}, "
            f"modules_to_save={settings.modules_to_save}), which switching off would not undo: merge it "
            "first, adapter.merge=true"
        )
    settings.init_lora_weights = True  # others change the base's weights; these are overwritten anyway
    return settings


def switch(model: PreTrainedModel, name: str | None) -> None:
    """Lets the adapters of this name act, none of them for None; only `POLICY` is left to be trained."""
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
    """The model with the adapter in a folder added to its weights, in their own precision."""
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
