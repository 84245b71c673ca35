"""A folder of on-policy pairs: prompts, answers, scores, pairs; each phase goes on where it was killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rcpo import __version__
from rcpo.config.onpolicy import MODELS, as_tree
from rcpo.engine.load import policy_source
from rcpo.errors import ConfigError, RunError
from rcpo.evaluation.endpoint import Endpoint
from rcpo.models.contents import source_hash
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_tokenizer
from rcpo.onpolicy import answers, scores
from rcpo.onpolicy.pairs import ABOUT, PAIRS, lines, make_pairs, usable, write_pairs
from rcpo.onpolicy.prompts import Prompt, Prompts, load_prompts
from rcpo.onpolicy.ranks import leave_if_asked, on_main_or_refused
from rcpo.onpolicy.settings import Settings
from rcpo.runs.environment import git_state
from rcpo.runs.folder import FINAL, read_object
from rcpo.system import distributed
from rcpo.system.distributed import say
from rcpo.system.files import cache_folder, replace_text
from rcpo.system.signals import STOPPED, Stopped, StopRequest
from rcpo.training.trainer import alone_in

ASKED = "asked.json"  # beside the answers: what they depend on


def make(settings: Settings, folder: Path) -> int:
    """Make the pairs of a folder, or what it lacks of them; return the exit code. Collective.

    Raises ConfigError for settings that cannot be used, and for answers there that were given to others;
    RunError where no pair comes of it.
    """
    distributed.initialize()
    folder.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop, alone_in(folder):
        try:
            _make(settings, folder, stop.__bool__)
        except Stopped as stopped:
            say(str(stopped))
            return STOPPED
    return 0


def _make(settings: Settings, folder: Path, stop: Callable[[], bool]) -> None:
    config, nodes = settings.config, settings.nodes
    source = answering(settings, folder)
    tokenizer = load_tokenizer(source.tokenizer, config.model)
    prompts = load_prompts(config.data, tokenizer, config.seed, folder)
    wanted_prompts = prompts.share(nodes.sample.prompts, nodes.sample.round)
    endpoint = None
    if nodes.sample.base_url is not None:
        answers.refuse_cut(wanted_prompts)
        endpoint = Endpoint(nodes.sample, "sample")
        on_main_or_refused(endpoint.check)
    score = scores.prepare(config, nodes.score, wanted_prompts, source, folder, say, stop)
    provenance = _provenance(settings, source, prompts)
    on_main_or_refused(lambda: _refuse_other(folder, provenance["asked"]))
    leave_if_asked(stop)
    wanted = answers.draws(wanted_prompts, nodes.sample.n)
    if endpoint is None:
        answers.answer_here(config, nodes.sample, source, tokenizer, prompts, wanted, folder, stop)
    else:
        answers.answer_by_endpoint(config, nodes.sample, endpoint, prompts, wanted, folder, say, stop)
    found = answers.read_answers(folder, wanted)
    scored = score(usable(found))
    leave_if_asked(stop)
    on_main_or_refused(lambda: _conclude(settings, folder, wanted_prompts, found, scored, provenance))


def answering(settings: Settings, folder: Path) -> ModelSource:
    """The model that answers; raises ConfigError for a run that has no trained weights."""
    final = None if settings.run is None else settings.run / FINAL
    if final is not None and not final.is_dir():
        raise ConfigError(f"run={settings.run} has no final/ yet; finish it with resume={settings.run}")
    return policy_source(settings.config, settings.run or folder, final)


def _provenance(settings: Settings, source: ModelSource, prompts: Prompts) -> dict[str, Any]:
    """Where pairs come from; `asked` is what the answers depend on."""
    config, nodes, sample = settings.config, settings.nodes, settings.nodes.sample
    cache = cache_folder(config.reference.cache)
    memo = None if cache is None else cache / "hashes"
    local = sample.base_url is None
    asked = {
        "policy": source_hash(source, config.seed, memo) if local else f"{sample.model} at {sample.base_url}",
        "prompts": prompts.digest,
        "seed": config.seed,
        "round": sample.round,
        "temperature": sample.temperature,
        "top_p": sample.top_p,
        "max_new_tokens": answers.longest(sample, prompts),
        "dtype": config.train.dtype if local else None,
    }
    score = asdict(nodes.score)
    if nodes.score.name in MODELS:
        score["identity"] = scores.score_identity(config, nodes.score, source, memo)
    if nodes.score.name == "judge":
        score["judge"] = {"model": config.judge.model, "base_url": config.judge.base_url}
    tree = as_tree(nodes)
    data = {"name": config.data.name, "path": config.data.path, "eval_fraction": config.data.eval_fraction}
    policy = {
        "run": None if settings.run is None else str(settings.run),
        "model": config.model.path or config.model.name,
    }
    return {
        "asked": asked,
        "policy": policy if local else {"base_url": sample.base_url, "model": sample.model},
        "data": data,
        "sample": {name: tree["sample"][name] for name in ("n", "prompts", "round")},
        "score": score,
        "pairing": tree["pairing"],
        "rcpo": {"version": __version__, "git": git_state(Path(__file__))},
    }


def _refuse_other(place: Path, asked: dict[str, Any]) -> None:
    """Raise ConfigError where a folder's answers are another model's, or to other prompts.

    Remove answers that gave no pair, which nobody can use.
    """
    folder = place / answers.FOLDER
    before = read_object(folder / ASKED)
    changed = [
        f"{name}: {before.get(name)} -> {value}" for name, value in asked.items() if before.get(name) != value
    ]
    if before and changed and read_object(place / ABOUT).get("pairs") == 0:
        say(f"the answers in {folder} gave no pair and were made with other settings: they are removed")
        for name in (PAIRS, ABOUT):
            (place / name).unlink(missing_ok=True)
        shutil.rmtree(folder)
        before = {}
    if not before:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / ASKED, json.dumps(asked, indent=2) + "\n")
    elif changed:
        shown = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"{folder} holds answers that depend on other settings:\n{shown}\n"
            "give the same ones, or another folder: hydra.run.dir=DIR"
        )


def _conclude(
    settings: Settings,
    folder: Path,
    prompts: list[Prompt],
    found: list[answers.Answer],
    scored: scores.Scores,
    provenance: dict[str, Any],
) -> None:
    made = make_pairs(prompts, found, scored, settings.nodes, settings.config.seed)
    about = write_pairs(folder, made, provenance)
    for line in lines(about):
        say(line)
    if not made.rows:
        raise RunError(
            f"no prompt gave a pair; {folder / ABOUT} counts why. More answers (sample.n), a higher "
            "sample.temperature, or a longer sample.max_new_tokens may give some"
        )
