"""A judgement against a real endpoint on this machine: known preferences in, known win rates out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from judge_server import JudgeServer, longer
from tiny import sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcpo.config.judge import JudgeConfig
from rcpo.config.parsing import save_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.evaluation.endpoint import Endpoint
from rcpo.evaluation.judge.prompts import read_answers, read_prompts
from rcpo.evaluation.judge.record import judge_pairs
from rcpo.evaluation.judge.verdicts import Duel, asking, questions, request_of, verdict_of
from rcpo.evaluation.run import evaluate_run
from rcpo.system import distributed

KEY = "sk-plantedplantedplanted"


@pytest.fixture(autouse=True)
def own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(server: JudgeServer, **more: Any) -> JudgeConfig:
    quick = {"timeout": 30.0, "retries": 2, "backoff": 0.01, "concurrency": 4} | more
    return JudgeConfig(base_url=server.url, model="judge-1", **quick)


def pairs_of(ours: Sequence[str], theirs: Sequence[str], labels: Sequence[float | None] = ()) -> list[Duel]:
    given = labels or [None] * len(ours)
    return [
        Duel(str(number), f"question {number}", mine, other, label)
        for number, (mine, other, label) in enumerate(zip(ours, theirs, given, strict=True))
    ]


def record_of(server: JudgeServer, pairs: list[Duel], folder: Path, **more: Any) -> dict[str, Any]:
    config = RunConfig(judge=settings(server, **more))
    return judge_pairs(config, Endpoint(config.judge), pairs, folder, lambda line: None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quality(instruction: str, first: str, second: str) -> str:
    """Prefers more stars; says so at length, the verdict last."""
    one, other = first.count("*"), second.count("*")
    letter = "C" if one == other else "A" if one > other else "B"
    return f"Answer [[A]] has {one}, [[B]] has {other}.\n\n[[{letter}]]"


def test_known_preferences_give_known_rates(tmp_path: Path) -> None:
    # six won, two lost, one tie, one equal
    ours = ["**"] * 6 + ["*"] * 2 + ["* a", "same"]
    theirs = ["*"] * 6 + ["**"] * 2 + ["* b", "same"]
    labels = [1.0] * 5 + [0.0] * 3 + [0.5, None]
    with JudgeServer(quality, key=KEY).running() as server:
        record = record_of(server, pairs_of(ours, theirs, labels), tmp_path)
        assert len(server.requests) == 18 and server.most_at_once <= 4
    found = {name.removeprefix("eval/judge/"): value for name, value in record.items()}
    assert found["examples"] == 10 and found["failed"] == 0
    assert (found["win_rate"], found["wins"], found["losses"], found["ties"]) == (0.7, 0.6, 0.2, 0.2)
    assert (found["agreement"], found["kappa"], found["first_position_rate"]) == (1.0, 1.0, 0.5)
    # 8 of 9 labels agree; judge: 6, 2, 1 of 9, labels: 5, 3, 1 of 9
    chance = (6 * 5 + 2 * 3 + 1 * 1) / 81
    assert found["labelled"] == 9 and found["label_agreement"] == pytest.approx(8 / 9)
    assert found["label_kappa"] == pytest.approx((8 / 9 - chance) / (1 - chance))
    assert 0.35 < found["win_rate/low"] < 0.55 and 0.85 < found["win_rate/high"] <= 1
    body = server.requests[0]
    assert body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == 256
    verdicts = lines(tmp_path / "judge.jsonl")
    assert {line["order"] for line in verdicts} == {"ours first", "ours second"} and len(verdicts) == 18
    assert all(line["prompt_tokens"] == 100 for line in verdicts)
    # what was judged is a file of prompts for a second judge, with the first one's verdicts as labels
    again = read_prompts(tmp_path / "judge_annotations.json")
    assert [prompt.ours for prompt in again] == ours and [prompt.theirs for prompt in again] == theirs
    assert [prompt.label for prompt in again] == [1.0] * 6 + [0.0] * 2 + [0.5] * 2


def test_a_biased_judge_is_found_out(tmp_path: Path) -> None:
    with JudgeServer(lambda *_: "[[A]]").running() as server:
        record = record_of(server, pairs_of(["a"] * 8, ["b"] * 8), tmp_path)
    assert record["eval/judge/win_rate"] == 0.5 and record["eval/judge/agreement"] == 0
    assert record["eval/judge/first_position_rate"] == 1


def test_a_judge_of_lengths_alone_is_controlled_for(tmp_path: Path) -> None:
    """Preferences ¾ where ours is longer, ¼ where it is shorter by as much: logits ± ln 3 around 0."""
    ours = ["x" * (40 if number % 4 else 10) for number in range(40)]  # three of four are the longer ones

    def longer_if_first(instruction: str, first: str, second: str) -> str:
        return "[[A]]" if len(first) > len(second) else "[[C]]"

    with JudgeServer(longer_if_first).running() as server:
        record = record_of(server, pairs_of(ours, ["y" * 25] * 40), tmp_path, concurrency=16)
    assert record["eval/judge/win_rate"] == 0.75 * 0.75 + 0.25 * 0.25
    assert record["eval/judge/length_controlled_win_rate"] == pytest.approx(0.5, abs=2e-3)


def test_faults_change_no_number(tmp_path: Path) -> None:
    faults = ["limit 0.1", "status 500", "disconnect", "break", "raw {", "says I cannot decide.", "limit"]
    ours, theirs = ["**"] * 12 + ["*"] * 4, ["*"] * 12 + ["**"] * 4
    server = JudgeServer(quality, faults={5 * number: fault for number, fault in enumerate(faults)})
    with server.running():
        record = record_of(server, pairs_of(ours, theirs), tmp_path, retries=len(faults))
    assert record["eval/judge/win_rate"] == 0.75 and record["eval/judge/failed"] == 0
    assert len(server.requests) == 32 + len(faults)


def test_what_stays_without_a_verdict_is_counted_and_asked_again(tmp_path: Path) -> None:
    pairs = pairs_of(["**", "**", "*"], ["*", "*", "**"])

    def undecided(instruction: str, first: str, second: str) -> str:
        return "Both have merits." if instruction == "question 1" else quality(instruction, first, second)

    server = JudgeServer(undecided)
    with server.running():
        record = record_of(server, pairs, tmp_path)
        assert (record["eval/judge/examples"], record["eval/judge/failed"]) == (2, 1)
        assert record["eval/judge/win_rate"] == 0.5
        assert len(server.requests) == 4 + 2 * 2  # each of the undecided twice
        server.prefer = quality
        record = record_of(server, pairs, tmp_path)
        assert (record["eval/judge/examples"], record["eval/judge/failed"]) == (3, 0)
        assert len(server.requests) == 8 + 2
        server.requests.clear()
        assert record_of(server, pairs, tmp_path) == record and server.requests == []


def test_a_reply_without_a_verdict_that_was_cut_off_names_the_key_that_cut_it(tmp_path: Path) -> None:
    """A judge that thinks first has used up its tokens: its reply is empty, or ends before the verdict."""
    for content in ("null", '"Both have"'):
        fault = f'raw {{"choices": [{{"message": {{"content": {content}}}, "finish_reason": "length"}}]}}'
        said: list[str] = []
        with JudgeServer(faults={-1: fault}).running() as server:
            config = RunConfig(judge=settings(server))
            with pytest.raises(RunError, match="no pair of answers both verdicts"):
                judge_pairs(config, Endpoint(config.judge), pairs_of(["a"], ["b"]), tmp_path, said.append)
        assert len(server.requests) == 2 * 2  # each order twice, and no more
        assert (
            "judge: 2 without a verdict: the reply holds no [[A]], [[B]] or [[C]] and was cut off; "
            in said[-1]
        )
        assert said[-1].endswith("raise judge.max_tokens")


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    duel = Duel("0", "question", "**", "*")
    with JudgeServer(quality).running() as server:
        record = record_of(server, [duel, replace(duel, id="1")], tmp_path)
    assert len(server.requests) == len(lines(tmp_path / "judge.jsonl")) == 2
    assert (record["eval/judge/examples"], record["eval/judge/win_rate"]) == (2, 1.0)


def test_only_what_is_new_is_asked(tmp_path: Path) -> None:
    pairs = pairs_of(["**", "**", "*"], ["*", "*", "**"])
    path = tmp_path / "judge.jsonl"
    with JudgeServer(quality).running() as server:
        first = record_of(server, pairs, tmp_path)
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept[:2]) + kept[2][:40])  # killed while it wrote the third
        server.requests.clear()
        assert record_of(server, pairs, tmp_path) == first and len(server.requests) == 4
        assert len(lines(path)) == 6
        for change, new in (
            ({"model": "judge-2"}, 6),
            ({"temperature": None}, 6),
            ({"concurrency": 1, "retries": 0, "timeout": 20.0}, 0),
        ):
            server.requests.clear()
            more = {**change}
            config = settings(server, **{k: v for k, v in more.items() if k != "model"})
            config.model = more.get("model", config.model)
            run = RunConfig(judge=config)
            judge_pairs(run, Endpoint(config), pairs, tmp_path, lambda line: None)
            assert len(server.requests) == new, change
        server.requests.clear()
        changed = [*pairs[:2], Duel("2", "question 2", "* new", "**")]
        record_of(server, changed, tmp_path)
        assert len(server.requests) == 2


def test_verdicts_with_unusual_characters_are_not_asked_for_again(tmp_path: Path) -> None:
    odd = "first\u2028second\u0085third\x0cfourth\x1dfifth\ud800."
    pairs = pairs_of(["**"], ["*"])

    def says(instruction: str, first: str, second: str) -> str:
        return odd + quality(instruction, first, second)

    with JudgeServer(says).running() as server:
        first = record_of(server, pairs, tmp_path)
        for _ in range(2):  # the second time the file is one that reading the first time wrote
            server.requests.clear()
            assert record_of(server, pairs, tmp_path) == first
            assert server.requests == []


def test_an_endpoint_that_dies_ends_the_run_with_what_it_said(tmp_path: Path) -> None:
    pairs = pairs_of(["**"] * 30, ["*"] * 30)
    server = JudgeServer(quality, faults=dict.fromkeys(range(25, 1000), "status 503"))
    with server.running():
        with pytest.raises(RunError, match=r"10 requests in a row unanswered .*503.*continues from there"):
            record_of(server, pairs, tmp_path, retries=0)
        assert len(lines(tmp_path / "judge.jsonl")) == 25
        server.faults = {}
        server.requests.clear()
        assert record_of(server, pairs, tmp_path)["eval/judge/win_rate"] == 1
        assert len(server.requests) == 35
    refusing = JudgeServer(quality, key="another")
    with refusing.running(), pytest.raises(RunError, match="401"):
        record_of(refusing, pairs_of(["a"], ["b"]), tmp_path)


def test_a_template_of_one_s_own_and_answers_with_braces(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{instruction}|{first}|{second}")
    config = JudgeConfig(model="m", template=str(tmp_path / "mine.txt"))
    one, other = questions(config, [Duel("0", "{first}", "{second} \\1", "{x}")])
    assert one.body["messages"][0]["content"] == "{first}|{second} \\1|{x}"
    assert other.body["messages"][0]["content"] == "{first}|{x}|{second} \\1"
    assert one.key != other.key


def test_verdicts_are_read_off_the_end() -> None:
    assert verdict_of("[[A]] looks good, yet [[B]]", 0) == "theirs"
    assert verdict_of("[[A]]", 1) == "theirs" and verdict_of("[[C]]", 1) == "tie"
    assert verdict_of(" B.\n", 1) == "ours" and verdict_of("**A**", 0) == "ours"
    assert verdict_of("[[B]]: it is right. **[[B]]**, so it wins.", 0) == "theirs"
    assert verdict_of("[[A]] or [[B]]? **[[A]]**.\n", 0) == "ours"
    unclear = "[[A]] is better than [[B]] in every way"  # the last one is not the verdict
    for text in ("", "[[D]]", "A or B", "[A, B]", unclear):
        assert verdict_of(text, 0) is None


def test_the_estimate_by_hand() -> None:
    config = JudgeConfig(model="m", price_in=2.0, price_out=10.0, max_tokens=50)
    asked = questions(config, [Duel("0", "i" * 4000, "o" * 2000, "t" * 2000)])
    tokens = round(sum(len(one.body["messages"][0]["content"]) for one in asked) / 4)
    config.base_url = "http://127.0.0.1:1/v1"
    put = asking(config, Endpoint(config), {}, lambda line: None)
    requests = [request_of(one) for one in asked]
    line = put.estimate(requests, config.max_tokens)
    assert f"2 requests to m, about {tokens:,} tokens" in line and "at most 100 of verdicts" in line
    assert tokens > 4000 and f"at most {(2 * tokens + 10 * 100) / 1e6:.2f}" in line
    config.price_in = config.price_out = None
    assert "price" not in put.estimate(requests, config.max_tokens)


def test_prompts_in_alpaca_eval_s_formats(tmp_path: Path) -> None:
    rows = [
        {"dataset": "koala", "instruction": "a", "output": "x", "generator": "text_davinci_003"},
        {"instruction": "b", "output": "y"},
        {"instruction": "a", "output": "z"},
    ]
    whole, by_line = tmp_path / "eval.json", tmp_path / "eval.jsonl"
    whole.write_text(json.dumps(rows))
    by_line.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(whole)
    assert [(one.instruction, one.theirs, one.ours, one.label) for one in prompts] == [
        ("a", "x", None, None), ("b", "y", None, None), ("a", "z", None, None)
    ]  # fmt: skip
    assert len({one.id for one in prompts}) == 3
    assert [one.id for one in read_prompts(by_line, 2)] == [one.id for one in prompts[:2]]
    assert read_answers(by_line, prompts[:2]) == {prompts[0].id: "x", prompts[1].id: "y"}
    assert list(read_answers(by_line, prompts).values()) == ["x", "y", "z"]  # an instruction comes twice
    by_line.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert list(read_answers(by_line, prompts).values()) == ["x", "y", "x"]
    pairs = tmp_path / "pairs.json"
    both = {"instruction": "a", "output_1": "x", "output_2": "y"}
    pairs.write_text(json.dumps([{**both, "preference": value} for value in (1, 2.0, 1.5, 0, None)]))
    assert [one.label for one in read_prompts(pairs)] == [0.0, 1.0, 0.5, 0.5, None]
    for content, message in (
        ([], "holds no row"),
        ([{"output": "x"}], r"bad\.json:1: instruction is missing"),
        ([{**both, "preference": 3}], "preference=3 is not between 1 and 2"),
        ([{**both, "preference": "good"}], "not a number"),
        ([both, rows[0]], "others have none"),
        (["text"], "row 1"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            read_prompts(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"no answer to 1 of 1 prompts, the first is eval\.json:1"):
        read_answers(by_line, [prompts[0].__class__("0", "eval.json:1", "c")])


def rcpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rcpo.cli", "evaluate", "eval=judge", "judge.backoff=0.01", *arguments]
    return forked.run(command)


@pytest.mark.slow
def test_a_key_leaves_no_trace(tmp_path: Path) -> None:
    """Neither when all goes well, nor where the endpoint repeats it in errors and replies."""
    rows = [{"instruction": f"q{n}", "output_1": "*", "output_2": "*" * (n % 3)} for n in range(6)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    server = JudgeServer(
        lambda *parts: f"{KEY} {quality(*parts)}", key=KEY, faults={1: "status 500", 3: "status 400"}
    )
    with server.running():
        result = rcpo(
            f"judge.base_url={server.url}", "judge.model=judge-1", f"judge.prompts={tmp_path / 'pairs.json'}",
            "judge.price_in=1", f"hydra.run.dir={tmp_path / 'out'}",
        )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "requests to judge-1" in result.stdout and "win rate" in result.stdout
    record = json.loads(Path(tmp_path, "out", "evaluation.json").read_text())
    assert record["eval/judge/failed"] == 1 and record["eval/judge/examples"] == 5
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in result.stdout + result.stderr and len(written) >= 6
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_killed_half_way_and_called_again(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output_1": "*", "output_2": "**"} for n in range(10)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    server = JudgeServer(quality, faults=dict.fromkeys(range(7, 99), "sleep 300"))
    with server.running():
        arguments = [
            f"judge.base_url={server.url}", "judge.model=judge-1", f"judge.prompts={tmp_path / 'pairs.json'}",
            "judge.concurrency=2", f"hydra.run.dir={tmp_path / 'out'}",
        ]  # fmt: skip
        verdicts = tmp_path / "out" / "evaluation" / "judge.jsonl"
        command = [sys.executable, "-m", "rcpo.cli", "evaluate", "eval=judge", *arguments]
        process = forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while time.monotonic() < end and not (verdicts.exists() and len(lines(verdicts)) == 7):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(lines(verdicts)) == 7
        server.faults = {}
        server.requests.clear()
        result = rcpo(*arguments)
        assert result.returncode == 0, result.stderr
        assert len(server.requests) == 13 and "7 verdicts are known from before" in result.stdout


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, Path]:
    """A finished run's folder, as far as the judge looks: its weights are those that it started from."""
    data = sums_file(tmp_path / "pairs.jsonl", 24)
    config = RunConfig()
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.path, config.data.eval_path = "pairs", data, data
    config.eval.preferences, config.eval.judge = False, True
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "model", folder / "final")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "evaluation.json").write_text('{"eval/loss": 1.0, "eval/judge/label_kappa": 0.5}')
    save_run_config(config, folder / "config.yaml")
    return config, folder


