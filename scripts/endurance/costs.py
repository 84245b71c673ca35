"""What safety costs: a checkpoint, beside training that goes on, and deterministic kernels."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from rcpo.config.schema import RunConfig
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

Row = tuple[str, str]


def model_of_70m(folder: Path, tokenizer: Path) -> None:
    """A random GPT-NeoX in the shape of Pythia-70M."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = GPTNeoXConfig(vocab_size=50304, bos_token_id=1, eos_token_id=2, pad_token_id=0, **size)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


@contextmanager
def training(config: RunConfig, run_dir: Path) -> Iterator[tuple[Trainer, Tracker]]:
    """A trainer whose first steps, which allocate, are done."""
    logging.disable(logging.WARNING)
    run_dir.mkdir()
    distributed.initialize()
    session = Session(config, run_dir, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    with Tracker(run_dir, config, session.total_steps, True) as tracker:
        for _ in range(3):
            trainer.train_step()
        yield trainer, tracker


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def checkpoint_cost(config: RunConfig, run_dir: Path, repeats: int = 5) -> list[Row]:
    """Seconds that training loses by one: it waits for the copy, and shares the cores with the writer."""
    waited, lost = [], []
    with training(config, run_dir) as (trainer, tracker):
        for _ in range(repeats):
            plain = statistics.median(seconds_of(trainer.train_step) for _ in range(8))
            began, steps = time.perf_counter(), 0
            waited.append(seconds_of(lambda: trainer.save(tracker)))
            while not trainer.checkpoints.written:
                trainer.train_step()
                steps += 1
            trainer.checkpoints.finish()
            lost.append(time.perf_counter() - began - steps * plain)
        size = sum(path.stat().st_size for path in (run_dir / "checkpoints").glob("*/tensors/*"))
    cost, interval = statistics.median(lost), 60 * RunConfig().checkpoint.minutes
    return [
        ("a checkpoint", f"{size / len(list((run_dir / 'checkpoints').glob('step-*'))) / 2**20:,.0f} MiB"),
        ("training waits for its copy", f"{statistics.median(waited):.2f} s"),
        ("training loses by it in all", f"{cost:.2f} s ({min(lost):.2f} to {max(lost):.2f})"),
        (f"of the {interval:.0f} s between two", f"{cost / interval:.2%}"),
    ]


def deterministic_cost(config: RunConfig, run_dir: Path, pairs: int) -> list[Row]:
    """Steps with deterministic kernels over steps without, in alternation."""
    ratios, seconds = [], []
    with training(config, run_dir) as (trainer, _):
        for pair in range(pairs):
            times = {}
            for wanted in (True, False) if pair % 2 else (False, True):  # neither always comes first
                torch.use_deterministic_algorithms(wanted)
                times[wanted] = seconds_of(trainer.train_step)
            ratios.append(times[True] / times[False])
            seconds.append(times[False])
        torch.use_deterministic_algorithms(False)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        ("a step without", f"{1000 * statistics.median(seconds):.0f} ms"),
        ("launch.deterministic=true", f"{middle - 1:+.1%} (quartiles {low - 1:+.1%}, {high - 1:+.1%})"),
    ]
