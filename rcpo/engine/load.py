"""What a run starts from, and the policy that is made of it: base model, adapters, ZeRO-3's partitions."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rcpo.config.model import holds_adapter
from rcpo.config.schema import RunConfig
from rcpo.engine.backend import exact_ranges
from rcpo.engine.settings import deepspeed_config
from rcpo.models import hub
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_model, load_tokenizer, load_whole, model_folder, refuse_other_weights
from rcpo.models.policy import Policy
from rcpo.runs.folder import START
from rcpo.system import distributed
from rcpo.system.files import put_in_place


def find_start(config: RunConfig, run_dir: Path) -> ModelSource:
    """The model that training starts from. Collective.

    With `adapter.merge` it is written to the run's folder first: the new adapters need their base on disk.
    """
    base, adapter = model_folder(config.model), config.adapter
    if adapter.name == "none" or adapter.path is None:
        return ModelSource(base, config.model.init)
    given = hub.folder("adapter.path", adapter.path)
    if not adapter.merge:
        return ModelSource(base, adapter=given)
    target = run_dir / START
    if distributed.is_main() and not target.is_dir():
        scratch = run_dir / f".{START}.new"
        shutil.rmtree(scratch, ignore_errors=True)
        write_merged(ModelSource(base, adapter=given), scratch, config)
        honour_umask(scratch)
        put_in_place(scratch, target)
    distributed.barrier()
    return ModelSource(target)


def reference_source(config: RunConfig) -> ModelSource | None:
    """The model of `reference.path`, or the adapter there on its base; None where none is named."""
    if config.reference.path is None:
        return None
    return hub.source("reference.path", config.reference.path, hub.folder)


def load_policy(config: RunConfig, start: ModelSource, final: Path | None = None) -> Policy:
    """The policy to be trained from `start`, or what training made of it in `final`. Collective.

    Where adapters are trained, they are all that is; the policy then can act as `start` again
    (`starting_policy`), for which it keeps a copy of an adapter that it started from, if anyone will ask.
    """
    if final is not None:
        source = ModelSource(start.base, adapter=final) if holds_adapter(final) else ModelSource(final)
    else:
        source = start
    model = read_model(source, config)
    if config.adapter.name == "none":
        return Policy(model)
    from rcpo.models import adapters

    if source.adapter is None:
        adapters.add_adapter(model, config.adapter, config.seed)
    if start.adapter is not None and recalls_start(config, final):
        adapters.read_adapter(model, start.adapter, adapters.REFERENCE)
    name = config.model.path
    on_hub = name is not None and hub.own_folder(name) is None and not config.adapter.merge
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = name if on_hub else str(start.base.resolve())
        settings.revision = config.model.revision if on_hub else None
        settings.task_type = settings.task_type or "CAUSAL_LM"  # peft's AutoPeftModelForCausalLM wants it
    return Policy(model)


def recalls_start(config: RunConfig, final: Path | None) -> bool:
    """Whether a policy of adapters is asked, after its first step, what it said at its start."""
    own = config.reference.path is None and config.adapter.name != "none"
    return own and (final is not None or config.reference.mode == "model")


def read_model(source: ModelSource, config: RunConfig) -> PreTrainedModel:
    """A model with its adapter; under ZeRO-3 each layer is split over the ranks as it is read. Collective.

    No rank then holds the whole model. Fresh weights are made whole on each.
    """
    load = partial(
        load_model,
        source.base,
        config.model,
        config.train.dtype,
        init=source.init,
        seed=config.seed,
        quantization=config.adapter.quantization,
    )
    if config.engine.stage != 3 or source.init == "random":
        model = load()
    else:
        refuse_other_weights(source.base, config.model)
        # kept here, as transformers refers to it weakly
        alive = HfDeepSpeedConfig(deepspeed_config(config, training=False))
        try:
            with exact_ranges():
                model = load()
        finally:
            unset_hf_deepspeed_config()
            del alive
    if source.adapter is not None:
        from rcpo.models.adapters import read_adapter

        read_adapter(model, source.adapter)
    return model


def honour_umask(folder: Path) -> None:
    """Give the files in a folder the mode of any new file; safetensors makes its own private ones."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_merged(source: ModelSource, target: Path, config: RunConfig) -> None:
    """Write a model with its adapter added to its weights, in training's precision, and its tokenizer."""
    load_whole(source, config.model, config.train.dtype, config.seed).save_pretrained(target)
    load_tokenizer(source.tokenizer, config.model).save_pretrained(target)


def policy_source(config: RunConfig, run_dir: Path, final: Path | None) -> ModelSource:
    """The trained weights of a run in `final`, or without them the model that it would start from."""
    start = find_start(config, run_dir)
    if final is None:
        return start
    return ModelSource(start.base, adapter=final) if holds_adapter(final) else ModelSource(final)
