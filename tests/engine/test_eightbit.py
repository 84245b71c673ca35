"""Moments that bitsandbytes keeps in 8 bits are saved by element, and read back to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rcpo[qlora]'")

from rcpo.config.schema import BITSANDBYTES, RunConfig
from rcpo.engine.eightbit import decoded
from rcpo.engine.optimizers import build_optimizer
from rcpo.engine.pieces import Piece, collect, parse_label, restore
from rcpo.planner.states import Parameter, states

SHAPES = {"large": (70, 90), "small": (10,)}  # 6,300 elements: 24 blocks and a part; and too few for blocks


def stepped(name: str, steps: int) -> tuple[torch.nn.ParameterDict, torch.optim.Optimizer]:
    """Two tensors and their optimizer after steps with random gradients."""
    config = RunConfig()
    config.optim.name, config.optim.lr, config.optim.weight_decay = name, 0.01, 0.1
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({key: torch.randn(shape) for key, shape in SHAPES.items()})
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def pieces_of(model: torch.nn.ParameterDict) -> list[Piece]:
    return [Piece(name, 0, parameter.numel(), parameter) for name, parameter in model.items()]


class Saved:
    """What `collect` gave, cut into other pieces."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {parse_label(label)[:2]: tensor.clone() for label, tensor in tensors.items()}

    def values(self, name: str, key: str, start: int, size: int) -> Tensor | None:
        found = self.tensors.get((name, key))
        return None if found is None else found[start : start + size]

    def number(self, name: str, key: str) -> float | None:
        found = self.tensors.get((name, key))
        return None if found is None else float(found)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_restored_optimizer_goes_on_with_the_same_bits(name: str) -> None:
    model, optimizer = stepped(name, 3)
    saved = Saved(collect(pieces_of(model), optimizer))
    other, again = stepped(name, 1)  # with other state, all of which is overwritten
    halves = [
        Piece(piece.name, start, size, piece.holder, start)
        for piece in pieces_of(other)
        for start, size in ((0, piece.size // 3), (piece.size // 3, piece.size - piece.size // 3))
    ]
    restore(halves, again, saved)
    for key, parameter in model.items():
        mine, theirs = optimizer.state[parameter], again.state[other[key]]
        assert mine.keys() == theirs.keys()
        for entry, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[entry])), (key, entry)
    for _ in range(2):
        torch.manual_seed(7)
        step(model, optimizer)
        torch.manual_seed(7)
        step(other, again)
    assert all(torch.equal(model[key], other[key]) for key in SHAPES)


def test_moments_in_8_bits_are_near_those_in_32() -> None:
    (eight, of_eight), (full, of_full) = stepped("adamw_8bit", 5), stepped("paged_adamw_32bit", 5)
    values = decoded(of_eight.state[eight["large"]], eight["large"])["state1"]
    exact = of_full.state[full["large"]]["state1"]
    assert of_eight.state[eight["large"]]["state1"].dtype == torch.uint8
    assert (values - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_the_planner_counts_the_bytes_of_the_state(name: str) -> None:
    model, optimizer = stepped(name, 1)
    config = RunConfig()
    config.optim.name = name
    tensors: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        for value in dict[str, Any](state).values():
            if isinstance(value, Tensor):
                tensors[value.data_ptr()] = value
    counted = states([Parameter(key, p.numel()) for key, p in model.items()], config, 1).optimizer
    assert counted == sum(value.numel() * value.element_size() for value in tensors.values())
