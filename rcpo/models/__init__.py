"""Language models of transformers: loaded from a folder, and scored as a policy."""

from rcpo.models.loading import (
    DTYPES,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    refuse_other_weights,
    refuse_quantized,
)
from rcpo.models.policy import Policy, head_shape, policy_inputs

__all__ = [
    "DTYPES",
    "Policy",
    "head_shape",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "policy_inputs",
    "refuse_other_weights",
    "refuse_quantized",
]
