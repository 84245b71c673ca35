"""What the planner counts for the engine and the optimizer, held to DeepSpeed's own code on fake tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

from rcpo.config.schema import RunConfig
from rcpo.planner.states import Parameter
from rcpo.planner.trace import Work
from rcpo.planner.update import reduction, update

PASSES = ("forward", "backward")
SIMULATION = Path(__file__).resolve().parents[1] / "simulation.py"


def parameters(tensors: int, elements: int) -> list[Parameter]:
    """So many trained tensors of so many elements in all, and a frozen one."""
    small = [Parameter(f"p{number}", 1) for number in range(tensors - 1)]
    return [*small, Parameter("rest", elements - len(small)), Parameter("frozen", 10**9, trained=False)]


def work(phase: dict[str, int]) -> Work:
    return Work(0, phase["operations"], phase["bytes"])


def close(found: float, planned: float, share: float) -> bool:
    return abs(found - planned) <= share * planned


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 4])
def test_operations_and_bytes_are_deepspeeds(ranks: int) -> None:
    done = forked.run([sys.executable, str(SIMULATION), "--check", f"--ranks={ranks}"], timeout=800)
    assert done.returncode == 0, done.stderr
    cases: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for case in cases:
        config = RunConfig()
        config.engine.stage, config.train.dtype = case["stage"], case["dtype"]
        trained = [Parameter("", size) for size in case["sizes"]]
        engine, bare = case["engine"], case["bare"]
        where = case["stage"], case["dtype"], case["layers"], case["adapter"]
        if case["stage"] < 3:  # which gathers weights, and exchanges linear layers
            assert work(engine["forward"]) == work(bare["forward"]) * case["microbatches"], where
        own = sum(case["sizes"]) // (1 if case["stage"] == 0 else ranks)
        passes = [work(engine[name]) - work(bare[name]) * case["microbatches"] for name in PASSES]
        added, planned = passes[0] + passes[1], reduction(config, trained, ranks, own, case["microbatches"])
        # ZeRO-3's linear layers are its own, frozen ones beside adapters, too; of several ranks the first has
        # a small model's embedding, and fewer tensors than planned, which is the ranks' mean
        share = 0.5 if ranks > 1 else 0.2 if case["stage"] == 3 else 0.02
        if ranks == 1 or case["adapter"] == "none":
            assert close(added.operations, planned.operations, share), (where, added, planned)
        if case["adapter"] == "none":
            assert close(added.bytes, planned.bytes, 0.05 if ranks == 1 else 0.15), (where, added, planned)
        found, planned = work(engine["update"]), update(config, trained, ranks, own)
        assert close(found.operations, planned.operations, 0 if ranks == 1 else 0.5), (where, found, planned)
        assert close(found.bytes, planned.bytes, 0.04 if ranks == 1 else 0.1), (where, found, planned)
        # nothing waits for the device, or is copied to it, but at the end of a step
        for name in PASSES:
            assert engine[name]["reads"] == engine[name]["copies"] == 0, where
        assert engine["update"]["reads"] <= 4 and engine["update"]["copies"] <= 1, where
    assert {(case["stage"], case["dtype"]) for case in cases} >= {(0, "fp32"), (1, "bf16"), (3, "bf16")}


def test_moments_and_elements_of_an_update_by_hand() -> None:
    config = RunConfig()
    config.train.dtype, config.engine.stage = "bf16", 1
    trained = parameters(3, 1000)
    # 2 · 3 + 27 operations; 20 bytes of all elements, 6 of the rank's 500 and 4 of all, and AdamW's 4 · 7
    assert update(config, trained, 2, 500) == Work(0, 33, 1000 * (20 + 4) + 500 * (6 + 28))
    config.optim.name, config.optim.momentum = "sgd", 0.0  # no moments: 4 · 3
    assert update(config, trained, 2, 500) == Work(0, 33, 1000 * (20 + 4) + 500 * (6 + 12))


def test_gradients_of_several_micro_batches_and_groups_of_zero_3_by_hand() -> None:
    config = RunConfig()
    config.train.dtype, config.engine.stage = "bf16", 1
    # three micro-batches: each 2 · 3 operations and 18 bytes, two of them 3 + 1 and 10, and the last 3 and 16
    expected = Work(0, 3 * 6 + 2 * 4 + 3, 1000 * (3 * 18 + 2 * 10 + 16))
    assert reduction(config, parameters(3, 1000), 1, 1000, 3) == expected
    config.engine.stage = 3
    large = [Parameter(name, 8 * 10**8) for name in "abc"]  # two fill a group of 10⁹
    assert update(config, large, 1, 24 * 10**8).operations == 2 * 3 + 21 + 2 * 23
    # each rank of two has 1.2 · 10⁹, which all three fill
    assert update(config, large, 2, 12 * 10**8).operations == 2 * 3 + 21 + 23
