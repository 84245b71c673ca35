"""Runs that are measured and planned: what they take in truth, and what the planner says of them.

`python tests/footprints.py` prints a Markdown table of both, for ZeRO 0 to 3 on 1, 2 and 4 processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import forked
import torch
from tiny import TOKENIZER, sums_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from rcpo.config.schema import RunConfig
from rcpo.planner import communication, states
from rcpo.planner.gathers import Gathers, gathers, module_order
from rcpo.planner.memory import StepMemory
from rcpo.planner.model import architecture, depth, few_layers, owned, parameters
from rcpo.planner.states import Parameter
from rcpo.planner.trace import BatchShape, trace

WORKER = str(Path(__file__).parent / "workers" / "footprint.py")
LIMITS = {
    "stage3_prefetch_bucket_size": "prefetch",
    "stage3_max_live_parameters": "max_live",
    "stage3_max_reuse_distance": "max_reuse",
}

Changes = dict[str, Any]


def odd_llama(folder: Path, hidden: int, layers: int, vocabulary: int) -> str:
    """A random Llama whose sizes divide by nothing in particular."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden + 7, num_hidden_layers=layers,
        num_attention_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def nothing(folder: Path) -> str:
    """A model of next to no size."""
    return odd_llama(folder, hidden=34, layers=3, vocabulary=101)


def middling(folder: Path) -> str:
    """A model beside which a few MB of the interpreter's do not matter."""
    return odd_llama(folder, hidden=322, layers=4, vocabulary=15997)


@dataclass(frozen=True)
class Footprint:
    """A rank's share of a run: as it was measured, and as it is planned."""

    path: str
    changes: Changes
    ranks: int
    rank: int
    measured: dict[str, Any]

    @cached_property
    def config(self) -> RunConfig:
        config = RunConfig()
        config.model.name, config.model.path = "local", self.path
        for key, value in self.changes.items():
            node, _, leaf = key.rpartition(".")
            if node != "zero":
                setattr(getattr(config, node), leaf, value)
        return config

    @cached_property
    def architecture(self) -> PreTrainedConfig:
        return architecture(self.config, None)

    @cached_property
    def parameters(self) -> list[Parameter]:
        return parameters(self.architecture, self.config)

    @property
    def microbatches(self) -> int:
        return len(self.measured["shapes"])

    @property
    def sketch(self) -> int:
        return min(self.config.rc.sketch or self.architecture.vocab_size, self.architecture.vocab_size)

    @property
    def scores(self) -> int:
        return 2 * self.sketch * int(self.architecture.hidden_size)

    @cached_property
    def gathers(self) -> Gathers | None:
        if self.config.engine.stage < 3:
            return None
        limits = {LIMITS[key[5:]]: value for key, value in self.changes.items() if key.startswith("zero.")}
        layers = few_layers(self.architecture, self.config)
        order = module_order(layers, BatchShape(1, 8, 4, True), depth(self.architecture))
        numels = {p.name: p.numel for p in self.parameters}
        return gathers(order, owned(self.architecture, self.config), numels, **limits)

    @property
    def states(self) -> dict[str, int]:
        """Planned bytes of weights, gradients and optimizer."""
        return vars(states.states(self.parameters, self.config, self.ranks, self.rank))

    @property
    def messages(self) -> list[list[Any]]:
        """DeepSpeed's planned collectives: name, bytes, count."""
        found = communication.messages(
            self.parameters, self.config, self.ranks, self.microbatches, self.gathers
        )
        return sorted([message.name, message.size, message.count] for message in found)

    @property
    def own_messages(self) -> list[int]:
        """The planned bytes of rcpo's own collectives."""
        found = communication.own_messages(self.config, self.scores, self.microbatches)
        return sorted(message.size for message in found) if self.ranks > 1 else []

    @property
    def peak(self) -> int:
        """Planned bytes at the worst moment of training; evaluations are not measured."""
        layers = depth(self.architecture)
        policy = few_layers(self.architecture, self.config)
        rows = BatchShape(*max(self.measured["shapes"], key=lambda shape: shape[0] * shape[1]))
        training = trace(policy, rows, self.sketch, training=True, depth=layers)
        scoring = trace(policy, rows, None, training=False, depth=layers)
        step = StepMemory(
            self.config, self.parameters, self.ranks, self.microbatches, training, scoring, self.gathers,
            self.scores, on_gpu=False, rank=self.rank,
        )  # fmt: skip
        return max(phase.device_bytes for phase in step.phases() if phase.name != "scoring")

    @property
    def measured_peak(self) -> int:
        return int(max(self.measured["peaks"].values()))


def footprints(folder: Path, path: str, groups: dict[int, list[Changes]], *small: str) -> Iterator[Footprint]:
    """Runs the model at `path` with each of the changes on each number of ranks; then all that was found.

    A `small` model comes before each run, so that no program text counts as the model's.
    """
    pairs, output = sums_file(folder / "pairs.jsonl", 24), folder / "measured"
    command = [sys.executable, WORKER, path, pairs, str(output), json.dumps(list(groups.items())), *small]
    ended = forked.run(command)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for ranks, wanted in groups.items():
        for rank in range(ranks):
            results = json.loads(Path(f"{output}.{ranks}.{rank}").read_text())
            for changes, measured in zip(wanted, results, strict=True):
                yield Footprint(path, changes, ranks, rank, measured)


def _line(stage: int, ranks: int, found: list[Footprint]) -> str:
    exact = all(each.states == each.measured["before_step"] for each in found)
    sent = all(each.messages == each.measured["communication"] for each in found)
    worst = max(found, key=lambda each: abs(each.peak / each.measured_peak - 1))
    planned, true = worst.peak, worst.measured_peak
    cells = [f"ZeRO-{stage}", ranks, *("equal" if same else "DIFFERENT" for same in (exact, sent))]
    cells += [f"{planned / 1e6:.0f} MB", f"{true / 1e6:.0f} MB", f"{100 * (planned / true - 1):+.1f} %"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    print("| engine | processes | states | messages | planned peak | measured peak | difference |")
    print(f"|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, small = middling(folder / "model"), nothing(folder / "small")
        micro = {"train.micro_batch_size": 2}
        wanted = {
            ranks: [{"engine.stage": stage, "train.batch_size": 4 * ranks, **micro} for stage in range(4)]
            for ranks in (1, 2, 4)
        }
        places: dict[tuple[int, int], list[Footprint]] = {}
        for each in footprints(folder, path, wanted, small):
            places.setdefault((each.config.engine.stage, each.ranks), []).append(each)
        for stage, ranks in sorted(places):
            print(_line(stage, ranks, places[stage, ranks]))


if __name__ == "__main__":
    main()
