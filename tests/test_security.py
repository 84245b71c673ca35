"""Nothing of the user's secrets is written down, and no data reach the terminal or a shell as commands."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from tiny import sums_file, tiny_llama

PACKAGE = Path(__file__).parent.parent / "rcpo"
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedplantedplanted",
    "OPENAI_API_KEY": "sk-plantedplantedplanted",
    "RCPO_JUDGE_KEY": "judge-plantedplantedplanted",
}
RUNS_CODE = ("os.system", "os.popen", "pickle.load", "pickle.loads", "eval", "exec")
# What one's own child processes answer through pipes that nobody else holds.
OWN_PIPES = {PACKAGE / "data" / "workers.py"}
EVIL = (
    json.dumps(
        {"prompt": "\x1b]0;owned\x07\x1b[2J1+1=", "chosen": "\x1b[31mred\x00", "rejected": "\u202eevil"}
    ),
    json.dumps({"prompt": "9" * 300_000, "chosen": "1", "rejected": "2"}),
    '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "chosen": "a", "rejected": "b"}',
    '{"\x1b[2Jprompt": 1}',
    "\x1b[2J no JSON",
)


def run(folder: Path, data: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A short run with planted secrets and wandb's files."""
    command = [
        *(sys.executable, "-m", "rcpo.cli", "train", "model=local", f"model.path={folder / 'model'}"),
        *("data=pairs", f"data.path={data}", "data.max_length=48", "data.max_prompt_length=32"),
        *("train.max_steps=2", "train.batch_size=8", "train.micro_batch_size=8", "eval.max_examples=8"),
        *(f"hydra.run.dir={folder / 'run'}", "wandb.mode=offline", *overrides),
    ]
    environment = {**os.environ, **SECRETS, "WANDB_MODE": "offline"}
    return forked.run(command, env=environment)


@pytest.mark.slow
def test_evil_rows_and_planted_secrets_leave_no_trace(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    data = Path(sums_file(tmp_path / "pairs.jsonl", 32))
    data.write_text(data.read_text(encoding="utf-8") + "\n".join(EVIL) + "\n", encoding="utf-8")
    result = run(tmp_path, str(data), "data.on_bad=drop", "data.max_dropped=1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "3 pairs dropped" in result.stdout  # the last three: no JSON, or too deep to be a pair
    shown = result.stdout + result.stderr
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e]", shown)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in written) and len(written) > 8
    for secret in SECRETS.values():
        assert secret not in shown
        assert not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("number", range(2, 5))
def test_an_evil_row_is_refused_by_its_line(tmp_path: Path, number: int) -> None:
    tiny_llama(tmp_path / "model")
    data = Path(sums_file(tmp_path / "pairs.jsonl", 3))
    data.write_text(data.read_text(encoding="utf-8") + EVIL[number] + "\n", encoding="utf-8")
    result = run(tmp_path, str(data))
    assert result.returncode == 2
    assert f"{data}:4: " in result.stderr and "\x1b" not in result.stderr and "Traceback" not in result.stderr


def test_no_shell_no_pickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                shell = keywords.get("shell")
                assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), path
                called = ast.unparse(node.func)
                assert called not in RUNS_CODE or path in OWN_PIPES, path
                if called == "torch.load":
                    assert ast.unparse(keywords["weights_only"]) == "True", path
