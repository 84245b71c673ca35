"""How far the loss is from the command line: the functions of rcpo between the two, on a real run."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
from tiny import held_out, sums_file, tiny_llama

# Prints rcpo's own frames when the loss of DPO is called for the first time, and leaves.
PROGRAM = """
import dataclasses, functools, os, sys
from rcpo.cli import main
from rcpo.method import losses, registry
spec = registry.specification("dpo")
@functools.wraps(spec.loss)
def loss(*values, **named):
    frame, path = sys._getframe(1), ["rcpo.method.losses.dpo"]
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        path += [f"{module}.{frame.f_code.co_qualname}"] if module.startswith("rcpo.") else []
        frame = frame.f_back
    print("PATH", *reversed(path), flush=True)
    os._exit(0)
registry._REGISTRY["dpo"] = dataclasses.replace(spec, loss=loss)
main()
"""
MOST = 11


def test_few_functions_lie_between_the_command_and_the_loss(tmp_path: Path) -> None:
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 8)
    words = [
        *("train", "objective=dpo", "model=local", f"model.path={model}", "data=pairs", f"data.path={pairs}"),
        *(f"data.eval_path={held_out(pairs)}", "train.batch_size=4", "train.max_steps=1"),
        *("reference.cache=off", "probe.size=0", "dynamics.every=0", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    command = [sys.executable, "-c", PROGRAM, *words]
    result = forked.run(command, cwd=tmp_path)
    found = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("PATH")]
    assert len(found) == 1, result.stdout + result.stderr
    path = found[0]
    assert path[0] == "rcpo.cli.main" and path[-1] == "rcpo.method.losses.dpo"
    assert len(path) <= MOST, "\n".join(path)
