r"""`python scripts/study/tasks.py FOLDER OUT`: downstream tasks as files for `rcpo evaluate`.

FOLDER holds the tasks' published files, each also as .gz: arc_challenge_test.jsonl (AI2's layout),
truthfulqa_mc_task.json (the authors' layout), lambada_test.jsonl (OpenAI's version, key `text`), and two
tasks of BIG-Bench Hard in its authors' layout, bbh/boolean_expressions.json and
bbh/sports_understanding.json. OUT gets NAME.jsonl with the documents in the layout that
lm-evaluation-harness expects, and NAME.yaml, which takes everything but the data from the harness's own task.
`--documents NAME=N …` keeps N of a task, evenly through its file; the same files give the same documents.

    rcpo evaluate model=local model.path=DIR eval.preferences=false \
        eval.tasks='[OUT/arc_challenge.yaml,OUT/truthfulqa_mc2.yaml,OUT/lambada_openai.yaml]'
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def arc(row: Row) -> Row:
    """AI2's layout as the hub's."""
    choices = row["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {"question": row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}


def truthfulqa(row: Row) -> Row:
    """Answers that are keys with their labels as the hub's two lists."""
    targets = row["mc2_targets"]
    return {
        "question": row["question"],
        "mc2_targets": {"choices": list(targets), "labels": list(targets.values())},
    }


def lambada(row: Row) -> Row:
    return {"text": row["text"]}


def bbh(row: Row) -> Row:
    return {"input": row["input"], "target": row["target"]}


# task: its file in the harness, the published file, how a row is read, the split that is asked
TASKS: dict[str, tuple[str, str, Callable[[Row], Row], str]] = {
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge_test.jsonl", arc, "test"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc_task.json", truthfulqa, "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "lambada_test.jsonl", lambada, "test"),
    "bbh_boolean_expressions": (
        "leaderboard/bbh_mc/boolean_expressions.yaml", "bbh/boolean_expressions.json", bbh, "test",
    ),
    "bbh_sports_understanding": (
        "leaderboard/bbh_mc/sports_understanding.yaml", "bbh/sports_understanding.json", bbh, "test",
    ),
}  # fmt: skip


def rows_of(path: Path) -> list[Row]:
    """The rows of a JSON or JSONL file, which may be compressed."""
    packed = path.with_name(path.name + ".gz")
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else path.read_text("utf-8")
    if path.suffix == ".json":
        whole = json.loads(text)
        found: list[Row] = whole["examples"] if isinstance(whole, dict) else whole
        return found
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def evenly(rows: list[Row], count: int | None) -> list[Row]:
    """So many rows, evenly through all of them; all without a count."""
    if count is None or count >= len(rows):
        return rows
    return [rows[number * len(rows) // count] for number in range(count)]


def write_task(name: str, source: Path, out: Path, count: int | None) -> int:
    """Write the documents and the definition of a task; return how many documents there are."""
    inside, file, read, split = TASKS[name]
    rows = [read(row) for row in evenly(rows_of(source / file), count)]
    data = (out / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    own = {
        "include": str(harness_tasks() / inside),
        "task": f"{name}_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
        "training_split": None,
    }
    if split == "test":
        own["validation_split"] = None
    # JSON is YAML
    (out / f"{name}.yaml").write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    return len(rows)


def harness_tasks() -> Path:
    """The folder of the harness's own tasks, found without importing it."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the tasks need the extra: pip install 'rcpo[eval]'")
    return Path(found.submodule_search_locations[0]) / "tasks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", nargs="*", default=[], metavar="NAME=N", help="all without it")
    arguments = parser.parse_args()
    counts = dict(word.split("=", 1) for word in arguments.documents)
    if unknown := set(counts) - set(TASKS):
        parser.error(f"--documents {min(unknown)}: choose among {', '.join(TASKS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        limit = int(counts[name]) if name in counts else None
        count = write_task(name, arguments.folder, arguments.out, limit)
        print(f"{name}: {count} documents")


if __name__ == "__main__":
    main()
