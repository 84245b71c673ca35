"""What is refused before a folder is made or a weight read, and needs torch or the objectives to be seen."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rcpo.config.model import check_folder
from rcpo.config.schema import BITSANDBYTES, RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.ranks import is_first
from rcpo.models import hub
from rcpo.runs.backends import check_installed
from rcpo.system.modules import search_working_folder


def check(config: RunConfig, world_size: int) -> None:
    """Refuse, before a folder is made or a weight read, what needs torch and the objectives to be seen.

    Raises ConfigError for a batch that does not divide, an objective or hyper-parameter that does not exist,
    calibration without a loser, and a precision or a number of processes that the machine does not have.
    """
    check_run(config, world_size)
    _check_installed(config)
    import torch

    _check_accelerator(torch.cuda.is_available())
    if config.train.dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "train.dtype=fp16 needs a GPU: DeepSpeed refuses it on a CPU, whose fp16 kernels are partial and "
            "slow; choose train.dtype=fp32 or bf16"
        )
    if 0 < torch.cuda.device_count() < config.launch.processes:
        raise ConfigError(
            f"launch.processes={config.launch.processes} is more than this machine's "
            f"{torch.cuda.device_count()} GPU(s), and a process needs one for itself"
        )


def _check_accelerator(gpu: bool) -> None:
    """DeepSpeed lets the environment choose; raises ConfigError where it is not what torch computes on."""
    given, wanted = os.environ.get("DS_ACCELERATOR"), "cuda" if gpu else "cpu"
    if given == "":
        del os.environ["DS_ACCELERATOR"]
    elif given not in (None, wanted):
        sees = "a GPU" if gpu else "no GPU"
        raise ConfigError(
            f"the environment has DS_ACCELERATOR={given}, and torch sees {sees}: unset DS_ACCELERATOR"
            + (', or hide the GPU: CUDA_VISIBLE_DEVICES=""' if gpu else "")
        )


def check_run(config: RunConfig, world_size: int, *, models: bool = True) -> None:
    """The part of `check` that is the same on every machine; `models` fetches and looks at them."""
    config.train.accumulation(world_size)
    _check_objective(config)
    if models:
        _fetch_models(config)


def _fetch_models(config: RunConfig) -> None:
    """Download what the run needs of the hub, so that no rank has to, and look at the folders."""
    model = config.model
    if not is_first():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # rank 0 shows them

    def fetch(key: str, source: str) -> Path:
        revision = model.revision if key == "model.path" else None
        folder = hub.fetch(key, source, revision, pickle=model.allow_pickle, code=model.trust_remote_code)
        check_folder(key, folder)
        if key != "model.path" or model.init == "pretrained":
            hub.check_weights(key, folder, pickle=model.allow_pickle)
        return folder

    for key, source in (("model.path", model.path), ("adapter.path", config.adapter.path)):
        if source is not None:
            fetch(key, source)
    if config.reference.path is not None:
        hub.source("reference.path", config.reference.path, fetch)


def _check_installed(config: RunConfig) -> None:
    """Packages of extras that the configuration needs."""
    check_installed(config)
    wanted = []
    if config.adapter.quantization is not None:
        wanted.append(("adapter.quantization", "bitsandbytes", "rcpo[qlora]"))
    if config.optim.name in BITSANDBYTES:
        wanted.append((f"optim={config.optim.name}", "bitsandbytes", "rcpo[qlora]"))
    if config.model.attention == "flash_attention_2":
        wanted.append(("model.attention=flash_attention_2", "flash_attn", "flash-attn"))
    if config.model.attention == "flex_attention":
        import torch  # takes seconds, which only this kind of attention costs

        if not torch.cuda.is_available():
            raise ConfigError(
                "model.attention=flex_attention is compiled for GPUs, and torch sees none here; use "
                "model.attention=sdpa, or null"
            )
    for key, module, package in wanted:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{key} needs {module}, which is not installed: pip install '{package}'")


def _check_objective(config: RunConfig) -> None:
    from rcpo.training.objective import build_objective

    wanted = config.objective
    if wanted.module is not None:
        search_working_folder()
        if importlib.util.find_spec(wanted.module.partition(".")[0]) is None:
            raise ConfigError(
                f"objective.module={wanted.module} is not installed and not in {os.getcwd()}; "
                "install it or add its folder to PYTHONPATH"
            )
    build_objective(config)
