"""Sampling, scoring, pairing: the same result for any number of ranks, after any kill, through any fault."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoints import answering
from judge_server import JudgeServer
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tiny import TOKENIZER, sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rcpo.config.onpolicy import OnPolicyConfig, PairingConfig, SampleConfig, ScoreConfig
from rcpo.config.schema import RunConfig
from rcpo.data.dataset import load_datasets
from rcpo.errors import ConfigError, RunError
from rcpo.evaluation.endpoint import Endpoint
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_tokenizer, model_folder
from rcpo.onpolicy import scores, work
from rcpo.onpolicy.answers import Answer
from rcpo.onpolicy.kept import Kept
from rcpo.onpolicy.pairs import finished_pairs
from rcpo.onpolicy.prompts import Prompt, _written, load_prompts
from rcpo.onpolicy.ratings import compare, rating_of
from rcpo.onpolicy.scoring_models import RewardModel
from rcpo.onpolicy.settings import Settings
from rcpo.system import distributed
from rcpo.system.signals import STOPPED


def settings(**nodes: Any) -> Settings:
    """16 of 640 prompts of the packaged task, 6 answers each, on the packaged model."""
    config = RunConfig()
    config.data.train_examples = 640
    sample = {"n": 6, "prompts": 16, "batch_size": 8, **nodes.pop("sample", {})}
    given = OnPolicyConfig(sample=SampleConfig(**sample), **nodes)
    return Settings(config, given)


def rows(folder: Path, name: str = "pairs.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    return found


def results(folder: Path) -> list[Any]:
    """The pairs and all about them but the state of the checkout, which may change while tests run."""
    return [(folder / "pairs.jsonl").read_bytes(), {**about(folder), "rcpo": None}]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert work.make(settings(), folder) == 0
    return folder


def test_pairs_are_right_and_wrong_answers_that_the_data_pipeline_reads(
    unbroken: Path, tmp_path: Path
) -> None:
    made = rows(unbroken)
    assert 2 <= len(made) == about(unbroken)["pairs"]
    for row in made:
        total = str(sum(map(int, row["prompt"].rstrip("=").split("+"))))
        # how the packaged task answers; "the is 145" is not an answer
        said = ("", "= ", "it is ", "that is ", "the sum is ", "the answer is ")
        right = {f"{words}{total}" for words in said}
        assert row["chosen"] in right and row["rejected"] not in right
        assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
    config = RunConfig()
    config.data.name, config.data.path, config.data.eval_fraction = (
        "pairs",
        str(unbroken / "pairs.jsonl"),
        0.0,
    )
    config.data.workers = 0
    distributed.initialize()
    datasets = load_datasets(config.data, load_tokenizer(model_folder(config.model), config.model), 1)
    assert len(datasets.train) == len(made)
    counts = about(unbroken)
    assert counts["prompts"]["asked"] == 16 and counts["answers"]["wanted"] == 96
    assert len(made) + sum(value for name, value in counts["prompts"].items() if name != "asked") == 16


def test_no_prompt_is_held_out_and_rounds_take_others_until_all_were_taken(tmp_path: Path) -> None:
    distributed.initialize()
    config = RunConfig()
    config.data.train_examples = 48
    tokenizer = load_tokenizer(model_folder(config.model), config.model)
    prompts = load_prompts(config.data, tokenizer, 1, tmp_path)
    datasets = load_datasets(config.data, tokenizer, 1)
    assert {tuple(one.tokens) for one in prompts.prompts} == {tuple(one.prompt) for one in datasets.train}
    assert datasets.evaluation is not None
    assert not {tuple(one.tokens) for one in prompts.prompts} & {
        tuple(one.prompt) for one in datasets.evaluation
    }
    thirds = [[one.id for one in prompts.share(16, number)] for number in (1, 2, 3)]
    assert len({name for third in thirds for name in third}) == 48
    assert [one.id for one in prompts.share(16, 4)] == thirds[0]
    assert [one.id for one in load_prompts(config.data, tokenizer, 2, tmp_path).share(16, 1)] != thirds[0]


def make_on_rank(folder: Path, nodes: dict[str, Any]) -> None:
    assert work.make(settings(**nodes), folder) == 0


def test_two_ranks_make_one_rank_s_pairs(unbroken: Path, tmp_path: Path) -> None:
    on_ranks(2, make_on_rank, tmp_path, {})
    assert results(tmp_path) == results(unbroken)
    assert {path.name for path in (tmp_path / "answers").glob("*.jsonl")} == {"rank-0.jsonl", "rank-1.jsonl"}


class Killed(BaseException):
    """What a process that is killed does not do: go on."""


def kill_after(monkeypatch: pytest.MonkeyPatch, count: int, torn: bytes) -> None:
    """The `count`-th row is written in part, and the process is gone."""
    write = Kept.write
    left = iter(range(count))

    def until_killed(self: Kept, row: dict[str, Any]) -> None:
        if next(left, None) is not None:
            write(self, row)
            return
        assert self._file is not None
        self._file._file.flush()
        with self._own.open("ab") as file:
            file.write(torn)
        raise Killed

    monkeypatch.setattr(Kept, "write", until_killed)


@pytest.mark.parametrize(
    ("count", "torn"), [(0, b""), (5, b'{"key": "12'), (8, b'{"key": "1/2", "text": "\xe2\x80'), (61, b"")]
)
def test_killed_at_any_answer_and_called_again(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, torn: bytes
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, count, torn)
        with pytest.raises(Killed):
            work.make(settings(), tmp_path)
    assert len(Kept(tmp_path / "answers").read()) == count
    assert work.make(settings(), tmp_path) == 0
    assert results(tmp_path) == results(unbroken)
    lines = (tmp_path / "answers" / "rank-0.jsonl").read_text().split("\n")
    assert len(lines) == 97 and all(json.loads(line) for line in lines[:-1])  # none lost, none twice


def test_a_folder_of_two_ranks_is_finished_by_one(unbroken: Path, tmp_path: Path) -> None:
    on_ranks(2, make_on_rank, tmp_path, {})
    for path in (tmp_path / "answers").glob("rank-*.jsonl"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    (tmp_path / "pairs.jsonl").unlink()
    assert work.make(settings(), tmp_path) == 0
    assert results(tmp_path) == results(unbroken)


def test_a_stop_signal_ends_it_with_what_was_answered(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Kept.write

    def stopping(self: Kept, row: dict[str, Any]) -> None:
        write(self, row)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", stopping)
        assert work.make(settings(), tmp_path) == STOPPED
    assert len(Kept(tmp_path / "answers").read()) == 8  # the batch that was under way
    assert work.make(settings(), tmp_path) == 0 and results(tmp_path) == results(unbroken)


def test_other_settings_are_refused_and_other_scores_cost_no_answer(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work.make(settings(), tmp_path) == 0
    with pytest.raises(ConfigError, match=r"temperature: 1\.0 -> 0\.5"):
        work.make(settings(sample={"temperature": 0.5}), tmp_path)
    other = settings()
    other.config.seed = 2
    with pytest.raises(ConfigError, match="seed: 1 -> 2"):
        work.make(other, tmp_path)
    with pytest.raises(ConfigError, match="round: 1 -> 2"):  # its draws would be those of round 1
        work.make(settings(sample={"round": 2}), tmp_path)
    assert results(tmp_path) == results(unbroken)

    def no_more(*_: Any) -> None:
        raise AssertionError("an answer is made again")

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", no_more)
        shortest = settings(score=ScoreConfig(name="length"), pairing=PairingConfig(min_margin=10))
        assert work.make(shortest, tmp_path) == 0
    made = rows(tmp_path)
    assert made and all(row["score_chosen"] == len(row["chosen"]) for row in made)
    assert all(len(row["chosen"]) - len(row["rejected"]) >= 10 for row in made)


def test_where_no_prompt_gives_a_pair(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"no prompt gave a pair.*sample\.temperature"):
        work.make(settings(sample={"temperature": 1e-3, "prompts": 4}), tmp_path)
    assert sum(about(tmp_path)["prompts"].get(name, 0) for name in ("all_right", "one_answer")) == 4
    assert rows(tmp_path) == [] and finished_pairs(tmp_path) is None
    # what the message advises can be tried in the same folder: of the answers before, none is worth keeping
    assert work.make(settings(), tmp_path) == 0 and results(tmp_path) == results(unbroken)
    assert "gave no pair and were made with other settings: they are removed" in capsys.readouterr().out
    assert finished_pairs(tmp_path) is not None


def endpoint(url: str, **more: Any) -> dict[str, Any]:
    quick = {"timeout": 5.0, "retries": 3, "backoff": 0.01, "concurrency": 4}
    return {"base_url": url, "model": "served", "prompts": 8, "n": 4, **quick, **more}


def test_an_endpoint_s_faults_change_nothing(tmp_path: Path) -> None:
    """Limits, errors, resets, cut replies, time-outs: every answer comes once, under its own seed."""
    with answering() as server:
        assert work.make(settings(sample=endpoint(server.url)), tmp_path / "sound") == 0
        assert len(server.requests) == 32 and server.most_at_once <= 4
    one = server.requests[0]
    assert one["route"] == "/v1/completions" and one["model"] == "served" and one["max_tokens"] == 18
    assert (one["temperature"], one["top_p"]) == (1.0, 1.0)
    assert len({(request["prompt"], request["seed"]) for request in server.requests}) == 32
    faults = [
        "limit 0.1",
        "status 500",
        "disconnect",
        "break",
        "raw {",
        "limit",
        'raw {"choices": []}',
        "sleep 1",
    ]
    broken = {4 * number: fault for number, fault in enumerate(faults)}
    with answering(faults=broken) as server:
        slow = endpoint(server.url, timeout=0.5, retries=8)
        assert work.make(settings(sample=slow), tmp_path / "faulty") == 0
        assert len(server.requests) == 32 + len(faults)
    assert rows(tmp_path / "faulty") == rows(tmp_path / "sound") != []
    counts = about(tmp_path / "sound")["answers"]
    cut = sum(request["seed"] % 7 == 0 for request in {r["seed"]: r for r in server.requests}.values())
    assert counts["cut_off"] == cut > 0 and counts["unanswered"] == 0


@pytest.mark.parametrize("finish", ["length", "content_filter", "abort"])
def test_an_answer_that_an_endpoint_cuts_off_is_in_no_pair(tmp_path: Path, finish: str) -> None:
    reply = {"choices": [{"text": "9", "finish_reason": finish}]}
    fails = pytest.raises(RunError, match="no prompt gave a pair")
    with answering(faults={-1: f"raw {json.dumps(reply)}"}) as server, fails:
        work.make(settings(sample=endpoint(server.url, prompts=2)), tmp_path)
    assert about(tmp_path)["answers"]["cut_off"] == 8


def test_an_endpoint_that_dies_is_asked_for_the_rest_alone(tmp_path: Path) -> None:
    with answering(faults=dict.fromkeys(range(12, 999), "status 503")) as server:
        with pytest.raises(RunError, match="10 requests in a row unanswered"):
            work.make(settings(sample=endpoint(server.url, retries=0)), tmp_path)
        assert len(Kept(tmp_path / "answers").read()) == 12
        server.faults = {}
        server.requests.clear()
        assert work.make(settings(sample=endpoint(server.url)), tmp_path) == 0
        assert len(server.requests) == 20
        with pytest.raises(ConfigError, match=r"policy: served at .* -> other at"):
            work.make(settings(sample=endpoint(server.url, model="other")), tmp_path)


def test_a_key_that_is_refused_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with (
        answering(key="sk-other") as server,
        pytest.raises(ConfigError, match=r"sample\.base_url=.*401") as refused,
    ):
        work.make(settings(sample=endpoint(server.url)), tmp_path)
    assert "sk-mine" not in str(refused.value) and not server.requests


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversations(path: Path) -> str:
    content = [
        {
            "prompt": [{"role": "user", "content": f"{10 + n}+{20 + n}="}],
            "chosen": [{"role": "assistant", "content": str(30 + 2 * n)}],
            "rejected": [{"role": "assistant", "content": "1"}],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def test_conversations_go_to_the_chat_route_and_stay_conversations(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jinja"
    chat.write_text(CHAT)
    with answering() as server:
        given = settings(sample=endpoint(server.url, prompts=6), score=ScoreConfig(name="number"))
        data = given.config.data
        data.name, data.path, data.workers = "pairs", conversations(tmp_path / "chat.jsonl"), 0
        data.template, data.system_prompt, data.eval_fraction = str(chat), "Add.", 0.25
        assert work.make(given, tmp_path / "out") == 0
        assert all(request["route"] == "/v1/chat/completions" for request in server.requests)
    asked = {json.dumps(request["messages"]) for request in server.requests}
    assert len(asked) == 6 and all(
        json.loads(one)[0] == {"role": "system", "content": "Add."} for one in asked
    )
    made = rows(tmp_path / "out")
    assert made and all([message["role"] for message in row["prompt"]] == ["system", "user"] for row in made)
    for row in made:
        total = sum(map(int, row["prompt"][1]["content"].rstrip("=").split("+")))
        assert row["chosen"] == [{"role": "assistant", "content": str(total)}]
        assert row["rejected"] == [{"role": "assistant", "content": str(total + 1)}]


def test_a_prompt_that_training_cuts_is_not_asked_whole(tmp_path: Path) -> None:
    with answering() as server, pytest.raises(ConfigError, match=r"longer than data\.max_prompt_length"):
        given = settings(sample=endpoint(server.url))
        given.config.data.max_prompt_length = 4
        work.make(given, tmp_path)
    assert not server.requests


def counting_reward(folder: Path, token: str, *, pad: int | None) -> str:
    """A reward model whose score is known: 1 for rows whose last token is `token`'s, else 0.

    One layer whose attention and MLP write zeros leaves the last token's own embedding, whose first entry
    the head reads; every embedding has length 1, so that the norm changes nothing but a factor.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, num_labels=1, pad_token_id=pad, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 1] = 8**0.5
        [number] = tokenizer(token, add_special_tokens=False)["input_ids"]
        model.model.embed_tokens.weight[number] = 0
        model.model.embed_tokens.weight[number, 0] = 8**0.5
        model.score.weight.zero_()
        model.score.weight[0, 0] = 1 / 8**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad", [0, None])
