"""Tokens made once: what the key sees, damage, other processes, workers, ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pytest
from kinds import tokenizer_of
from test_dataset import TOKENIZER, pairs, write

from rcpo.config.data import DataConfig
from rcpo.data import workers
from rcpo.data.dataset import Datasets, load_datasets, make_encoder
from rcpo.data.readers import ROWS, RowBlock
from rcpo.data.tokens import ARRAYS
from rcpo.data.workers import ALONE, encode_all
from rcpo.errors import ConfigError

WORKER = str(Path(__file__).parents[1] / "workers" / "data_ranks.py")
MANY = (ALONE + 3) * ROWS  # rows that are worth a worker


class Loader:
    """Loads a file with a cache of its own and keeps what was said."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.path = write(folder / "x.jsonl", pairs(20))
        self.said: list[str] = []

    def __call__(self, tokenizer: Any = TOKENIZER, **settings: Any) -> Datasets:
        self.said.clear()
        given = {"path": self.path, "cache": str(self.cache), "eval_fraction": 0.2, **settings}
        return load_datasets(DataConfig(name="pairs", **given), tokenizer, 1, self.said.append)

    @property
    def read(self) -> list[bool]:
        """Of each line said, whether it tells of reading from the cache, not of making."""
        return ["from the cache" in line for line in self.said]

    @property
    def entry(self) -> Path:
        [entry] = [path for path in (self.cache / "tokens").glob("[!.]*") if path.is_dir()]
        return entry


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def test_the_second_start_maps_what_the_first_made(load: Loader) -> None:
    first = load()
    assert load.read == [False]
    second = load()
    assert load.read == [True]
    assert second.train[:] == first.train[:] and second.train.fingerprint == first.train.fingerprint
    assert isinstance(second.train._stores[0].tokens, np.memmap)
    assert second.report.as_dict() == first.report.as_dict()
    alone = load(cache="off")
    assert load.read == [False] and alone.train.fingerprint == first.train.fingerprint


def test_what_decides_tokens_is_in_the_key_and_nothing_else(load: Loader, tmp_path: Path) -> None:
    load()
    # which examples are used, and how a bad row is met, are decided after tokenising
    for same in ({"eval_fraction": 0.5}, {"on_bad": "drop"}, {"workers": 3}, {"layout": "shared"}):
        load(**same)
        assert load.read == [True], same
    (tmp_path / "moved").mkdir()
    load(path=shutil.copy(load.path, tmp_path / "moved" / "x.jsonl"))
    assert load.read == [True]
    changes: list[dict[str, Any]] = [
        {"max_length": 20},
        {"max_prompt_length": 5},
        {"max_prompt_length": 5, "truncation": "keep_start"},
        {"template": "chatml"},
        {"template": "chatml", "system_prompt": "s"},
        {"template": "chatml", "template_options": {"x": 1}},
        {"columns": {"text": "prompt", "prompt": "prompt"}},
        {"max_examples": 7},
        {"tokenizer": tokenizer_of("neox")},
        {"path": shutil.copy(load.path, tmp_path / "y.jsonl")},  # it is in the ids
    ]
    for change in changes:
        load(**change)
        assert load.read == [False], change
    with open(load.path, "a") as file:
        file.write(json.dumps(pairs(1, "more")[0]) + "\n")
    assert len(load(eval_fraction=0).train) == 21 and load.read == [False]


@pytest.mark.parametrize("name", [*sorted({*ARRAYS} - {"contexts"}), "meta.json"])  # contexts: empty
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_tokens_are_made_again(load: Loader, name: str, damage: str) -> None:
    first = load()
    file = load.entry / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(content) if damage == "changed" else content[:-1])
    again = load()
    assert again.train[:] == first.train[:]
    if (name, damage) != ("meta.json", "gone"):  # then there is nothing to say: it is not there
        assert "is not used" in load.said[0] and load.entry.name in load.said[0]
    load()
    assert load.read == [True]


def test_where_nothing_can_be_kept_tokens_stay_in_memory(load: Loader) -> None:
    load.cache.mkdir()
    (load.cache / "tokens").write_text("a file where the folder should be")
    data = load()
    assert any("tokens cannot be kept" in line for line in load.said) and len(data.train) == 16
    assert not isinstance(data.train._stores[0].tokens, np.memmap)


def test_what_a_killed_process_left_is_removed(load: Loader) -> None:
    load()
    left = load.entry.with_name(f".{load.entry.name}.0123.tmp")
    left.mkdir()
    shutil.rmtree(load.entry)
    load()
    assert not left.exists() and load.entry.is_dir()


