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
def test_operations_and_bytes_are_deepspeeds() -> None:
    done = forked.run([sys.executable, str(SIMULATION), "--check"], timeout=800)
    assert done.returncode == 0, done.stderr
    cases: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for case in cases:
        config = RunConfig()
        config.engine.stage, config.train.dtype = case["stage"], case["dtype"]
        trained = [Parameter("", size) for size in case["sizes"]]
        engine, bare = case["engine"], case["bare"]
        where = case["stage"], case["dtype"], case["layers"], case["adapter"]
        if case["stage"] < 3:  # which exchanges linear layers
            assert work(engine["forward"]) == work(bare["forward"]) * case["microbatches"], where
        added = work(engine["backward"]) - work(bare["backward"]) * case["microbatches"]
        planned = reduction(config, trained, case["microbatches"])
        # ZeRO-3's linear layers are its own: most of the weights' tensors, and frozen ones beside adapters
        share = 0.2 if case["stage"] == 3 else 0.02
        assert close(added.operations, planned.operations, share), (where, added)
        if case["adapter"] == "none":
            assert close(added.bytes, planned.bytes, 0.05), (where, added)
        found, planned = work(engine["update"]), update(config, trained, 1, sum(case["sizes"]))
        assert found.operations == planned.operations, (where, found)
        assert close(found.bytes, planned.bytes, 0.04), (where, found)  # norms of rows, and the like
        # nothing waits for the device, or is copied to it, but at the end of a step
        for name in ("forward", "backward"):
            assert engine[name]["reads"] == engine[name]["copies"] == 0, where
        assert engine["update"]["reads"] <= 4 and engine["update"]["copies"] <= 1, where
    assert {(case["stage"], case["dtype"]) for case in cases} >= {(0, "fp32"), (1, "bf16"), (3, "bf16")}


def test_moments_and_elements_of_an_update_by_hand() -> None:
    config = RunConfig()
    config.train.dtype, config.engine.stage = "bf16", 1
    trained = parameters(3, 1000)
    # 2 · 3 + 27 operations; of 500 elements 26 bytes of DeepSpeed's and 4 · 7 of AdamW's
    assert update(config, trained, 2, 500) == Work(0, 33, 500 * (26 + 28))
    config.optim.name, config.optim.momentum = "sgd", 0.0  # no moments: 4 · 3
    assert update(config, trained, 2, 500) == Work(0, 33, 500 * (26 + 12))


def test_gradients_of_several_micro_batches_and_groups_of_zero_3_by_hand() -> None:
    config = RunConfig()
    config.train.dtype, config.engine.stage = "bf16", 1
    # three micro-batches: each 2 · 3 operations and 18 bytes, two of them 3 + 1 and 10, and the last 3 and 16
    expected = Work(0, 3 * 6 + 2 * 4 + 3, 1000 * (3 * 18 + 2 * 10 + 16))
    assert reduction(config, parameters(3, 1000), 3) == expected
    config.engine.stage = 3
    large = [Parameter(name, 8 * 10**8) for name in "abc"]  # two fill a group of 10⁹
    assert update(config, large, 1, 24 * 10**8).operations == 2 * 3 + 21 + 2 * 23
    # each rank of two has 1.2 · 10⁹, which all three fill
    assert update(config, large, 2, 12 * 10**8).operations == 2 * 3 + 21 + 23
