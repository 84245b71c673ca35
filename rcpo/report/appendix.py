"""The tables behind the results: settings and how they differ, the environment, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rcpo.config.changes import flatten
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.report.document import Table
from rcpo.report.runs import Run
from rcpo.runs.comparison import as_equal, differing

LONG = 400  # characters of a sample; the file has the rest
SHOWN_STEPS = 4  # of a run's samples: first, last and what lies between


def settings_of_run(run: Run) -> list[Table]:
    """What differs from the defaults, and all of it folded."""
    default = flatten(to_container(RunConfig()))
    own = run.settings
    changed = [key for key in own if key not in default or own[key] != default[key]]
    rows = [(key, _value(own[key]), _value(default[key]) if key in default else "–") for key in changed]
    return [
        Table(
            ("key", "this run", "default"), rows, "Settings that differ from the defaults.", texts=(0, 1, 2)
        ),
        _all_settings(own),
    ]


def settings_of_runs(runs: Sequence[Run]) -> list[Table]:
    """The keys in which runs differ, a column each; what they share folded."""
    every = [run.settings for run in runs]
    keys = [
        key for key in ("seed", *differing(every)) if len({as_equal(each.get(key)) for each in every}) > 1
    ]
    rows = [(run.name, *(_value(run.settings.get(key)) for key in keys)) for run in runs]
    columns = tuple(range(len(keys) + 1))
    tables = (
        [Table(("run", *keys), rows, "Settings in which the runs differ.", texts=columns)] if keys else []
    )
    shared = {key: value for key, value in every[0].items() if all(each.get(key) == value for each in every)}
    return [*tables, _all_settings(shared, "Settings that all runs share.")]


def _all_settings(settings: Mapping[str, Any], caption: str = "All settings.") -> Table:
    rows = [(key, _value(value)) for key, value in sorted(settings.items())]
    return Table(("key", "value"), rows, caption, texts=(0, 1), folded=True)


def environment(runs: Sequence[Run]) -> list[Table]:
    """Versions, commit and hardware: what all share, and a column a run for what differs."""
    every = [{key: _value(value) for key, value in flatten(run.environment).items()} for run in runs]
    known = [each for each in every if each]
    if not known:
        return []
    keys = list(dict.fromkeys(key for each in known for key in each))
    shared = [
        (key, known[0][key]) for key in keys if all(each.get(key) == known[0].get(key) for each in known)
    ]
    varied = [key for key in keys if key not in dict(shared) and key not in ("time", "command")]
    tables = [Table(("environment", "value"), shared, texts=(0, 1), folded=True)] if shared else []
    if varied:
        rows = [(run.name, *(each.get(key, "–") for key in varied)) for run, each in zip(runs, every)]
        columns = tuple(range(len(varied) + 1))
        tables.insert(0, Table(("run", *varied), rows, "Environments differ in these.", texts=columns))
    return tables


def samples_of_run(run: Run) -> list[Table]:
    """Answers to the fixed prompts, a column a step."""
    alike = _beginning([run])
    answers = _answers(run, alike)
    steps = sorted({step for texts in answers.values() for step in texts})
    if len(steps) > SHOWN_STEPS:
        places = [round(i * (len(steps) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)]
        steps = [steps[place] for place in places]
    rows = [(*asked, *(texts.get(step, "–") for step in steps)) for asked, texts in answers.items()]
    header = ("prompt", "chosen", "rejected", *(f"step {step}" for step in steps))
    return [Table(header, rows, _without(alike), texts=tuple(range(len(header))))] if rows else []


def samples_of_conditions(columns: Sequence[tuple[str, Run]]) -> list[Table]:
    """The last answers of each condition's first run beside each other."""
    alike = _beginning([run for _, run in columns])
    every = [_answers(run, alike) for _, run in columns]
    asked = list(dict.fromkeys(key for answers in every for key in answers))
    rows = [
        (*key, *(answers[key][max(answers[key])] if key in answers else "–" for answers in every))
        for key in asked
    ]
    header = ("prompt", "chosen", "rejected", *(label for label, _ in columns))
    return (
        [
            Table(
                header,
                rows,
                f"Last answers; of the first run of each condition. {_without(alike)}".strip(),
                texts=tuple(range(len(header))),
            )
        ]
        if rows
        else []
    )


def _beginning(runs: Sequence[Run]) -> str:
    """The lines that all prompts begin with, as a template's system message; "" where there are none."""
    prompts = {str(sample.get("prompt") or "") for run in runs for sample in run.samples}
    if len(prompts) < 2:
        return ""
    lines = zip(*(prompt.splitlines(keepends=True) for prompt in prompts), strict=False)
    return "".join(first for first, *_ in takewhile(lambda line: len(set(line)) == 1, lines))


def _without(alike: str) -> str:
    return f"All prompts begin with: {' '.join(alike.split())}" if alike else ""


def _answers(run: Run, alike: str) -> dict[tuple[str, str, str], dict[int, str]]:
    """Greedy answers by what was asked (prompt without `alike`, chosen, rejected) and step."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for sample in run.samples:
        if sample.get("kind", "greedy") == "greedy" and isinstance(sample.get("step"), int):
            prompt = str(sample.get("prompt") or "").removeprefix(alike)
            asked = _cut(prompt), _cut(sample.get("chosen")), _cut(sample.get("rejected"))
            found.setdefault(asked, {})[sample["step"]] = _cut(sample.get("text")) + _mark(sample)
    return found


def _mark(sample: Mapping[str, Any]) -> str:
    if sample.get("correct") is None:
        return ""
    return " ✓" if sample["correct"] else " ✗"


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LONG else f"{text[:LONG]} …"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
