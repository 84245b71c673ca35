"""`rcpo data`: what it shows, and that no data reaches the terminal as commands."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import TOKENIZER, sums_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rcpo.cli import app
from rcpo.commands import data
from rcpo.commands.data import histogram, length_table, tokens_as_text
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.dataset import load_datasets
from rcpo.data.diagnosis import ches_lines, ches_of
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_tokenizer, load_whole
from rcpo.models.policy import Policy
from rcpo.system.text import visible

RUNNER = CliRunner()


def shown(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["data", *arguments])
    return result.exit_code, result.output


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def test_a_dataset_as_the_model_sees_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "chosen": f"it is {2 * n}", "rejected": "no idea"} for n in range(10, 30)]
    rows += [rows[0], {"prompt": "x" * 20, "chosen": "y", "rejected": "y"}]
    path = write(tmp_path / "x.jsonl", *rows)
    held_out = write(tmp_path / "e.jsonl", *rows[:3], rows[3] | {"chosen": "else"}).replace(
        "path", "eval_path"
    )
    code, output = shown(
        "data=pairs",
        path,
        held_out,
        "data.max_prompt_length=5",
        "data.on_bad=drop",
        "data.max_dropped=1",
        "show=2",
    )
    assert code == 0, output
    assert "26 pairs read, 21 to train on, 4 held out" in output
    assert "1 identical responses (first: " in output and "x.jsonl:22)" in output
    assert "special tokens: bos <bos>, eos <eos>, pad <pad>; a response ends with <eos>" in output
    assert "<bos>+10=" in output and "it is 20<eos>" in output  # "10+10=" cut at its start
    assert "prompt (5 tokens, given)" in output and "chosen (9 tokens, learned)" in output
    assert output.count("(5 tokens, given)") == 2
    assert "25 prompts (data.max_prompt_length)" in output
    assert "train: 21 examples, tokens" in output and "held out: 4 examples, tokens" in output
    assert "1 of 21 training examples repeat another one's tokens" in output
    assert "3 of 4 held-out examples are trained on, 4 have a prompt that is" in output


def test_pairs_that_contradict_each_other_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "chosen": f"it is {2 * n}", "rejected": "no idea"} for n in range(10, 14)]
    rows.append({"prompt": "10+10=", "chosen": "no idea", "rejected": "it is 20"})
    tie = {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "tie"}
    path = write(tmp_path / "x.jsonl", *rows)
    code, output = shown("data=pairs", path, "data.eval_fraction=0", "show=0")
    assert code == 0, output
    assert "2 of 5 training examples are contradicted by another one" in output
    assert "(first: " in output and "x.jsonl:1)" in output
    path = write(tmp_path / "y.jsonl", *[tie | {"prompt": name} for name in "ab"])
    code, output = shown("data=pairs", path, "data.eval_fraction=0", "show=0", "data.ties=keep")
    assert code == 0 and "learned in both orders" in output, output
    assert "contradicted" not in output
    labels = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    path = write(tmp_path / "z.jsonl", *labels)
    code, output = shown("data=pairs", path, "objective=kto", "data.eval_fraction=0", "show=0")
    assert code == 0 and "2 of 2 training examples are contradicted" in output, output


def test_the_packaged_task_and_a_refusal() -> None:
    code, output = shown("show=1")
    assert code == 0 and "sums: 7214 pairs read" in output
    code, output = shown("show=some")
    assert code == 2 and "show=some is not a number" in output
    code, output = shown("show=1", "data=pairs", "data.path=nowhere.jsonl", "--cfg", "job")
    assert code == 0 and "path: nowhere.jsonl" in output
    code, output = shown("-m", "seed=1,2")
    assert code == 2 and "without -m" in output


def test_escapes_in_data_are_spelled_out(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[31m \u202e\x9b2J ok"
    path = write(
        tmp_path / "x.jsonl", *({"prompt": f"{evil}{n}", "chosen": evil, "rejected": "r"} for n in range(9))
    )
    folder = words(tmp_path / "words")
    code, output = shown("data=pairs", path, "model=local", f"model.path={folder}")
    assert code == 0, output
    assert not set(output) & {"\x1b", "\x07", "\u202e", "\x9b"}
    assert "\\x1b]0;owned\\x07\\x1b[31m \\u202e\\x9b2J ok" in output.replace("│\n│ ", "")


def words(folder: Path) -> str:
    """A model's folder whose tokenizer knows every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["ok"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    LlamaConfig(vocab_size=300).save_pretrained(folder)
    return str(folder)