def test_a_reward_model_with_known_scores(tmp_path: Path, pad: int | None) -> None:
    """Its own template ends each conversation with ";"; a text's last token decides where it has none."""
    path = counting_reward(tmp_path / "reward", ";", pad=pad)
    given = settings(score=ScoreConfig(name="reward_model", path=path, batch_size=5), sample={"n": 4})
    with pytest.raises(RunError, match="no prompt gave a pair"):  # all end in ";": all have the score 1
        work.make(given, tmp_path / "out")
    scored = Kept(tmp_path / "out" / "scores").read()
    assert len(scored) > 16 and all(abs(row["score"] - 1) < 1e-5 for row in scored.values())
    path = counting_reward(tmp_path / "nine", "9", pad=pad)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(path)
    given = settings(score=ScoreConfig(name="reward_model", path=path, batch_size=5), sample={"n": 4})
    given.nodes.sample.prompts = 64
    assert work.make(given, tmp_path / "other") == 0
    for row in rows(tmp_path / "other"):
        assert row["chosen"].endswith("9") and not row["rejected"].endswith("9")
        assert abs(row["score_chosen"] - 1) < 1e-5 and abs(row["score_rejected"]) < 1e-5


def test_scores_are_kept_and_a_kill_among_them_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = counting_reward(tmp_path / "reward", "9", pad=0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(path)

    def given() -> Settings:
        score = ScoreConfig(name="reward_model", path=path, batch_size=5)
        made = settings(score=score, sample={"n": 4, "prompts": 24})
        made.config.data.train_examples = 6400  # to whose first 24 prompts some answers end in 9, others not
        return made

    assert work.make(given(), tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        kill_after(patch, 96 + 13, b'{"key')
        with pytest.raises(Killed):
            work.make(given(), tmp_path / "killed")
    assert len(Kept(tmp_path / "killed" / "scores").read()) == 13
    assert work.make(given(), tmp_path / "killed") == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_classifier_of_more_labels_and_a_missing_template_are_refused_first(tmp_path: Path) -> None:
    path = counting_reward(tmp_path / "reward", "9", pad=0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
    given = settings(score=ScoreConfig(name="reward_model", path=path))
    data = given.config.data
    data.name, data.path, data.workers = "pairs", conversations(tmp_path / "chat.jsonl"), 0
    data.template = "chatml"
    with pytest.raises(ConfigError, match=r"the reward model in .* has no chat template"):
        work.make(given, tmp_path / "out")
    config = json.loads((Path(path) / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (Path(path) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has 2 labels"):
        work.make(given, tmp_path / "out")
    assert not (tmp_path / "out" / "answers").exists()


def test_a_reward_model_without_its_head_is_refused_first(tmp_path: Path) -> None:
    """transformers would draw the head's weights at random, and with them the scores."""
    path = Path(counting_reward(tmp_path / "reward", "9", pad=0))
    weights = load_file(path / "model.safetensors")
    head = weights.pop("score.weight")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    given = settings(score=ScoreConfig(name="reward_model", path=str(path)))
    reason = r"needs score\.weight, which is not there; give a whole sequence-classification model"
    with pytest.raises(ConfigError, match=reason):
        RewardModel(given.config, given.nodes.score)
    more = {"score.weight": head, "lm_head.weight": torch.zeros(100, 8)}  # saved with the head that it had
    save_file(weights | more, path / "model.safetensors", {"format": "pt"})
    RewardModel(given.config, given.nodes.score)
    settings_file = path / "config.json"
    changed = json.loads(settings_file.read_text()) | {"model_type": "mamba", "architectures": None}
    settings_file.write_text(json.dumps(changed))
    with pytest.raises(
        ConfigError, match=r"the model in .* cannot be loaded: Unrecognized configuration class"
    ):
        RewardModel(given.config, given.nodes.score)


def test_a_conversation_that_a_reward_model_s_template_refuses_is_refused_first(tmp_path: Path) -> None:
    path = Path(counting_reward(tmp_path / "reward", "9", pad=0))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = refusing
    tokenizer.save_pretrained(path)
    asked = {"role": "user", "content": "2+3="}
    prompts = [
        Prompt("p", "x:1", [asked], "2+3=", [], None, {}),
        Prompt("q", "x:2", [{"role": "system", "content": "s"}, asked], "s2+3=", [], None, {}),
    ]
    distributed.initialize()
    score = ScoreConfig(name="reward_model", path=str(path))
    with pytest.raises(
        ConfigError, match=r"x:2: the chat template of the reward model in .*: no system; give"
    ):
        scores.prepare(
            RunConfig(), score, prompts, ModelSource(path), tmp_path, lambda line: None, lambda: False
        )


def test_log_likelihoods_are_the_model_s_own(tmp_path: Path) -> None:
    """Against transformers' loss on each answer by itself: no padding, no batch."""
    given = settings(score=ScoreConfig(name="loglik", batch_size=7), sample={"n": 3, "prompts": 6})
    assert work.make(given, tmp_path) == 0
    folder = model_folder(given.config.model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    checked = 0
    for row in rows(tmp_path):
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            assert row[f"score_{side}"] == pytest.approx(-model(ids, labels=labels).loss.item(), abs=1e-5)
            checked += 1
    assert checked >= 8


def test_an_answer_that_the_template_does_not_render_has_no_score(tmp_path: Path) -> None:
    """Generation begins in a block of thoughts, which an answer has to close: the second does not."""
    folder = Path(tiny_llama(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    asked = [{"role": "user", "content": "2+3="}]
    prompt = Prompt("p", "x:1", asked, "user:2+3=;assistant:<think>", [], None, {})
    distributed.initialize()
    arguments = RunConfig(), ScoreConfig(name="loglik"), [prompt], ModelSource(folder)
    score = scores.prepare(*arguments, tmp_path, lambda line: None, lambda: False)
    found = score([Answer(prompt, 0, "sum</think>5", True), Answer(prompt, 1, "5", True)])
    assert set(found) == {"p/0"}
    before = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    after = [*tokenizer("sum</think>5;", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(folder)
    labels = torch.tensor([[-100] * len(before) + after])
    loss = model(torch.tensor([before + after]), labels=labels).loss.item()
    assert found["p/0"] == pytest.approx(-loss, abs=1e-5)


def test_kept_scores_are_those_of_one_chat_template(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("one")
    config, score = RunConfig(), ScoreConfig(name="reward_model", path=str(tmp_path))
    before = scores.score_identity(config, score, ModelSource(tmp_path), None)
    assert scores.score_identity(config, score, ModelSource(tmp_path), None) == before
    (tmp_path / "chat_template.jinja").write_text("two")
    assert scores.score_identity(config, score, ModelSource(tmp_path), None) != before


def judge_settings(server: JudgeServer, mode: str) -> Settings:
    given = settings(score=ScoreConfig(name="judge", mode=mode), sample={"n": 3, "prompts": 6})
    judge = given.config.judge
    judge.base_url, judge.model, judge.concurrency, judge.backoff = server.url, "judge-1", 4, 0.01
    return given


def test_a_judge_compares_each_two_answers_in_both_orders(tmp_path: Path) -> None:
    """It prefers the longer one: an answer's share of wins is that of the answers that it outgrows."""
    with JudgeServer().running() as server:
        given = judge_settings(server, "pairwise")
        assert work.make(given, tmp_path) == 0
        asked = len(server.requests)
        made = rows(tmp_path)
        assert work.make(given, tmp_path) == 0 and len(server.requests) == asked and rows(tmp_path) == made
    assert made and all(len(row["chosen"]) > len(row["rejected"]) for row in made)
    assert all(row["score_chosen"] in (0.5, 0.75, 1.0) for row in made)
    texts = [row["text"] for row in Kept(tmp_path / "answers").read().values()]
    assert asked <= 6 * 3 * 2 and len(texts) == 18


def test_equal_answers_tie_without_a_question(tmp_path: Path) -> None:
    prompt = Prompt("p", "x:1", "2+3=", "2+3=", [], None, {})
    with JudgeServer().running() as server:
        judge = judge_settings(server, "pairwise").config.judge
        answers = [Answer(prompt, number, "5", True) for number in range(3)]
        found = compare(judge, Endpoint(judge), answers, tmp_path, lambda line: None, lambda: False)
        assert not server.requests
    assert found == {"p/0": 0.5, "p/1": 0.5, "p/2": 0.5}


def test_a_judge_s_ratings_and_those_that_are_none(tmp_path: Path) -> None:
    from judge_server import _Handler, completion

    class Handler(_Handler):
        def _complete(self, fault: str, body: dict[str, Any]) -> None:
            text = body["messages"][0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
            self._send(
                200, completion(f"Out of [[10]]: [[{min(10, len(text))}]]" if text[0] != "t" else "Hm.")
            )

    server = JudgeServer()
    with server.running(Handler):
        given = judge_settings(server, "rating")
        assert work.make(given, tmp_path) == 0
        made, asked = rows(tmp_path), len(server.requests)
        assert about(tmp_path)["answers"]["unscored"] > 0  # "the sum is 12", "that is 12": asked twice each
        assert work.make(given, tmp_path) == 0
        assert len(server.requests) == asked + 2 * len(unrated(tmp_path))
    assert made and all(
        row[f"score_{side}"] == len(row[side]) for row in made for side in ("chosen", "rejected")
    )


def unrated(folder: Path) -> set[tuple[str, str]]:
    found = Kept(folder / "answers").read().items()
    return {
        (key.split("/")[0], row["text"]) for key, row in found if row["text"].startswith("t") and row["ended"]
    }


@pytest.mark.parametrize(
    ("reply", "mark"),
    [("[[7]]", 7), ("From [[1]] to [[10]]: [[8.5]]", 8.5), (" 6.\n", 6), ("**9**", 9), ("[[11]]", None),
     ("[[0]]", None), ("7 of 10", None), ("", None), ("[[seven]]", None),
     ("[[7]], and not [[10]] as asked", None), ("[[7]]. A fair answer.", 7)],
)  # fmt: skip
def test_ratings_are_read_off_the_end(reply: str, mark: float | None) -> None:
    assert rating_of(reply) == mark


def test_prompts_may_hold_what_json_does_not() -> None:
    said = {"role": "user", "content": "2+3=", "at": datetime(2024, 1, 1), "score": float("nan")}
    row = _written(Prompt("p", "x:1", [said], "2+3=", [5], None, {}))
    assert row["content"] == [said | {"at": "2024-01-01 00:00:00", "score": "nan"}]
    assert Prompt(**json.loads(json.dumps(row, allow_nan=False))).tokens == [5]


def test_verifiable_scores_need_a_right_answer(tmp_path: Path) -> None:
    given = settings(score=ScoreConfig(name="number"))
    data = given.config.data
    data.name, data.workers = "pairs", 0
    data.path = str(tmp_path / "unpaired.jsonl")
    lines = [{"prompt": f"{n}+1=", "completion": "2", "label": n % 2 == 0} for n in range(10, 20)]
    Path(data.path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"score=number: .* has no chosen response"):
        work.make(given, tmp_path / "out")


def test_a_prompt_of_unpaired_rows_has_the_chosen_response_of_any_of_them(tmp_path: Path) -> None:
    path = tmp_path / "unpaired.jsonl"
    lines = [
        {"prompt": f"{n}+1=", "completion": f"{n + wrong}", "label": wrong == 1}
        for n in range(10, 30)
        for wrong in (2, 1, 3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = RunConfig()
    config.data.name, config.data.path, config.data.workers = "pairs", str(path), 0
    distributed.initialize()
    tokenizer = load_tokenizer(Path(tiny_llama(tmp_path / "model")), config.model)
    prompts = load_prompts(config.data, tokenizer, 1, tmp_path / "out").prompts
    assert len(prompts) == 18
    assert all(one.chosen == str(int(one.text[:2]) + 1) for one in prompts)
    assert all(int(one.place.split(":")[1]) % 3 == 1 for one in prompts)  # the first row, an unwanted one


def test_a_file_s_prompts_each_once_with_their_first_chosen(tmp_path: Path) -> None:
    path = sums_file(tmp_path / "pairs.jsonl", 20)
    content = Path(path).read_text()
    Path(path).write_text(content + content.replace("109", "108"))
    config = RunConfig()
    config.data.name, config.data.path, config.data.workers, config.data.eval_fraction = "pairs", path, 0, 0.2
    distributed.initialize()
    tokenizer = load_tokenizer(Path(tiny_llama(tmp_path / "model")), config.model)
    prompts = load_prompts(config.data, tokenizer, 1, tmp_path / "out").prompts
    assert len(prompts) == 16 and {one.chosen for one in prompts} == {"= 109", "it is 109"}
    assert all(one.place.startswith("pairs.jsonl:") and int(one.place.split(":")[1]) <= 20 for one in prompts)
