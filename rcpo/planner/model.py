"""The model that a plan is about, without its weights: parameters, and a policy of a few layers to trace."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rcpo.config.schema import RunConfig
from rcpo.config.validation import nearest
from rcpo.errors import ConfigError
from rcpo.models import hub
from rcpo.models.loading import DTYPES, load_config, model_folder
from rcpo.models.policy import Policy
from rcpo.planner.states import Parameter
from rcpo.planner.trace import LAYERS

ARCHITECTURES = Path(str(resources.files("rcpo") / "assets" / "architectures"))


def architecture(config: RunConfig, wanted: str | None) -> PreTrainedConfig:
    """The model's configuration: of the shipped architecture `wanted`, or of the run's model.

    A preset's numbers are shipped, so that nothing has to be fetched. Raises ConfigError where a model is
    neither a folder nor in the hub's cache, nor shipped.
    """
    if wanted is not None:
        path = Path(wanted).expanduser()
        if path.name == "config.json" and path.is_file():
            return load_config(path.parent, config.model)
        return _shipped(f"plan.architecture={wanted}", wanted)
    if config.model.path is None or hub.own_folder(config.model.path) is not None:
        return load_config(model_folder(config.model), config.model)
    if config.model.name in names():
        return _shipped(f"model={config.model.name}", config.model.name)
    try:
        return load_config(model_folder(config.model), config.model)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or plan with numbers that are shipped: plan.architecture={'|'.join(names())}"
        ) from error


def names() -> list[str]:
    """The architectures whose numbers are shipped."""
    return sorted(path.stem for path in ARCHITECTURES.glob("*.yaml"))


def _shipped(what: str, name: str) -> PreTrainedConfig:
    path = ARCHITECTURES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{what} is neither a shipped architecture nor a config.json; {nearest(name, names())}"
        )
    numbers: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return AutoConfig.for_model(numbers.pop("model_type"), **numbers)


def depth(architecture: PreTrainedConfig) -> int:
    """The model's decoder layers."""
    return int(architecture.get_text_config().num_hidden_layers)


def parameters(architecture: PreTrainedConfig, config: RunConfig) -> list[Parameter]:
    """All parameters, each once."""
    policy = _policy(architecture, config)
    return [Parameter(name, p.numel(), p.requires_grad) for name, p in policy.named_parameters()]


def owned(architecture: PreTrainedConfig, config: RunConfig) -> dict[str, list[str]]:
    """Each module's own parameters by name; the policy itself reads the output head's."""
    policy = _policy(architecture, config)
    first = {id(parameter): name for name, parameter in policy.named_parameters()}
    found = {}
    for name, module in policy.named_modules():
        found[name] = [first[id(p)] for p in module.parameters(recurse=False)]
    head = policy.model.get_output_embeddings()
    found[""] = [first[id(p)] for p in head.parameters()]
    return found


def few_layers(architecture: PreTrainedConfig, config: RunConfig, *, layers: int = LAYERS) -> Policy:
    """A policy of at most `layers` decoder layers, on the meta device, to be traced."""
    cut = copy.deepcopy(architecture)
    text = cut.get_text_config()
    text.num_hidden_layers = min(layers, depth(architecture))
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    policy = _policy(cut, config)
    if config.train.gradient_checkpointing:
        policy.recompute_activations()
    return policy


def _policy(architecture: PreTrainedConfig, config: RunConfig) -> Policy:
    """A policy on the meta device: shapes alone."""
    if config.model.attention is not None:
        architecture._attn_implementation = config.model.attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[config.train.dtype], trust_remote_code=config.model.trust_remote_code
        )
    if config.adapter.name != "none":
        from rcpo.models.adapters import add_adapter  # peft takes two seconds to import

        if config.adapter.quantization is not None:
            raise ConfigError(
                f"adapter.quantization={config.adapter.quantization} is not planned for; a plan with "
                "adapter=lora, whose frozen weights are whole, is an upper bound"
            )
        add_adapter(model, config.adapter, config.seed)
    return Policy(model)