@given(text=st.text())
def test_what_is_shown_has_no_hidden_character_and_nothing_else_changed(text: str) -> None:
    out = visible(text)
    assert all(character == "\n" or character.isprintable() for character in out)
    assert "\n" not in visible(text, lines=False)
    if text.isprintable():
        assert out == text


@pytest.mark.parametrize("length", [5, 5000])
def test_parts_keep_their_ends(length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer("a" * length + "b")["input_ids"]
    text = tokens_as_text(ids, tokenizer, "green").plain
    assert text.startswith("<bos>aaa") and text.endswith("aab")
    assert ("3,806 characters" in text) == (length == 5000)  # 5 + 5001 − 1200


def test_lengths_by_hand() -> None:
    dataset = PairDataset.of([Example(str(n), [1] * n, [2] * 2, [3] * (n + 1)) for n in range(1, 5)])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(length_table("train", dataset))
    console.print(histogram(dataset))
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    numbers = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert numbers["prompt"] == ["4", "1", "2", "3", "4", "10"]  # 1 2 3 4: median 2.5, 95 % 3.85
    assert numbers["chosen"] == ["4", "2", "2", "2", "2", "8"]
    assert numbers["rejected"] == ["4", "2", "3", "4", "5", "14"]
    # longest sequences 3, 5, 7 and 9: the bars are one example each
    assert [line.split()[3] for line in text.splitlines() if "█" in line] == ["1"] * 4


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_the_model_reads_a_pair_once_for_a_diagnosis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    read: list[int] = []
    forward = Policy.forward

    def counted(self: Policy, *args: Any, **kwargs: Any) -> Any:
        read.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Policy, "forward", counted)
    config = RunConfig()
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(tmp_path / "x.jsonl", 47)
    config.objective = ObjectiveConfig(
        name=objective, hyperparameters={"beta": 0.1} if objective == "dpo" else {}
    )
    config.train.batch_size = 6
    tokenizer = load_tokenizer(Path(TOKENIZER), config.model)
    datasets = load_datasets(config.data, tokenizer, config.seed)
    lines = list(data._diagnosis(config, tokenizer, datasets))
    assert "the model reads 47 pairs with " in lines[2]
    assert sum(read[1:]) == 2 * 47  # sequences; the first pass is a look at the model itself
    places = np.arange(47)
    policy = Policy(load_whole(ModelSource(Path(TOKENIZER)), config.model, "fp32", 0))
    policy.examine()
    assert tokenizer.pad_token_id is not None
    alone = ches_of(policy, datasets.train, places, tokenizer.pad_token_id)
    assert lines[3:14] == ches_lines(alone, places, datasets.train.id)


def test_a_diagnosis_by_the_model_and_pairs_too_much_alike(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "chosen": f"it is {2 * n}", "rejected": "no idea"} for n in range(10, 60)]
    path = write(tmp_path / "x.jsonl", *rows)
    code, output = shown("data=pairs", path, "data.eval_fraction=0.1", "show=0")
    assert code == 0, output
    assert "CHES of 45 pairs" in output and "band of a batch of 5 at the start: " in output
    assert "band across samples" in output
    median = output.partition("50% ")[2].partition(",")[0]
    limit = ["data.eval_fraction=0.1", f"data.ches_max={median}", f"reference.cache={tmp_path / 'cache'}"]
    code, output = shown("data=pairs", path, *limit)
    assert code == 0, output
    assert "pairs with a CHES above data.ches_max=" in output and "50 pairs read, 2" in output
    code, output = shown("data=pairs", path, "data.ches_max=0", "model=local", "model.path=owner/name")
    assert code == 2 and "model.path=owner/name" in output
