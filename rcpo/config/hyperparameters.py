"""Hyper-parameters of rcpo's own objectives: meaning and range. Those of a user's objective are unchecked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcpo.config.fields import Key
from rcpo.config.schema import REDUCTIONS
from rcpo.errors import ConfigError

HYPERPARAMETERS = {
    "beta": Key(doc="strength of the reference, or the slope of the loss", above=0),
    "tau": Key(doc="strength of IPO's regularization: the target margin is 1/(2τ)", above=0),
    "gamma": Key(doc="target margin", at_least=0),
    "epsilon": Key(doc="label smoothing: the share of labels taken to be wrong", at_least=0, below=0.5),
    "alpha": Key(doc="exponent of AlphaPO's reward; towards 0 it becomes SimPO's", above=0),
    "lambda_nll": Key(doc="weight of the chosen (tpo: gold) response's negative log-likelihood", at_least=0),
    "lambda_penalty": Key(doc="weight of the penalty on a chosen response that falls", at_least=0),
    "lambda_chosen": Key(doc="weight of the loss of chosen responses", above=0),
    "lambda_rejected": Key(doc="weight of the loss of rejected responses", above=0),
    "lambda_mix": Key(
        doc="share of the policy in the mixture that bounds the rejected response", above=0, below=1
    ),
    "shift_start": Key(doc="weight of the rejected response's log-ratio at the first step", at_least=0),
    "shift_end": Key(doc="weight of the rejected response's log-ratio at the last step", at_least=0),
    "score_scale": Key(doc="factor on the difference of a pair's scores", above=0),
    "divergence": Key(
        doc="divergence from the reference (f-DPO)", choices=("reverse_kl", "forward_kl", "js", "alpha")
    ),
    "divergence_alpha": Key(
        doc="α of divergence=alpha: towards 0 the reverse KL, at 1 the forward KL", above=0, at_most=1
    ),
    "parts": Key(doc="objectives of a mixture: [{name: dpo, weight: 0.8, beta: 0.1}, …]"),
}
_WEIGHT = Key(doc="weight of a part", above=0)
_NLL_COEF = Key(doc="adds −coef · mean log-prob of the chosen response", at_least=0)


def check_hyperparameters(node: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a hyper-parameter, or a setting of a mixture's part, that is not allowed."""
    for name, value in settings.items():
        found, place = HYPERPARAMETERS.get(name), f"{node}.{name}"
        if found is None:
            continue
        if name == "parts":
            _check_parts(place, value)
        elif found.choices:
            found.check(place, value)
        else:
            found.check_number(place, value)


def _check_parts(place: str, parts: Any) -> None:
    form = "a list of {name: OBJECTIVE, weight: NUMBER} with the objective's own settings beside them"
    if not isinstance(parts, list) or not parts:
        raise ConfigError(f"{place}={parts} is not {form}")
    for number, part in enumerate(parts):
        node = f"{place}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("name"), str):
            raise ConfigError(f"{node}={part} is not a part of {form}")
        _WEIGHT.check_number(f"{node}.weight", part.get("weight", 1.0))
        Key(doc="", choices=REDUCTIONS).check(f"{node}.reduction", part.get("reduction"))
        _NLL_COEF.check_number(f"{node}.nll_coef", part.get("nll_coef", 0.0))
        check_hyperparameters(node, part)
