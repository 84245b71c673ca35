"""The whole model without rcpo around it, as the harness and the judge use it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from rcpo.config import RunConfig
from rcpo.config.model_checks import holds_adapter
from rcpo.hub import Source
from rcpo.models import load_model
from rcpo.start import find_start


def policy_source(config: RunConfig, run_dir: Path, final: Path | None) -> Source:
    """The trained weights of a run in `final`, or without them the model that it would start from."""
    start = find_start(config, run_dir)
    if final is None:
        return start
    return Source(start.base, adapter=final) if holds_adapter(final) else Source(final)


def load_whole(config: RunConfig, source: Source) -> PreTrainedModel:
    """The model in training's precision, its adapter added to its weights."""
    model = load_model(source.base, config, init=source.init)
    if source.adapter is None:
        return model
    from rcpo.models.adapters import merge_adapter

    return merge_adapter(model, source.adapter)
