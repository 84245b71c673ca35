"""Pairs on disk: `pairs.jsonl`, which `data=pairs` reads, and `pairs.json` with where they come from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcpo.config.onpolicy import VERIFIABLE, OnPolicyConfig
from rcpo.onpolicy.answers import Answer
from rcpo.onpolicy.pairing import Scored, distinct, pair_up, why_none
from rcpo.onpolicy.prompts import Prompt, pair_row
from rcpo.onpolicy.scores import Scores
from rcpo.runs.folder import read_object
from rcpo.runs.jsonl import write_lines
from rcpo.system.files import replace_text

PAIRS, ABOUT = "pairs.jsonl", "pairs.json"


@dataclass
class Made:
    """The rows of pairs.jsonl, and what became of answers and prompts."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)


def usable(answers: Sequence[Answer]) -> list[Answer]:
    """Answers that can stand in a pair: training would put an end after one that was cut off."""
    return [answer for answer in answers if answer.ended and answer.text.strip()]


def make_pairs(
    prompts: Sequence[Prompt], answers: Sequence[Answer], scores: Scores, nodes: OnPolicyConfig, seed: int
) -> Made:
    """The pairs of all prompts, in their order."""
    made = Made()
    made.answers["wanted"] = len(prompts) * nodes.sample.n
    made.answers["unanswered"] = made.answers["wanted"] - len(answers)
    made.answers["cut_off"] = sum(not answer.ended for answer in answers)
    made.answers["empty"] = sum(answer.ended and not answer.text.strip() for answer in answers)
    by_prompt: dict[str, list[Scored]] = {prompt.id: [] for prompt in prompts}
    for answer in usable(answers):
        if answer.key in scores:
            by_prompt[answer.prompt.id].append(Scored(answer.text, scores[answer.key]))
            made.scores.append(scores[answer.key])
        else:
            made.answers["unscored"] += 1
    made.prompts["asked"] = len(prompts)
    for prompt in prompts:
        _of_prompt(prompt, by_prompt[prompt.id], nodes, f"{seed} {nodes.sample.round} {prompt.id}", made)
    return made


def _of_prompt(prompt: Prompt, scored: list[Scored], nodes: OnPolicyConfig, seed: str, made: Made) -> None:
    different = distinct(scored)
    made.answers["repeated"] += len(scored) - len(different)
    pairs = pair_up(different, nodes.pairing, seed)
    if not pairs:
        made.prompts[why_none(different, verifiable=nodes.score.name in VERIFIABLE)] += 1
    for pair in pairs:
        made.rows.append(
            {
                **pair_row(prompt, pair.chosen.text, pair.rejected.text),
                "score_chosen": pair.chosen.score,
                "score_rejected": pair.rejected.score,
            }
        )


def write_pairs(folder: Path, made: Made, provenance: dict[str, Any]) -> dict[str, Any]:
    """Write pairs.jsonl, then pairs.json, which says that they are whole; return what it holds."""
    write_lines(folder / PAIRS, made.rows)
    mean = sum(made.scores) / len(made.scores) if made.scores else None
    about = {
        "pairs": len(made.rows),
        "prompts": dict(made.prompts),
        "answers": dict(made.answers),
        "score_mean": mean,
        **provenance,
        "sha256": hashlib.sha256((folder / PAIRS).read_bytes()).hexdigest(),
    }
    replace_text(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return about


def finished_pairs(folder: Path) -> dict[str, Any] | None:
    """What pairs.json holds, if pairs.jsonl is the file that it describes and has a pair; else None."""
    about = read_object(folder / ABOUT)
    try:
        digest = hashlib.sha256((folder / PAIRS).read_bytes()).hexdigest()
    except OSError:
        return None
    return about if about.get("pairs") and about.get("sha256") == digest else None


def lines(about: dict[str, Any]) -> list[str]:
    """The pairs for the user, and what was left out."""
    prompts, answers = about["prompts"], about["answers"]
    mean = "" if about["score_mean"] is None else f", mean score {about['score_mean']:.3f}"
    found = [
        f"pairs: {about['pairs']:,} of {prompts['asked']:,} prompts, {answers['wanted']:,} answers{mean}"
    ]
    left = [(name, count) for name, count in prompts.items() if name != "asked" and count]
    if left:
        shown = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in left)
        found.append(f"prompts without a pair: {shown}")
    out = [(name, count) for name, count in answers.items() if name != "wanted" and count]
    if out:
        shown = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in out)
        found.append(f"answers left out: {shown}")
    return found
