"""`rcpo push`: final/ arrives whole or not at all, in a private repository; every refusal has its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import save_file

from rcpo.commands.push import push
from rcpo.errors import ConfigError, RunError

REPO = "owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by LFS
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "final" / "merged").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 2\n")
    (folder / "finished.json").write_text("{}")
    for name in ("config.json", "merged/config.json", ".hidden"):
        (folder / "final" / name).write_text(f'{{"name": "{name}"}}')
    save_file({"w": torch.arange(4.0)}, folder / "final" / "model.safetensors")
    return folder


def words(run_dir: Path, *more: str) -> list[str]:
    return [f"run={run_dir}", f"repo={REPO}", *more]


def test_all_of_final_arrives_in_one_commit_of_a_private_repository(
    hub: HubServer, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(words(run_dir)) == 0
    assert hub.private == {REPO: True}
    sent = hub.files[f"{REPO}@main"]
    assert set(sent) == {"README.md", "config.json", "merged/config.json", "model.safetensors"}
    for name, data in sent.items():
        assert data == (run_dir / "final" / name).read_bytes(), name
    assert [commit["summary"] for commit in hub.commits] == ["Upload run, trained by rcpo"]
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out


def test_a_dry_run_lists_the_files_and_asks_nobody(
    hub: HubServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert push(words(run_dir), dry_run=True) == 0
    assert push(words(run_dir, "push.dry_run=true", "push.private=false")) == 0
    text = capsys.readouterr().out
    assert "model.safetensors" in text and "4 files" in text and "nothing was sent" in text
    assert f"to {REPO} (private, main)" in text and f"to {REPO} (public, main)" in text
    assert hub.requests == []


def test_an_adapter_on_a_base_of_this_machine_is_pushed_with_a_warning(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = run_dir / "final" / "adapter_config.json"
    for base, warned in (("/models/base", True), ("org/base", False)):
        settings.write_text(f'{{"base_model_name_or_path": "{base}"}}')
        assert push(words(run_dir), dry_run=True) == 0
        assert ("others, write the base model's name" in capsys.readouterr().out) is warned


def test_an_interrupted_upload_is_tried_again(hub: HubServer, run_dir: Path) -> None:
    hub.cut = 2
    assert push(words(run_dir)) == 0
    sent = hub.files[f"{REPO}@main"]["model.safetensors"]
    assert sent == (run_dir / "final" / "model.safetensors").read_bytes()
    assert sum(line.startswith("PUT") for line in hub.requests) == 3


def test_an_upload_that_stays_interrupted_commits_nothing_and_the_next_call_ends_it(
    hub: HubServer, run_dir: Path
) -> None:
    hub.cut = 1000
    with pytest.raises(RunError, match=r"repo=owner/name: the upload failed .*the same command sends"):
        push(words(run_dir))
    assert hub.commits == []
    hub.cut = 0
    assert push(words(run_dir)) == 0 and len(hub.commits) == 1


def test_the_second_push_sends_no_weights_again(hub: HubServer, run_dir: Path) -> None:
    assert push(words(run_dir)) == 0
    before = sum(line.startswith("PUT") for line in hub.requests)
    assert push(words(run_dir, "push.message=again", "push.revision=v2")) == 0
    assert sum(line.startswith("PUT") for line in hub.requests) == before
    assert hub.commits[1]["summary"] == "again" and hub.commits[1]["revision"] == "v2"


def test_a_public_repository_is_written_only_on_purpose(hub: HubServer, run_dir: Path) -> None:
    hub.private[REPO] = False
    with pytest.raises(ConfigError, match=r"repo=owner/name is public: .*add push.private=false"):
        push(words(run_dir))
    assert hub.commits == []
    assert push(words(run_dir, "push.private=false")) == 0 and len(hub.commits) == 1


@pytest.mark.parametrize(
    ("token", "refused", "message"),
    [
        ("hf_wrong", None, "does not accept this machine's token; log in with `hf auth login`"),
        (TOKEN, 403, "your token may not write there"),
        ("", None, "this machine has no token of the hub; log in"),
    ],
)
def test_a_token_that_will_not_do(
    hub: HubServer,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    refused: int | None,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run_dir / "no-token"))
    hub.refused = refused
    with pytest.raises(ConfigError, match=message):
        push(words(run_dir))
    assert hub.commits == []


def test_a_hub_that_fails_is_a_failure_with_its_own_words(hub: HubServer, run_dir: Path) -> None:
    hub.private[REPO], hub.refused = True, 507
    with pytest.raises(RunError, match=r"status 507: You don't have the rights"):
        push(words(run_dir))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["repo=owner/name"], "rcpo push needs run=DIR"),
        (["run={run}"], "rcpo push needs repo=OWNER/NAME"),
        (["run={run}", "repo=name"], "repo=name lacks its owner"),
        (["run={run}", "repo=a/b/c"], "repo=a/b/c cannot be a name on the hub"),
        (["run={run}/none", "repo=owner/name"], "is not the folder of a run"),
        (["run={run}", "repo=owner/name", "push.privat=false"], "push.private"),
        (["run={run}", "repo=owner/name", "seed=2"], "seed=2: rcpo push reads run=, repo="),
    ],
)
def test_what_cannot_be_pushed(run_dir: Path, given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        push([word.format(run=run_dir) for word in given])


def test_a_run_without_whole_weights_is_refused(run_dir: Path) -> None:
    weights = run_dir / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"run=.*model.safetensors has .* bytes instead of"):
        push(words(run_dir))
    (run_dir / "final" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no final/ yet; finish it with resume="):
        push(words(run_dir))
