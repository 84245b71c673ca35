"""From a folder in the hub's format to a tokenizer, a configuration, a model in memory."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from rcpo import distributed, hub
from rcpo.config import ConfigError, ModelConfig, RunConfig
from rcpo.visible import first_line

disable_progress_bar()  # the weights load in a second, on every rank
# imported by peft, it says on every CPU that a kernel of another package is not there
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_folder(config: ModelConfig) -> Path:
    """The folder of the configured model: the user's, a snapshot in the hub's cache, or the packaged one."""
    if config.path is None:
        return Path(str(resources.files("rcpo") / "assets" / "tiny"))
    return hub.folder("model.path", config.path, config.revision)


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Where it has no padding token, the end-of-sequence token pads.

    Padding is masked everywhere, so which token pads changes no number, and the vocabulary stays as it is.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_config(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    """The configuration in a model's folder, with the attention that is asked for."""
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        hint = "; if you trust it: model.trust_remote_code=true" if _wants_code(error) else ""
        raise ConfigError(f"the model in {folder} cannot be read: {first_line(error)}{hint}") from error
    if config.attention is not None:
        found._attn_implementation = config.attention
    return found


def load_model(
    folder: Path, config: RunConfig, *, init: str = "pretrained", quantization: str | None = None
) -> PreTrainedModel:
    """The causal language model in a folder, with every dropout off, so that a policy equals itself.

    `init` is `pretrained`, or `random` for fresh weights from the run's seed in the folder's architecture.
    With `quantization` nf4 the weights of all linear layers but the head are held in 4 bits.
    Raises ConfigError for weights that are missing or not to be read, and a model that is not known.
    """
    settings = config.model
    pretrained = init == "pretrained"
    if pretrained:
        hub.check_weights("the model", folder, pickle=settings.allow_pickle)
    architecture = load_config(folder, settings)
    _turn_off_dropout(architecture)
    dtype = DTYPES[config.train.dtype]
    try:
        if pretrained:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=architecture,
                dtype=dtype,
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=None if settings.allow_pickle else True,
                **({} if quantization is None else _in_four_bits(quantization, dtype)),
            )
        else:
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else, in evaluation mode, bitsandbytes packs the weights for good for a kernel of CPUs that
            # rounds to bf16 and has no gradient
            module.support_avx512bf16_for_cpu = False
    return model


def _in_four_bits(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": distributed.device()}}


def _turn_off_dropout(config: PreTrainedConfig) -> None:
    """Before the model is made: attention keeps a copy of its rate."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)
