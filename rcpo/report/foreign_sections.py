"""What a report shows of another tool's run: winner, loser, and margin, and what its log cannot tell."""

from __future__ import annotations

import numpy as np

from rcpo.report import figures, panels, tables
from rcpo.report.document import Block, Document, Paragraph, Picture, Section
from rcpo.report.foreign import HALOS, has_reference
from rcpo.report.panels import Panel
from rcpo.report.runs import Run
from rcpo.report.series import stretch
from rcpo.report.words import number, progress

ENDS = 10  # of the logged rows: the first and the last tenth are a curve's start and end


def of_foreign(run: Run) -> Document:
    """The report of one run of another tool."""
    parts = [
        Section("Training", _training(run)),
        Section("Held out", tables.held_out(run)),
        Section("What this log cannot tell", [Paragraph(text) for text in unknowns(run)]),
    ]
    return Document(
        title=run.name,
        status=f"{run.origin}, {run.status.value}",
        headline=headline(run),
        sections=[part for part in parts if part.blocks],
    )


def sections_of(run: Run) -> list[Section]:
    """The same as sections beside those of other runs."""
    own = of_foreign(run)
    blocks = [Paragraph(own.headline), *(block for part in own.sections for block in part.blocks)]
    return [Section(f"{run.name}: {run.origin}", blocks)]


def _training(run: Run) -> list[Block]:
    chosen: list[Panel] = []
    if run.has("rewards/chosen"):
        chosen += [panels.rewards, panels.reward_margin]
    if run.has("logps/chosen"):
        chosen.append(panels.sides)
    if run.has("rc/alpha"):
        chosen.append(panels.alpha)
    if run.has("dynamics/score_cosine"):
        chosen.append(panels.ratio)
    if not chosen:
        return [Paragraph("The log has neither rewards nor log-probs of the two sides.")]
    width = stretch([run])
    points = "Each point is a logged row" if width == 1 else f"Each point is the mean of {width} steps"
    caption = f"{points}. Diamonds are held out. The loser should fall, and the winner should not."
    name = f"training-{run.name.replace('/', '-')}"
    return [Picture(name, figures.side_by_side([(run.name, [run])], chosen), caption)]


def headline(run: Run) -> str:
    """Where winner, loser, and margin went, in the unit that the log has."""
    found = {side: _ends(run, f"rewards/{side}") for side in ("chosen", "rejected", "margins")}
    winner, loser, margin = found["chosen"], found["rejected"], found["margins"]
    if winner is None:
        return f"{run.origin}, logged up to step {progress(run)}: no rewards of the two sides are logged."
    text = f"The winner's reward went from {number(winner[0])} to {number(winner[1])}"
    if loser is not None:
        text += f", the loser's from {number(loser[0])} to {number(loser[1])}"
    if margin is not None:
        text += f"; the margin is {number(margin[1])}"
    reference = has_reference(run.rows)
    if reference and winner[1] < 0:
        return f"{text}. A reward below 0 means that the winner is less likely than under the reference."
    if reference is False:
        return f"{text}. These rewards are log-probs times a constant: they compare with no reference."
    return f"{text}."


def _ends(run: Run, key: str) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of the logged rows."""
    values = run.column(key)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    count = max(1, len(values) // ENDS)
    return float(values[:count].mean()), float(values[-count:].mean())


def unknowns(run: Run) -> list[str]:
    """What a reader may look for and the log does not hold."""
    texts = []
    beta = run.settings.get("loss.beta") if run.origin == HALOS else None
    if has_reference(run.rows) is False:
        texts.append(
            "Whether the winner fell against the start: without a reference in the rewards, the log-probs of "
            "one step can only be compared with those of others, which are of other pairs."
        )
    elif run.has("rewards/chosen") and beta is None:
        texts.append(
            "Log-ratios in nats: rewards are β times the log-ratio to the reference (for DPO and its kin), "
            "and the log does not hold β. Their sign is that of the log-ratio."
        )
    elif run.has("rewards/chosen"):
        texts.append(
            f"Log-ratios by themselves: divide a reward by loss.beta={beta} (for DPO and its kin without "
            "length normalization)."
        )
    if not run.has("logps/chosen"):
        texts.append("Log-probs of the two sides: they are not logged.")
    if not run.evaluation:
        texts.append(
            "What holds on unseen pairs: no evaluation is logged, and these curves are of training pairs."
        )
    texts.append("Intervals, and the share of pairs whose winner fell: the log has means alone.")
    if not run.has("dynamics/score_cosine"):
        texts.append(
            "The incentive ratio, the bands, and α: they need gradients, which the tool does not log. "
            "rcpo.integrations.trl logs them inside TRL's trainers."
        )
    return texts
