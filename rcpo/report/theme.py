"""Colours, type and lines of the figures, and an SVG that follows the page into the dark.

Winner and loser have one colour each, everywhere: Okabe and Ito's blue and vermilion, which the common
colour vision deficiencies keep apart. Without calibration is drawn hollow or dashed, with it filled or solid,
so that nothing rests on colour alone.
"""

from __future__ import annotations

import html
import io
import os
import re
from contextlib import AbstractContextManager
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # read at import; a notebook's own exists in its kernel alone

import matplotlib as mpl
from matplotlib.figure import Figure

# name: (on light, on dark); the light ones are what PNG and PDF show and what the SVG is searched for
PALETTE = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#5f6872", "#9aa4af"),
    "grid": ("#dfe3e8", "#30363d"),
    "paper": ("#ffffff", "#15181c"),
    "winner": ("#0072b2", "#56b4e9"),
    "loser": ("#d55e00", "#ff9f45"),
    "calibrated": ("#007f5c", "#2bc79b"),
    "band": ("#e3c800", "#cdb92b"),
}
INK, MUTED, GRID, PAPER, WINNER, LOSER, CALIBRATED, BAND = (light for light, _ in PALETTE.values())

_SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # given, so that it need not be searched for: half of the drawing time
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: a quarter of the size, and the page's own type
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "pdf.fonttype": 42,
}


def applied(**more: Any) -> AbstractContextManager[None]:
    """Matplotlib under the settings of every figure of a report, and `more` of them."""
    settings: Any = {**_SETTINGS, **more}  # matplotlib's own type is a list of every key there is
    return mpl.rc_context(settings)


def css_variables(dark: bool) -> str:
    """The palette as CSS custom properties."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in PALETTE.items())


def themed_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for a page that defines `css_variables`; ids are its own by `name`."""
    buffer = io.StringIO()
    with applied(**{"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<g) id=\"[\w.]+_\d+\"", r"\1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for variable, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{variable})")
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None, "matplotlib gives every SVG its view box"
    opening = f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(description)}"'
    return opening + ' xmlns:xlink="http://www.w3.org/1999/xlink">' + text[text.index(">") + 1 :]
