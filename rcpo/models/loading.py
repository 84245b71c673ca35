"""From a folder in the hub's format to a tokenizer, a configuration, a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from rcpo.config.schema import ModelConfig
from rcpo.errors import ConfigError
from rcpo.models import hub
from rcpo.models.hub import ModelSource
from rcpo.system import distributed
from rcpo.system.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    except Exception as error:  # the tokenizers library raises plain ones
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {_reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_config(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    """The configuration in a model's folder, with the attention that is asked for."""
    found = read_config(folder, config)
    if config.attention is not None:
        found._attn_implementation = config.attention
    return found


def read_config(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    """The configuration in a model's folder as it is; raises ConfigError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a value of a wrong type may raise anything
        hint = "; if you trust it: model.trust_remote_code=true" if _wants_code(error) else ""
        raise ConfigError(f"the model in {folder} cannot be read: {_reason(error)}{hint}") from error


def _reason(error: Exception) -> str:
    """What an error says, behind its name where it quotes a value or a key alone."""
    said = first_line(error).rstrip(":")
    named = isinstance(error, LookupError | AttributeError | TypeError | ArithmeticError)
    return f"{type(error).__name__}: {said}" if named else said


def refuse_quantized(folder: Path, config: ModelConfig) -> None:
    """Raise ConfigError where the weights, all of which are to be trained, are quantised in their file."""
    settings = getattr(load_config(folder, config), "quantization_config", None)
    if settings is None:
        return
    kind = settings if isinstance(settings, dict) else settings.to_dict()
    raise ConfigError(
        f"the weights in {folder} are quantised ({kind.get('quant_method')}), and cannot be trained: train "
        "adapters on them, adapter=lora, or start from the model that they were made of"
    )


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: str = "fp32",
    *,
    init: str = "pretrained",
    seed: int = 0,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder, with every dropout off, so that a policy equals itself.

    `dtype` is one of `DTYPES`. `init` is `pretrained`, or `random` for fresh weights from the seed in the
    folder's architecture. With `quantization` nf4 the weights of all linear layers but the head are held in
    4 bits. Raises ConfigError for weights that are missing, not of this model or not to be read, and for a
    model that is not known.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import, and reading data needs no model

    architecture, numbers = load_config(folder, config), DTYPES[dtype]
    _turn_off_dropout(architecture)
    try:
        if init == "pretrained":
            hub.check_weights("the model", folder, pickle=config.allow_pickle)
            bits = {} if quantization is None else _in_four_bits(quantization, numbers)
            model = _read(folder, architecture, config, bits | {"dtype": numbers})
        else:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=numbers, trust_remote_code=config.trust_remote_code
            )
    except ConfigError:
        raise
    except Exception as error:  # of transformers, safetensors, torch, or a repository's own code
        raise ConfigError(f"the model in {folder} cannot be loaded: {_reason(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else, in evaluation mode, bitsandbytes packs the weights for good for a kernel of CPUs that
            # rounds to bf16 and has no gradient
            module.support_avx512bf16_for_cpu = False
    return model


def load_whole(source: ModelSource, config: ModelConfig, dtype: str, seed: int) -> PreTrainedModel:
    """A model with its adapter added to its weights; raises ConfigError as `load_model` does."""
    model = load_model(source.base, config, dtype, init=source.init, seed=seed)
    if source.adapter is None:
        return model
    from rcpo.models.adapters import merge_adapter  # peft takes seconds to import

    return merge_adapter(model, source.adapter)


def refuse_other_weights(folder: Path, config: ModelConfig) -> None:
    """Raise ConfigError where weights in a folder are not those of its model, from names and shapes alone.

    For ZeRO-3, under which transformers does not look at weights that the model has no place for.
    """
    hub.check_weights("the model", folder, pickle=config.allow_pickle)
    _read(folder, load_config(folder, config), config, {"device_map": "meta"})


def _read(
    folder: Path, architecture: PreTrainedConfig, config: ModelConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, report = _reported(AutoModelForCausalLM, folder, architecture, config, settings)
    _refuse_differences(folder, type(model).__name__, report, "a whole causal language model")
    return model


def read_classifier(
    folder: Path, architecture: PreTrainedConfig, config: ModelConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    """The sequence-classification model in a folder; raises ConfigError where it is none or lacks weights.

    Weights that it has no place for, such as the head of a language model, are left out.
    """
    from transformers import AutoModelForSequenceClassification

    hub.check_weights("the model", folder, pickle=config.allow_pickle)
    try:
        model, report = _reported(AutoModelForSequenceClassification, folder, architecture, config, settings)
    except Exception as error:  # of transformers, safetensors, torch, or a repository's own code
        raise ConfigError(f"the model in {folder} cannot be loaded: {_reason(error)}") from error
    whole = report | {"unexpected_keys": []} if not report["missing_keys"] else report
    _refuse_differences(folder, type(model).__name__, whole, "a whole sequence-classification model")
    return model


def _reported(
    kind: Any,
    folder: Path,
    architecture: PreTrainedConfig,
    config: ModelConfig,
    settings: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and how its weights differ from those of its folder."""
    with _quiet():  # transformers' own report is a table
        model, report = kind.from_pretrained(
            folder,
            config=architecture,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            ignore_mismatched_sizes=True,  # reported, for the caller to refuse
            output_loading_info=True,
            **settings,
        )
    return model, report


def _refuse_differences(folder: Path, architecture: str, report: dict[str, Any], wanted: str) -> None:
    """Raise ConfigError where a file's weights are not those of the model: missing ones would be random."""
    of_other_sizes = sorted(report["mismatched_keys"])
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if of_other_sizes:
        name, found, wanted = of_other_sizes[0]
        problem = f"{name} has the shape {list(found)} where {architecture} has {list(wanted)}"
        count = len(of_other_sizes)
    elif missing:
        problem, count = f"{architecture} needs {missing[0]}, which is not there", len(missing)
        prefix = next((u[: -len(m)] for m in missing for u in unexpected if u.endswith(m)), None)
        if prefix:
            problem += f"; names in the file begin with {prefix!r}: save the model without what wraps it"
    elif unexpected:
        problem = f"{unexpected[0]} has no place in {architecture}, and would be lost"
        count = len(unexpected)
    else:
        return
    more = f" ({count} such weights)" if count > 1 else ""
    raise ConfigError(
        f"the weights in {folder} are not those that config.json describes: {problem}{more}; give {wanted}, "
        "as save_pretrained writes it"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _in_four_bits(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": distributed.device()}}


def _turn_off_dropout(config: PreTrainedConfig) -> None:
    """Before the model is made, whose attention keeps a copy of its rate; parts of it have their own."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _turn_off_dropout(part)


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)
