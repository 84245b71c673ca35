"""`rcpo plan`: a configuration's memory, communication and time before anything is loaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from rcpo.commands.compose import Call, command
from rcpo.config.composition import user_part
from rcpo.config.parsing import parse
from rcpo.config.refusals import refusals_explained
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE, FAILED
from rcpo.planner.settings import plan_config

if TYPE_CHECKING:
    from rcpo.planner.plan import Plan, Planner


def plan(arguments: Sequence[str]) -> int:
    """`rcpo plan ARGUMENTS`: prints the plan; returns 0, or 1 where it does not fit the chosen GPU.

    With -m, one line for each combination of values; then 1 where nothing near one of them fits. Raises
    ConfigError for what is refused, and where the numbers do not say enough.
    """
    with command(arguments, nodes=("plan", "gpu")) as call:
        if call.shown:
            return DONE
        if call.flags.multirun:
            return _many(call)
        cfg = call.compose()
    from rcpo.planner.advice import nearest
    from rcpo.planner.show import show

    planner, found = _plan(cfg, {})
    advice = None if found.fits else nearest(planner, found)
    show(found, advice, Console(width=None if sys.stdout.isatty() else 110))
    return DONE if found.fits else FAILED


def _plan(cfg: DictConfig, planners: dict[str, Planner]) -> tuple[Planner, Plan]:
    """The plan of a composed configuration; `planners` keeps those of other ones."""
    from rcpo.planner.plan import Planner

    config = parse(user_part(cfg))
    settings, gpu = plan_config(cfg)
    ranks = settings.gpus or config.launch.processes
    config.train.micro_batch_size = config.train.microbatch(ranks)  # so that advice can halve it
    # what a planner keeps holds for any number of GPUs and any engine
    key = repr((dataclasses.replace(settings, gpus=None), gpu, config.model, config.data, config.objective))
    planner = planners.setdefault(key, Planner(settings, gpu))
    return planner, planner.plan(config, ranks)


def _many(call: Call) -> int:
    """A table of plans; of one that does not fit, the nearest that does."""
    from rcpo.planner.advice import nearest
    from rcpo.planner.show import PlanLine, lines

    planners: dict[str, Planner] = {}
    rows: list[PlanLine] = []
    for values, chosen in _combinations(call):
        planner, found = _plan(call.compose(chosen), planners)
        if found.gpu is None:
            raise ConfigError("rcpo plan -m compares plans for a GPU: add gpu=h100-80gb, for example")
        rows.append(PlanLine(values, found, None if found.fits else nearest(planner, found)))
    print("\n".join(lines(rows)))
    return DONE if all(row.plan.fits or row.advice is not None for row in rows) else FAILED


def _combinations(call: Call) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The values of what varies, and the overrides that say so."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=call.hydra.config_loader)
    with refusals_explained(call.hydra, call.name, call.overrides):
        parsed = parser.parse_overrides(call.overrides)
    fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    varied = {o.get_key_element(): list(o.sweep_string_iterator()) for o in parsed if o.is_sweep_override()}
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values))
        yield chosen, [*fixed, *(f"{key}={value}" for key, value in chosen.items())]
