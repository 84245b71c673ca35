"""A document as one HTML file that needs nothing else, or as Markdown beside its figures."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rcpo import __version__
from rcpo.report import theme
from rcpo.report.document import Document, Picture

FORMATS = ("png", "pdf", "svg")
RESOLUTION = 160  # dots per inch of a PNG


def to_html(document: Document, refresh: float | None = None) -> str:
    """The page; with `refresh` it reloads itself every so many seconds."""
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(
        document=document,
        svg=lambda picture: theme.themed_svg(picture.figure, picture.name, picture.caption),
        light=theme.css_variables(dark=False),
        dark=theme.css_variables(dark=True),
        refresh=refresh,
        version=__version__,
    )


def to_markdown(document: Document, figures: dict[str, str]) -> str:
    """The same as Markdown; `figures` are the paths of the files of its pictures by name."""
    return as_markdown("report.md.j2", document=document, figures=figures, version=__version__)


def as_markdown(template: str, **facts: Any) -> str:
    """A template of Markdown with what it asks for."""
    return _environment(autoescape=False).get_template(template).render(**facts)


def save_picture(picture: Picture, path: Path) -> None:
    """Write a figure for print, on white, in the format of the path's suffix."""
    kind = path.suffix.removeprefix(".")
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with theme.applied(**{"svg.hashsalt": picture.name}):
        picture.figure.savefig(path, dpi=RESOLUTION, facecolor=theme.PAPER, metadata=metadata)


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("rcpo.report"), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _markdown_text
    return environment


def _markdown_text(text: str) -> str:
    """Text from data as Markdown shows it: no markup, no table of its own, one line."""
    escaped = html.escape(str(text), quote=False)
    for mark in "\\`*_[]|#":
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())
