"""Two tasks of lm-evaluation-harness over local files: a choice and an answer, both of sums."""

from __future__ import annotations

import json
from pathlib import Path

CHOICE = """\
task: sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ANSWER = """\
task: sums_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 18, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: number
    filter: [{{function: regex, regex_pattern: "([0-9]+)$"}}, {{function: take_first}}]
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, count: int = 21) -> tuple[str, str]:
    """The tasks' YAML files: `count` sums, the right answer at each of three places in turn."""
    rows = []
    for number in range(count):
        a, b = 31 + 3 * number % 60, 12 + 7 * number % 80
        choices = [str(a + b), str(a + b + 1), str(a + b - 10)]
        right = number % 3
        choices[0], choices[right] = choices[right], choices[0]
        rows.append({"question": f"{a}+{b}=", "choices": choices, "answer": right})
    for name, part in (("sums", rows), ("shots", rows[::5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return str(folder / "choice.yaml"), str(folder / "answer.yaml")
