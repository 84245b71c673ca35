"""Measures rcpo side by side with its peers; writes outputs/bench/results.json and results.md.

    scripts/bench [--pairs FILE [--model DIR]] [--full] [--only peers,calibration,trl,vocabulary,…]

peers        rcpo (rc=on) and TRL's DPOTrainer: same model, tokens, batches and order; reference precomputed
calibration  a step without dynamics, with them, with rc=on, with rc=loop, and calibrated the published way
control      what rc=loop's readings of control pairs cost
trl          TRL's DPOTrainer and CalibratedDPOTrainer: what calibration costs there
vocabulary   peak memory from V = 8k to 128k, head frozen and trained
lengths      sequence lengths and prompt shares, in both layouts of rows
epochs       time of a token where an epoch has 64 to 2,048 pairs of data
products     the share of the machine's own rate of matrix products that a whole step reaches
phases       where a step's time goes; with 1 process and with 2, ZeRO 0 and 3
start        from the command to the end of the first step; the packaged model

Each side is a process of its own and takes a step when it is asked to, so that the sides alternate and share
whatever else the machine does; medians over the steps, and of the ratios step by step. Memory is the
process's resident peak during the steps, without that of its start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from inputs import Size, prepare
from side import ROOT, Json, Side, machine, summary

MB = 1e6


class Bench:
    """The measurements, one method each, and what they found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        if arguments.model is None:
            self.size = Size(arguments.vocabulary, arguments.hidden, arguments.layers, arguments.heads,
                             arguments.batch, arguments.length)  # fmt: skip
        else:
            self.size = Size.of(Path(arguments.model), arguments.batch, arguments.length)
        self.work = Path(arguments.out) / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.results: Json = {"machine": machine(), "size": asdict(self.size), "arguments": vars(arguments)}
        self.tables: list[str] = []
        self._made: dict[tuple[Size, bool], Path] = {}

    def inputs(self, size: Size) -> Path:
        """The inputs of a size, made at its first use: from the given pairs, unless lengths are exact."""
        real = self.arguments.pairs is not None and not size.exact
        if (size, real) not in self._made:
            folder = self.work / f"inputs-{len(self._made)}"
            steps = self.arguments.warmup + self.arguments.steps
            source = Path(self.arguments.pairs) if real else None
            self._made[size, real] = prepare(folder, size, steps, source)
        return self._made[size, real]

    def alternate(self, sides: dict[str, Callable[[int], Json]]) -> dict[str, list[Json]]:
        """Steps of all sides in turn, in an order drawn for each step; the warm-up left out."""
        found: dict[str, list[Json]] = {name: [] for name in sides}
        draw = random.Random(0)
        for step in range(self.arguments.warmup + self.arguments.steps):
            for name in draw.sample(list(sides), len(sides)):
                found[name].append(sides[name](step))
        return {name: rows[self.arguments.warmup :] for name, rows in found.items()}

    def tokens(self, size: Size) -> list[int]:
        """Tokens of the two sequences of each pair (the prompt twice), for each step; warm-up left out."""
        rows = [json.loads(line) for line in (self.inputs(size) / "tokens.jsonl").open(encoding="utf-8")]
        pairs = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
        sums = [sum(pairs[start : start + size.pairs]) for start in range(0, len(pairs), size.pairs)]
        return sums[self.arguments.warmup :]

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.tables.append("\n".join(lines) + "\n")
        print("\n".join(lines) + "\n", flush=True)

    def peers(self) -> None:
        """rcpo with calibration against TRL without, as TRL has none."""
        size, folder = self.size, self.inputs(self.size)
        ours = Side(folder, size, variants=["rc"])
        sides = {"rcpo rc=on": ours, "TRL": Side(folder, size, "trl")}
        if self.arguments.full:
            sides["TRL, a pair at a time"] = Side(folder, size, "trl", micro=1)
            sides["TRL, the same, checkpointing"] = Side(folder, size, "trl", micro=1, checkpointing=True)
            sides["rcpo rc=on, a pair at a time"] = Side(folder, size, variants=["rc"], micro=1)
        found = self.alternate({name: side.step for name, side in sides.items()})
        tokens, base = self.tokens(size), found["rcpo rc=on"]
        rows, result = [], {}
        for name, answers in found.items():
            own = summary(answers, base)
            own["tokens_per_second"] = median(n / answer["seconds"] for n, answer in zip(tokens, answers))
            own["start_peak"] = sides[name].ready["peak"]
            own["losses"] = [answer["loss"] for answer in answers]
            result[name] = own
            memory = own["peak"] / result["rcpo rc=on"]["peak"]
            speed = [f"{own[key]:.2f}" for key in ("seconds", "ratio", "cpu_seconds", "cpu_ratio")]
            speed.append(f"{own['tokens_per_second']:.0f}")
            rows.append([name, *speed, f"{own['peak'] / MB:.0f}", f"{memory:.2f}"])
        for side in sides.values():
            side.close()
        result["parameters"] = ours.ready["parameters"]
        result["tokens"] = tokens
        self.results["peers"] = result
        self.table(
            f"Against TRL: {ours.ready['parameters'] / 1e6:.0f}M weights, V = {size.vocabulary:,}, "
            f"{size.pairs} pairs a step, in two rows a pair {median(tokens):.0f} tokens (median)",
            ["", "step, s", "× rcpo's", "processor, s", "× rcpo's", "tokens/s", "peak, MB", "× rcpo's"],
            rows,
        )

    def calibration(self) -> None:
        """One process, one model, the same batch for each variant."""
        variants = ["off", "dynamics", "rc", "loop", "published"]
        # one thread: a processor's seconds then hold no waiting of threads for each other
        side = Side(self.inputs(self.size), self.size, variants=variants, threads=1)
        steps = {name: lambda step, name=name: side.step(step, name) for name in variants}
        found = self.alternate(steps)
        side.close()
        names = ("rc=off dynamics.every=0", "rc=off", "rc=on", "rc=loop", "the published way")
        labels = dict(zip(variants, names, strict=True))
        result = {labels[name]: summary(found[name], found["off"]) for name in variants}
        result["rc=on, by rc=off"] = summary(found["rc"], found["dynamics"])
        self.results["calibration"] = result
        rows = []
        for name, own in result.items():
            more = [f"{100 * (own[key] - 1):+.1f} %" for key in ("ratio", "cpu_ratio")]
            rows.append([name, f"{own['seconds']:.3f}", f"{own['cpu_seconds']:.3f}", *more])
        self.table("What calibration costs", ["", "step, s", "processor, s", "step", "processor"], rows)

    def control(self) -> None:
        """The closed loop on fresh pairs and on control pairs, with a batch of which the half is scored."""
        from rcpo.config.schema import RunConfig

        size = replace(self.size, pairs=16)
        side = Side(self.inputs(size), size, variants=["loop", "control"], threads=1)
        found = self.alternate(
            {name: lambda step, name=name: side.step(step, name) for name in ("loop", "control")}
        )
        side.close()
        fresh, control = (summary(found[name], found["loop"]) for name in ("loop", "control"))
        every = RunConfig().rc.control.every
        shares = [(control[key] - 1) / every for key in ("ratio", "cpu_ratio")]
        self.results["control"] = {"fresh": fresh, "control": control, "every": every, "shares": shares}
        rows = [
            [name, f"{own['seconds']:.3f}", f"{own['cpu_seconds']:.3f}",
             *(f"{100 * (own[key] - 1):+.1f} %" for key in ("ratio", "cpu_ratio"))]
            for name, own in (("rc=loop, fresh pairs", fresh), ("with a reading of control pairs", control))
        ]  # fmt: skip
        rows.append(
            [f"the same, one step in {every}", "", "", *(f"{100 * share:+.1f} %" for share in shares)]
        )
        self.table("What control pairs cost", ["", "step, s", "processor, s", "step", "processor"], rows)

    def trl(self) -> None:
        """TRL's own trainer with calibration and without, on the same batches."""
        folder = self.inputs(self.size)
        sides = {
            "CalibratedDPOTrainer": Side(folder, self.size, "trl", threads=1, rc=True),
            "DPOTrainer": Side(folder, self.size, "trl", threads=1),
        }
        found = self.alternate({name: side.step for name, side in sides.items()})
        for side in sides.values():
            side.close()
        result = {name: summary(answers, found["DPOTrainer"]) for name, answers in found.items()}
        self.results["trl"] = result
        rows = []
        for name, own in result.items():
            more = [f"{100 * (own[key] - 1):+.1f} %" for key in ("ratio", "cpu_ratio")]
            rows.append([name, f"{own['seconds']:.2f}", f"{own['cpu_seconds']:.2f}", *more])
        header = ["", "step, s", "processor, s", "step", "processor"]
        self.table("What calibration costs in TRL", header, rows)

    def vocabulary(self) -> None:
        """A small body, so that the head is what is seen; logits of every size fill more than a chunk."""
        sizes = (8192, 16384, 32768, 65536, 131072) if self.arguments.full else (8192, 131072)
        rows, result = [], []
        for frozen in (True, False):
            for vocabulary in sizes:
                size = replace(self.size, vocabulary=vocabulary, hidden=64, layers=2, heads=2, pairs=16,
                               exact=True, prompt_share=0.2)  # fmt: skip
                side = Side(self.inputs(size), size, variants=["rc"], frozen_head=frozen)
                answers = [side.step(step) for step in range(3)]
                side.close()
                matrix = 4 * vocabulary * size.hidden
                # two matrices (no tying); trained: weights, gradients and AdamW's two moments of each
                expected = 2 * matrix * (1 if frozen else 4)
                peak = max(answer["peak"] for answer in answers)
                beyond = peak - expected
                seconds = min(answer["seconds"] for answer in answers)
                result.append({"frozen": frozen, "vocabulary": vocabulary, "peak": peak, "beyond": beyond,
                               "matrix": matrix, "seconds": seconds})  # fmt: skip
                first = next(row for row in result if row["frozen"] == frozen)
                change = beyond - first["beyond"]
                growth = f"{100 * change / first['beyond']:+.1f} %"
                buffers = f"{change / (matrix - first['matrix']):.1f}" if change else ""
                rows.append(["frozen" if frozen else "trained", f"{vocabulary:,}", f"{seconds:.2f}"])
                rows[-1] += [f"{peak / MB:.0f}", f"{beyond / MB:.0f}", growth, buffers]
        self.results["vocabulary"] = result
        self.table(
            "Memory against V (D = 64); left: without the V×D matrices, their gradients and AdamW's moments",
            ["head", "V", "step, s", "peak, MB", "left, MB", "growth", "growth in V×D buffers"],
            rows,
        )

    def lengths(self) -> None:
        """Exact lengths; both layouts of rows in alternation."""
        full = self.arguments.full
        base = replace(self.size, hidden=self.size.hidden // 4, heads=max(1, self.size.heads // 2),
                       layers=min(4, self.size.layers), exact=True)  # fmt: skip
        cases = [(length, 0.7) for length in ((256, 512, 1024, 2048, 4096) if full else (256, 1024))]
        cases += [(512, share) for share in ((0.2, 0.5, 0.8, 0.9) if full else (0.2, 0.8))]
        rows, result = [], []
        for length, share in cases:
            size = replace(base, length=length, prompt_share=share)
            sides = {
                layout: Side(self.inputs(size), size, variants=["rc"], layout=layout)
                for layout in ("shared", "separate")
            }
            found = self.alternate({name: side.step for name, side in sides.items()})
            for side in sides.values():
                side.close()
            own = {name: summary(answers, found["shared"]) for name, answers in found.items()}
            tokens = median(self.tokens(size)) / own["shared"]["seconds"]
            result.append({"length": length, "prompt_share": share, "tokens_per_second": tokens, **own})
            shared, separate = own["shared"], own["separate"]
            rows.append([f"{length:,}", f"{share:.0%}", f"{shared['seconds']:.2f}", f"{tokens:.0f}"])
            rows[-1] += [f"{separate['ratio']:.2f}", *(f"{o['peak'] / MB:.0f}" for o in (shared, separate))]
        self.results["lengths"] = result
        self.table(
            f"Lengths and prompts (D = {base.hidden}, V = {base.vocabulary:,}, {base.pairs} pairs a step)",
            ["tokens", "prompt", "step, s", "tokens/s", "× in two rows", "peak, MB", "two rows, MB"],
            rows,
        )

    def phases(self) -> None:
        """Exclusive times by phase of the standard step."""
        names = ["data", "forward", "head", "geometry", "backward", "optimizer", "communication", "other"]
        stages = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)] if self.arguments.full else [(1, 0), (2, 0), (2, 3)]
        rows, result = [], []
        for processes, stage in stages:
            side = Side(self.inputs(self.size), self.size, processes=processes, stage=stage, phases=True,
                        variants=["rc"])  # fmt: skip
            answers = self.alternate({"rc": side.step})["rc"]
            side.close()
            seconds = median(answer["seconds"] for answer in answers)
            shares = {n: median(a["phases"].get(n, 0) / a["seconds"] for a in answers) for n in names}
            peak = max(answer["peak"] for answer in answers)
            own = {"processes": processes, "stage": stage, "seconds": seconds, "peak": peak}
            result.append(own | {"shares": shares})
            rows.append([str(processes), str(stage), f"{seconds:.2f}", f"{peak / MB:.0f}"])
            rows[-1] += [f"{shares[name]:.1%}" for name in names]
        self.results["phases"] = result
        self.table("Where a step's time goes (rc=on); of two processes the slower one",
                   ["processes", "ZeRO", "step, s", "peak, MB", *names], rows)  # fmt: skip

    def products(self) -> None:
        """A whole step's rate beside that of one large matrix product, in the same process at the same time.

        The step's operations are those of its products, counted in a second pass over the same batch.
        """
        side = Side(self.inputs(self.size), self.size, variants=["rc"], products=True)
        answers = self.alternate({"rc": side.step})["rc"]
        side.close()
        own, machine_rate = (median(answer[key] for answer in answers) for key in ("rate", "machine_rate"))
        share = median(answer["rate"] / answer["machine_rate"] for answer in answers)
        self.results["products"] = {"rate": own, "machine_rate": machine_rate, "share": share}
        self.table(
            "A step's share of the machine's rate of matrix products (rc=on)",
            ["step, GFLOP/s", "one large product, GFLOP/s", "share"],
            [[f"{own / 1e9:.1f}", f"{machine_rate / 1e9:.1f}", f"{share:.0%}"]],
        )

    def epochs(self) -> None:
        """64 pairs, once, 8 and 32 times an epoch; a small model, so that what is beside it shows."""
        own = self.size
        size = replace(own, vocabulary=min(8192, own.vocabulary), hidden=min(64, own.hidden), heads=2,
                       layers=min(2, own.layers), length=min(256, own.length))  # fmt: skip
        pairs = 64
        steps = pairs // size.pairs
        source = prepare(self.work / "epochs", size, steps, None)
        sides = {}
        for copies in (1, 8, 32) if self.arguments.full else (1, 8):
            folder = shutil.copytree(source, self.work / f"epochs-{copies}")
            (folder / "pairs.jsonl").write_text((source / "pairs.jsonl").read_text() * copies)
            sides[copies] = Side(folder, size, variants=["rc"])
            _ = sides[copies].ready  # one after another: their reference passes are timed
        times: dict[int, list[float]] = {copies: [] for copies in sides}
        draw = random.Random(0)
        for part in range(-1, max(sides)):  # 16 steps each in turn, until the longest epoch is over
            for copies in draw.sample(list(sides), len(sides)):
                answers = [sides[copies].step((part + 1) * steps + step) for step in range(steps)]
                if part >= 0:
                    seconds = sum(answer["seconds"] for answer in answers)
                    times[copies].append(1e3 * seconds / sum(answer["tokens"] for answer in answers))
        rows, result = [], []
        for copies, side in sides.items():
            side.close()
            count, own = pairs * copies, median(times[copies])
            ratio = median(mine / base for mine, base in zip(times[copies], times[1]))
            passed = 1e3 * side.ready["reference_seconds"] / count
            result.append({"pairs": count, "milliseconds": own, "ratio": ratio,
                           "reference_milliseconds": passed})  # fmt: skip
            rows.append([f"{count:,}", f"{own:.4f}", f"{ratio:.3f}", f"{passed:.2f}"])
        self.results["epochs"] = result
        self.table("Time of a token against an epoch's data",
                   ["pairs", "ms a token", "× of 64 pairs", "reference pass, ms a pair"], rows)  # fmt: skip

    def start(self) -> None:
        """The default run with nothing cached, and again."""
        rows, result = [], {}
        environment = os.environ | {"RCPO_CACHE": str(self.work / "start-cache"), "PYTHONPATH": str(ROOT),
                                    "WANDB_MODE": "offline"}  # fmt: skip
        for name in ("nothing cached", "reference cached"):
            folder = self.work / "start" / name.split()[0]
            command = [sys.executable, "-m", "rcpo.cli", "train", f"hydra.run.dir={folder}"]
            began, metrics = time.perf_counter(), folder / "metrics.jsonl"
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       env=environment)  # fmt: skip
            while not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
                if process.poll() is not None:
                    raise SystemExit(f"bench: {' '.join(command)} ended with {process.returncode}")
            result[name] = time.perf_counter() - began
            process.terminate()
            process.wait()
            rows.append([name, f"{result[name]:.1f}"])
        self.results["start"] = result
        self.table("`rcpo train` to the end of its first step", ["", "seconds"], rows)

    def write(self) -> None:
        """results.json and results.md, after each measurement."""
        out = Path(self.arguments.out)
        (out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        found = self.results["machine"]
        note = (
            f"{found['cores']} cores, {found['threads']} threads, load {found['load']:.1f} at the start; "
            f"torch {found['torch']}; medians of {self.arguments.steps} steps after {self.arguments.warmup}, "
            f"in alternation; pairs: {'given' if self.arguments.pairs else 'made up'}\n"
        )
        (out / "results.md").write_text("\n".join([note, *self.tables]), encoding="utf-8")


PARTS = ("peers", "calibration", "control", "trl", "vocabulary", "lengths", "epochs", "phases", "products",
         "start")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Speed and memory, side by side.")
    parser.add_argument("--pairs", metavar="FILE", help="preference pairs, JSONL[.gz]; default: made up")
    parser.add_argument(
        "--model", metavar="DIR", help="a model in the hub's format, for --pairs; default: random"
    )
    parser.add_argument("--full", action="store_true", help="all sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "outputs" / "bench"))
    defaults = Size()
    for name in ("vocabulary", "hidden", "layers", "heads", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--batch", type=int, default=defaults.pairs, help="pairs of a step")
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.pairs is None:
        parser.error("--model needs --pairs")
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: choose among {','.join(PARTS)}")
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    for name in chosen:
        getattr(bench, name)()
        bench.write()
    shutil.rmtree(bench.work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