def pieces(count: int) -> list[RowBlock]:
    rows = pairs(count)
    return [
        RowBlock(range(start + 1, start + 1 + len(rows[start : start + ROWS])), rows[start : start + ROWS])
        for start in range(0, count, ROWS)
    ]


def test_workers_make_the_same_in_the_same_order() -> None:
    encoder = make_encoder(DataConfig(name="pairs", max_length=30, template="chatml"), TOKENIZER)
    alone = list(encode_all(encoder, pieces(MANY), 1))
    together = list(encode_all(encoder, pieces(MANY), 2))
    assert len(alone) == len(together) == ALONE + 3
    for (piece, one), (same, other) in zip(alone, together, strict=True):
        assert piece.numbers == same.numbers
        assert one.tally == other.tally and one.kinds == other.kinds
        for name in ("numbers", "tokens", "lengths", "prompts"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_refusal_comes_out_of_a_worker_and_leaves_none_behind() -> None:
    encoder = make_encoder(DataConfig(name="pairs"), TOKENIZER)
    messages = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    given = [*pieces(MANY), RowBlock([MANY + 1], [messages]), *pieces(MANY)]
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        list(encode_all(encoder, given, 2))
    assert not [child for child in psutil.Process().children() if "rcpo.data.workers" in child.cmdline()]


def test_a_worker_that_is_killed_ends_the_run_with_a_message() -> None:
    encoder = make_encoder(DataConfig(name="pairs"), TOKENIZER)
    encoded = encode_all(encoder, pieces(4 * MANY), 2)
    next(encoded)
    for child in psutil.Process().children():
        if "rcpo.data.workers" in child.cmdline():
            child.send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exit code -9; .* data.workers=1"):
        list(encoded)


def test_memory_is_suspected_where_a_signal_ended_a_worker_alone() -> None:
    assert "run out of memory" in workers._hint(-9)
    assert workers._hint(1) == ", after the error above; data.workers=1 raises it in this process"


def test_a_few_rows_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Pool", None)
    encoder = make_encoder(DataConfig(name="pairs"), TOKENIZER)
    assert len(list(encode_all(encoder, pieces(ALONE * ROWS), 2))) == ALONE


def launch(*arguments: str, ranks: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    forked.run([*command, WORKER, *arguments], check=True, env=environment)


@pytest.mark.slow
def test_ranks_share_one_copy_that_one_of_them_makes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(MANY))
    bad = write(tmp_path / "bad.jsonl", [*pairs(3), {}])
    expected = load_datasets(DataConfig(name="pairs", path=path, cache="off", eval_fraction=0), TOKENIZER, 1)
    for way, made in (("shared", 1), ("apart", 2), ("off", 0)):
        out = tmp_path / way
        out.mkdir()
        launch(path, str(tmp_path / "cache") if way == "shared" else way, str(out))
        found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
        assert [result["fingerprint"] for result in found] == [found[0]["fingerprint"]] * 2
        assert [result["mapped"] for result in found] == [way != "off"] * 2
        assert found[1]["said"] == [] and len(found[0]["said"]) == 1  # rank 0 speaks
        kept = tmp_path / "cache" if way == "shared" else out
        assert len(list(kept.glob("**/meta.json"))) == made
        assert found[0]["fingerprint"] == expected.train.fingerprint
    out = tmp_path / "refused"
    out.mkdir()
    launch(bad, str(tmp_path / "cache"), str(out))
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0]["refusal"].startswith(f"{bad}:4: no field")


@pytest.mark.slow
def test_processes_that_start_together_tokenise_once(load: Loader) -> None:
    write(Path(load.path), pairs(3 * ROWS))
    program = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from rcpo.config.data import DataConfig; import rcpo.data\n"
        "from rcpo.data.dataset import load_datasets\n"
        "tokenizer = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / 'assets' / 'tiny')\n"
        "config = DataConfig(name='pairs', path=sys.argv[1], cache=sys.argv[2], eval_fraction=0.0)\n"
        "sys.stdin.readline(); said = []\n"
        "print(load_datasets(config, tokenizer, 1, said.append).train.fingerprint, *said[-1:], sep='|')"
    )
    command = [sys.executable, "-c", program, load.path, str(load.cache)]
    started = [
        forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    time.sleep(0.1)
    lines = [process.communicate("go\n")[0].strip() for process in started]
    assert len({line.split("|")[0] for line in lines}) == 1
    assert sorted("from the cache" in line for line in lines) == [False, True, True]
