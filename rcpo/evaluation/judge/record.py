"""From pairs of answers to the record of a judgement and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcpo.config.schema import RunConfig
from rcpo.errors import RunError
from rcpo.evaluation.endpoint import Endpoint
from rcpo.evaluation.judge.verdicts import ORDERS, SCORES, Duel, Question, judge, questions
from rcpo.evaluation.judge.winrate import PREFIX, JudgedPairs, judge_metrics
from rcpo.runs.folder import ANNOTATIONS_FILE, JUDGE_FILE, VERDICTS_FILE
from rcpo.system.files import replace_text


def judge_pairs(
    config: RunConfig, endpoint: Endpoint, pairs: Sequence[Duel], folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The record of a judgement; its files go to `folder`: verdicts, the pairs, who judged what.

    Raises RunError where no pair has both verdicts, or the endpoint refuses or stays silent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.judge
    asked = questions(settings, pairs)
    equal = len(pairs) - len(asked) // len(ORDERS)
    if equal:
        say(f"judge: {equal:,} of {len(pairs):,} pairs of answers are equal: ties, nothing to ask")
    verdicts = judge(settings, endpoint, asked, folder / VERDICTS_FILE, say)
    found = judged(pairs, asked, verdicts)
    if not len(found.verdicts):
        raise RunError("the judge gave no pair of answers both verdicts; the lines above say why")
    failed = len(pairs) - len(found.verdicts)
    if failed:
        say(f"judge: {failed:,} of {len(pairs):,} pairs are left out; the same command asks for them again")
    kept = dict(zip(found.ids, found.preferences.tolist(), strict=True))
    rows = [
        {
            "id": pair.id,
            "instruction": pair.instruction,
            "output_1": pair.theirs,
            "output_2": pair.ours,
            "preference": 1 + kept[pair.id],
            "annotator": settings.model,
        }
        for pair in pairs
        if pair.id in kept
    ]
    replace_text(folder / ANNOTATIONS_FILE, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    about = {
        "model": settings.model,
        "base_url": settings.base_url,
        "prompts": settings.prompts or "held out",
    }
    about["against"] = settings.against or "the prompts' own answers"
    replace_text(folder / Path(JUDGE_FILE).name, json.dumps(about, indent=1) + "\n")
    return {**judge_metrics(found, config.seed), f"{PREFIX}failed": failed}


def judged(pairs: Sequence[Duel], asked: Sequence[Question], verdicts: Mapping[str, str]) -> JudgedPairs:
    """The pairs with both verdicts, or with equal answers, as arrays."""
    found: dict[str, list[float]] = {}
    for question in asked:
        if question.key in verdicts:
            found.setdefault(question.pair.id, []).append(SCORES[verdicts[question.key]])
    kept = [pair for pair in pairs if pair.ours == pair.theirs or len(found.get(pair.id, [])) == 2]
    return JudgedPairs(
        ids=[pair.id for pair in kept],
        verdicts=np.array([found.get(pair.id, [0.5, 0.5]) for pair in kept]).reshape(-1, 2),
        asked=np.array([pair.ours != pair.theirs for pair in kept], dtype=bool),
        longer=np.array([len(pair.ours) - len(pair.theirs) for pair in kept], dtype=np.float64),
        labels=np.array([np.nan if pair.label is None else pair.label for pair in kept]),
        prompts=np.unique([pair.instruction for pair in kept], return_inverse=True)[1],
    )
