"""Names of the hub: from a cache without a network, from a server that speaks as the hub does, refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import sums_file, tiny_llama

from rcpo.config.model import is_hub_name
from rcpo.errors import ConfigError
from rcpo.models import hub

COMMIT = "0123456789" * 4


def cached(cache: Path, name: str, source: str) -> Path:
    """The snapshot of a repository in the hub's cache, as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    Path(source).rename(snapshot)
    return snapshot


def rcpo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rcpo.cli", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_what_can_be_a_name() -> None:
    assert all(map(is_hub_name, ["gpt2", "EleutherAI/pythia-410m", "Qwen/Qwen2.5-7B-Instruct", "a/b_c.d"]))
    assert not any(map(is_hub_name, ["", ".", "./a", "/a", "~/a", "a/b/c", "a/", "a b", "../a"]))


@pytest.mark.slow
def test_a_run_on_a_machine_without_a_network(tmp_path: Path) -> None:
    cached(tmp_path / "cache", "owner/small", tiny_llama(tmp_path / "model"))
    arguments = [
        "train", "model=local", "model.path=owner/small", "model.attention=eager", "data=pairs",
        f"data.path={sums_file(tmp_path / 'pairs.jsonl', 24)}", "train.max_steps=1", "train.batch_size=4",
        "train.micro_batch_size=4", "eval.generate_examples=0", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    result = rcpo(*arguments, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    absent = rcpo(*arguments[:-1], "hydra.run.dir=" + str(tmp_path / "other"), HF_HUB_OFFLINE="1",
                  HF_HUB_CACHE=str(tmp_path / "empty"))  # fmt: skip
    assert absent.returncode == 2 and not (tmp_path / "other").exists()
    for part in ("model.path=owner/small", "HF_HUB_OFFLINE is set", "hf download owner/small"):
        assert part in absent.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download of one repository asks for."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _serve(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "gated" in path:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if "owner/small" not in path:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if "elsewhere" in path:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if "/resolve/" in path:
            name = path.rpartition(f"{COMMIT}/")[2]
            if body:
                self.asked.append(name)
            content = (self.folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        names = [entry.name for entry in self.folder.iterdir()]
        files = [{"rfilename": name} for name in names]
        answer: Any = {"id": "owner/small", "sha": COMMIT, "siblings": files}
        if "/tree/" in path:
            answer = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name}
                for name in names
            ]
        return self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _answer(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    Hub.folder, Hub.asked = Path(tiny_llama(tmp_path / "served")), []
    (Hub.folder / "modeling_own.py").write_text("raise SystemExit('run')\n")
    (Hub.folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (Hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from rcpo.models import hub
from rcpo.errors import ConfigError
for name, revision, pickle, code in {calls}:
    try:
        print("fetched", hub.fetch("model.path", name, revision, pickle=pickle, code=code))
    except ConfigError as error:
        print("refused", error)
"""


def fetches(server: str, cache: Path, *calls: tuple[str, str | None, bool, bool]) -> list[str]:
    """In a process of its own: the library reads its environment once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server, "HF_HUB_CACHE": str(cache),
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-c", FETCH.format(calls=calls)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_download_takes_what_is_read_and_no_code_and_no_pickle(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (line,) = fetches(server, cache, ("owner/small", None, False, False))
    folder = Path(line.removeprefix("fetched "))
    present = {entry.name for entry in folder.iterdir()}
    assert present == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                       "tokenizer_config.json"}  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == (Hub.folder / "model.safetensors").read_bytes()
    asked = len(Hub.asked)
    assert fetches(server, cache, ("owner/small", None, False, False)) == [line]
    assert len(Hub.asked) == asked  # what is cached is not downloaded again
    fetches(server, cache, ("owner/small", None, False, True))
    assert (folder / "modeling_own.py").is_file()
    fetches(server, cache, ("owner/small", None, True, False))
    assert not (folder / "pytorch_model.bin").exists()  # there are safetensors
    (Hub.folder / "model.safetensors").unlink()
    (line,) = fetches(server, tmp_path / "fresh", ("owner/small", None, True, False))
    assert Path(line.removeprefix("fetched "), "pytorch_model.bin").is_file()


def test_refusals_say_what_to_do(server: str, tmp_path: Path) -> None:
    wanted = [("owner/gated", None), ("owner/absent", None), ("owner/small", "elsewhere")]
    gated, absent, revision = fetches(server, tmp_path, *[(*call, False, False) for call in wanted])
    assert "refused model.path=owner/gated is gated" in gated and "hf auth login" in gated
    assert "refused model.path=owner/absent is not a folder here" in absent and "check the name" in absent
    assert "refused model.path=owner/small (revision elsewhere)" in revision
    (unreachable,) = fetches("http://127.0.0.1:9", tmp_path, ("owner/small", None, False, False))
    assert "hub cannot be reached" in unreachable and "hf download owner/small" in unreachable


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
PICKLE = "pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", lambda whole: POINTER, "Git LFS pointer, no weights; run `git lfs pull`"),
        (PICKLE, lambda whole: POINTER, "Git LFS pointer"),
        (
            "model.safetensors",
            lambda whole: whole[:-1],
            r"has [\d,]+ bytes instead of [\d,]+; copy or download",
        ),
        ("model.safetensors", lambda whole: whole + b"\0", "copy or download it again"),
        ("model.safetensors", lambda whole: whole[:500], "header is damaged"),
        ("model.safetensors", lambda whole: b"", "header is damaged"),
        ("model.safetensors", lambda whole: b"<html>not found</html>", "not a safetensors file"),
        ("model.safetensors.index.json", lambda whole: b"{", "not an index of weights"),
        ("model.safetensors.index.json", lambda whole: b"[]", "not an index of weights"),
    ],
)
def test_damaged_weights_are_refused_before_anything_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    folder = Path(tiny_llama(tmp_path / "model"))
    whole = (folder / "model.safetensors").read_bytes()
    if name == PICKLE:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(damage(whole))
    with pytest.raises(ConfigError, match=said):
        hub.check_weights("model.path", folder, pickle=True)


def test_weights_without_the_right_to_read_are_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, mode: str = "r") -> None:
        raise PermissionError(13, "Permission denied", str(path))

    folder = Path(tiny_llama(tmp_path / "model"))
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read: Permission denied"):
        hub.check_weights("model.path", folder, pickle=False)


def test_weights_are_whole_and_no_pickles(tmp_path: Path) -> None:
    folder = Path(tiny_llama(tmp_path / "model"))
    hub.check_weights("model.path", folder, pickle=False)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match="holds no weights"):
        hub.check_weights("model.path", folder, pickle=False)
    pieces = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": pieces}))
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002.safetensors \(1 of 2 files\)"):
        hub.check_weights("model.path", folder, pickle=False)
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    hub.check_weights("model.path", folder, pickle=False)
    (folder / "model.safetensors.index.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"any program; if you trust .* model\.allow_pickle=true"):
        hub.check_weights("model.path", folder, pickle=False)
    hub.check_weights("model.path", folder, pickle=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [("{}", "does not name its base model; give"), ("[]", "cannot be read"), ("{", "cannot be read")],
)
def test_an_adapter_without_a_base_is_refused(settings: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ConfigError, match=f"reference.path={tmp_path}.*({reason})"):
        hub.source("reference.path", str(tmp_path), lambda key, name: Path(name))
