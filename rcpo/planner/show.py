"""A plan as tables for people."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from rcpo.planner.advice import Advice
from rcpo.planner.plan import Plan

LIBRARIES = "0.7 GB"  # what a process holds before it loads a model: 0.6 to 0.8 measured
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def show(plan: Plan, advice: Advice | None, console: Console) -> None:
    """Print a plan, and where it does not fit the nearest one that does."""
    for line in _heading(plan):
        console.print(line, highlight=False)
    console.print(_memory(plan))
    console.print(_verdict(plan, advice), highlight=False)
    if copy := plan.step.checkpoint_copy:
        where = "beyond the peak" if plan.gpu is None else "of the host's memory on a rank"
        console.print(
            f"while a checkpoint is written: {_size(copy)} {where}; none with checkpoint.background=false",
            highlight=False,
        )
    if plan.deepspeed or plan.own:
        console.print(_communication(plan))
    for line in _time(plan):
        console.print(line, highlight=False)


def _heading(plan: Plan) -> list[str]:
    trained = sum(p.numel for p in plan.parameters if p.trained)
    total = sum(p.numel for p in plan.parameters)
    train, work, engine = plan.config.train, plan.workload, plan.config.engine
    rows = work.largest
    how = [f"ZeRO-{engine.stage}", train.dtype]
    how += ["optimizer on the host"] if engine.offload_optimizer else []
    how += ["weights on the host"] if engine.offload_parameters else []
    how += ["activations recomputed"] if train.gradient_checkpointing else []
    return [
        f"{plan.settings.architecture or plan.config.model.name}: {total:,} parameters, "
        f"{'all' if trained == total else f'{trained:,}'} trained",
        f"{plan.ranks} x {'process on a CPU' if plan.gpu is None else plan.gpu.name}: {', '.join(how)}",
        f"a step: {train.batch_size} pairs, {work.microbatches} micro-batch(es) of "
        f"{train.microbatch(plan.ranks)} per rank, {work.tokens:,} tokens with padding ({work.source})",
        f"the largest micro-batch: {rows.rows} row(s) of {rows.length:,} tokens, {rows.responses:,} scored",
    ]


def _memory(plan: Plan) -> Table:
    phases = plan.step.phases()
    unit = "GB" if plan.worst.device_bytes > 1e9 else "MB"
    table = Table(title=f"{unit} of a rank, at the worst moment of each phase", title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right")

    def row(name: str, sizes: list[int]) -> None:
        if any(sizes):
            table.add_row(name, *(f"{size / UNITS[unit]:,.2f}" for size in sizes))

    for part in phases[0].device:
        row(part, [phase.device[part] for phase in phases])
    table.add_section()
    row("in all", [phase.device_bytes for phase in phases])
    row("and on the host", [phase.host_bytes for phase in phases])
    return table


def _verdict(plan: Plan, advice: Advice | None) -> str:
    peak = f"peak {_size(plan.worst.device_bytes)} ({plan.worst.name})"
    if plan.room is None:
        peak += f" and {LIBRARIES} for Python and its libraries"
        return f"{peak}; choose a GPU to see whether it fits and how long it takes: gpu=h100-80gb"
    assert plan.gpu is not None
    room = f"{_size(plan.room)} of {_size(plan.gpu.memory)}"
    if plan.fits:
        return f"fits: {peak}, {room} may be filled (plan.headroom={plan.settings.headroom:g})"
    if advice is None:
        return f"DOES NOT FIT: {peak}, {room} may be filled; nor does any engine; take more or larger GPUs"
    then = f"peak {_size(advice.plan.worst.device_bytes)}"
    if advice.plan.times is not None and plan.times is not None:
        then += f", {advice.plan.times.step / plan.times.step:.2g} times the step's time"
    return f"DOES NOT FIT: {peak}, {room} may be filled; nearest that does: {advice.overrides} ({then})"


def _communication(plan: Plan) -> Table:
    table = Table(title="Sent in a step by each rank", title_justify="left")
    for column in ("collective", "for"):
        table.add_column(column)
    for column in ("messages", "bytes in them", "on its link"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str], list[float]] = {}
    for message in [*plan.deepspeed, *plan.own]:
        sums = groups.setdefault((message.name, message.purpose), [0, 0, 0.0])
        sums[0] += message.count
        sums[1] += message.count * message.size
        sums[2] += message.wire(plan.ranks)
    for (name, purpose), (count, size, wire) in groups.items():
        table.add_row(name, purpose, f"{count:,.0f}", f"{size:,.0f}", _size(wire))
    return table


def _time(plan: Plan) -> list[str]:
    work = plan.workload
    lines = [
        f"{work.steps:,} steps, {work.total_tokens:,} tokens, {plan.work.flops:.3g} FLOP per step and rank"
    ]
    times = plan.times
    if times is None or plan.seconds is None or plan.gpu_hours is None:
        return lines
    beside = "beside them " if times.overlaps else ""
    done = f"{plan.work.operations:,} operations started in {times.starts:.3g} s"
    done += f" and {_size(plan.work.bytes)} moved in {times.memory:.3g} s"
    if plan.config.engine.offload_optimizer:
        updated = "on the host"
    else:
        updated = f"{plan.update.operations:,} operations, {_size(plan.update.bytes)}"
    return [
        *lines,
        f"a step: {times.step:.3g} s (products {times.products:.3g} s, meanwhile {done}; {beside}"
        f"communication {times.communication:.3g} s, optimizer {times.optimizer:.3g} s "
        f"({updated}), host {times.host:.3g} s); bottleneck: {times.bottleneck}",
        f"the run: {_duration(plan.seconds)} (reference pass {_duration(plan.reference_seconds)}), "
        f"{plan.gpu_hours:,.1f} GPU-hours, without evaluations; an estimate from the GPU's figures",
    ]


def _size(size: float) -> str:
    """Bytes with three digits or more."""
    unit = next((unit for unit, factor in reversed(UNITS.items()) if size >= factor), None)
    if unit is None:
        return f"{size:.0f} B"
    value = size / UNITS[unit]
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class PlanLine:
    """One of many plans: the values that make it, and where it does not fit the nearest one that does."""

    values: dict[str, str]
    plan: Plan
    advice: Advice | None


def lines(rows: list[PlanLine]) -> list[str]:
    """A Markdown table of plans."""
    columns = ["changed so that it fits", "peak GB", "GB sent per step", "s per step"]
    columns += ["bottleneck", "GPU-hours"]
    names = [*rows[0].values, *columns]
    table = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        plan = row.advice.plan if row.advice is not None else row.plan
        cells = [*row.values.values(), "" if row.advice is None else row.advice.overrides]
        if row.advice is None and not row.plan.fits:
            cells[-1] = "nothing fits"
        assert plan.times is not None and plan.gpu_hours is not None
        sent = sum(message.wire(plan.ranks) for message in [*plan.deepspeed, *plan.own])
        cells += [f"{plan.worst.device_bytes / 1e9:.0f}", f"{sent / 1e9:.0f}", f"{plan.times.step:.2f}"]
        cells += [plan.times.bottleneck, f"{plan.gpu_hours:.1f}"]
        table.append(f"| {' | '.join(cells)} |")
    return table