def test_a_run_against_its_data_its_reference_and_another_run(
    run: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    """Greedy answers of real weights; an untrained policy ties with its reference without a request."""
    config, folder = run
    distributed.initialize()
    (tmp_path / "questions.json").write_text(json.dumps([{"instruction": "1+1=", "output": "2"}] * 3))
    config.eval.max_new_tokens = 6
    with JudgeServer(longer).running() as server:
        for against, prompts, limit, requests, count in (
            (None, None, 5, 10, 5),
            ("reference", None, None, 0, 24),
            (str(folder), None, None, 0, 24),
            (str(tmp_path / "model"), "questions.json", None, 0, 3),
            (None, "questions.json", None, 2, 3),  # one question three times
        ):
            server.requests.clear()
            file = None if prompts is None else str(tmp_path / prompts)
            config.judge = settings(server, against=against, prompts=file, max_examples=limit)
            assert evaluate_run(config, folder) == 0
            assert len(server.requests) == requests, against
            record = json.loads((folder / "evaluation.json").read_text())
            assert record["eval/judge/examples"] == count and record["eval/loss"] == 1.0
            assert "eval/judge/label_kappa" not in record  # that of another judgement
            if not requests:
                assert record["eval/judge/ties"] == 1 and record["eval/judge/win_rate"] == 0.5
    # the answer is what transformers itself generates
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("1+1=", add_special_tokens=False)["input_ids"]]])
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    rows = json.loads((folder / "evaluation" / "judge_annotations.json").read_text())
    assert {row["output_2"] for row in rows} == {tokenizer.decode(answer, skip_special_tokens=True).strip()}
    assert json.loads((folder / "evaluation" / "judge.json").read_text())["model"] == "judge-1"


@pytest.mark.slow
def test_two_processes_share_the_answers(run: tuple[RunConfig, Path]) -> None:
    _, folder = run
    # longer than a sign of life to the rank that waits
    with JudgeServer(longer, faults={3: "sleep 5"}).running() as server:
        result = rcpo(
            f"run={folder}", f"judge.base_url={server.url}", "judge.model=judge-1", "launch.processes=2",
            "eval.max_new_tokens=4", "judge.max_examples=7",
        )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(server.requests) == 14 + 1  # the silent one was asked again
    assert json.loads((folder / "evaluation.json").read_text())["eval/judge/examples"] == 7


def test_what_cannot_be_judged_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    for arguments, message in (
        ([], "eval.judge=true needs an OpenAI-compatible endpoint: judge.base_url="),
        (["judge.base_url=https://user:pass@host/v1", "judge.model=m"], "judge.base_url holds a user"),
    ):
        result = rcpo(*arguments, f"hydra.run.dir={tmp_path / 'out'}")
        assert result.returncode == 2 and message in result.stderr and "pass@" not in result.stderr
    assert not list(tmp_path.iterdir())
