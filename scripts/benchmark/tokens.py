"""How fast data becomes tokens, beside the tokenizer alone on all cores; memory; the second start.

`python scripts/benchmark/tokens.py --pairs 100000` makes pairs of about 300 tokens (or repeats those of
a file: --source) and a tokenizer for them, and measures each in processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rcpo.data.formats import read_row
from rcpo.data.readers import read_file
from rcpo.data.records import BadRow

BATCH = 1000
ALONE = 20_000  # pairs that the tokenizer alone is measured on
SEED = 1


def make(folder: Path, pairs: int, source: Path | None) -> None:
    """Writes pairs.jsonl and tokenizer/."""
    texts = made_up() if source is None else read_texts(source)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text for row in texts for text in row.values()), trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    whole.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    whole.save_pretrained(folder / "tokenizer")
    draw = random.Random(SEED)
    texts = texts if source is not None else made_up(pairs)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(pairs):
            row = dict(draw.choice(texts))
            if source is not None:  # real texts are there more than once: their beginnings are not
                row["prompt"] = f"{draw.choice(texts)['prompt']} {number} {row['prompt']}"
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_texts(source: Path) -> list[dict[str, str]]:
    texts = []
    for _, value in (row for piece in read_file(source) for row in piece.parsed()):
        with contextlib.suppress(BadRow):
            row = read_row(value)
            texts.append({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected})
    return texts


def made_up(count: int = 3000) -> list[dict[str, str]]:
    """Sentences of words that are as frequent as words are (Zipf), about 300 tokens a pair."""
    draw = random.Random(SEED)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(30_000)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))

    def sentence(length: int) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=length)).capitalize() + "."

    def text(length: int) -> str:
        return " ".join(sentence(draw.randint(5, 20)) for _ in range(length))

    return [{"prompt": text(10), "chosen": text(5), "rejected": text(6)} for _ in range(count)]


def texts_of(folder: Path, share: int, shares: int) -> list[str]:
    with (folder / "pairs.jsonl").open(encoding="utf-8") as file:
        lines = enumerate(islice(file, ALONE))
        rows = [json.loads(line) for number, line in lines if number % shares == share]
    return [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]


def alone(folder: Path, way: str, share: int, shares: int) -> None:
    """Prints tokens and seconds of the tokenizer alone, on texts that are in memory."""
    texts = texts_of(folder, share, shares)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    backend = tokenizer.backend_tokenizer
    backend.encode_batch_fast(texts[:200], add_special_tokens=False)
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        if way == "transformers":
            found = tokenizer(part, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        else:
            found = [one.ids for one in backend.encode_batch_fast(part, add_special_tokens=False)]
        tokens += sum(map(len, found))
    seconds = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    print(json.dumps({"tokens": tokens, **seconds}))


def load(folder: Path, template: str | None, examples: int) -> None:
    """Prints what `load_datasets` takes, in a process that has nothing else."""
    from rcpo.config.data import DataConfig
    from rcpo.data.dataset import load_datasets

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = DataConfig(
        name="pairs", path=str(folder / "pairs.jsonl"), cache=str(folder / "cache"), eval_fraction=0.0,
        max_length=2048, max_prompt_length=1024, template=template, max_examples=examples,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), cpu_seconds()
    train = load_datasets(config, tokenizer, SEED).train
    seconds = time.perf_counter() - began
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    tokens = int(train.lengths.sum())
    result = {"pairs": len(train), "tokens": tokens, "seconds": seconds, "cpu": cpu_seconds() - cpu}
    print(json.dumps(result | {"own_mib": own / 1024, "largest_worker_mib": workers / 1024}))


def cpu_seconds() -> float:
    """Of this process and those that it waited for, its workers."""
    return sum(os.times()[:4])


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **environment})


def rate_alone(folder: Path, way: str, processes: int) -> tuple[float, float]:
    """Tokens a second of all processes together, which start at the same time, and tokens a core's second."""
    parallel = "true" if processes == 1 else "false"
    started = [
        run("--folder", str(folder), "--alone", way, "--share", f"{share}/{processes}",
            TOKENIZERS_PARALLELISM=parallel, RAYON_NUM_THREADS=str(os.cpu_count()))
        for share in range(processes)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    results = list(results_of(started))
    tokens = sum(result["tokens"] for result in results)
    cpu = sum(result["cpu"] for result in results)
    return tokens / max(result["seconds"] for result in results), tokens / cpu


def results_of(started: list[subprocess.Popen[str]]) -> Iterator[dict[str, float]]:
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        yield json.loads(process.communicate()[0].rstrip("\n").rpartition("\n")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--template")
    parser.add_argument("--alone")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--load", type=int)
    given = parser.parse_args()
    if given.alone is not None:
        share, shares = map(int, given.share.split("/"))
        return alone(given.folder, given.alone, share, shares)
    if given.load is not None:
        return load(given.folder, given.template, given.load)
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pairs.jsonl").exists():
        make(folder, given.pairs, given.source)
    cores = os.cpu_count() or 1
    best, best_cpu = 0.0, 0.0
    for way in ("transformers", "tokenizers"):
        for processes in {1, cores}:
            rate, rate_cpu = rate_alone(folder, way, processes)
            best, best_cpu = max(best, rate), max(best_cpu, rate_cpu)
            told = f"{rate:,.0f} tokens/s, {rate_cpu:,.0f} a core's second"
            print(f"the tokenizer alone ({way}, {processes} process(es)): {told}", flush=True)
    options = [] if given.template is None else ["--template", given.template]
    for pairs in (given.pairs // 4, given.pairs):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for start in ("first", "second"):
            began = time.perf_counter()
            process = run("--folder", str(folder), "--load", str(pairs), *options)
            result = json.loads(process.communicate()[0].rstrip("\n").rpartition("\n")[2])
            whole = time.perf_counter() - began
            rate, rate_cpu = result["tokens"] / result["seconds"], result["tokens"] / result["cpu"]
            told = f", {rate:,.0f} tokens/s, {rate / best:.0%} of the best alone"
            told += f", {rate_cpu:,.0f} a core's second, {rate_cpu / best_cpu:.0%}"
            print(
                f"{start} start, {result['pairs']:,} pairs, {result['tokens']:,} tokens: "
                f"{result['seconds']:.1f} s ({whole:.1f} s with imports)"
                + (told if start == "first" else "")
                + f"; memory +{result['own_mib']:.0f} MiB, a worker {result['largest_worker_mib']:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
