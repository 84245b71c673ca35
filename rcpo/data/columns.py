"""`data.columns`: where a file keeps what rcpo calls prompt, chosen, and so on.

A column's name, a path into nested values (`choices[0].text`), or a Jinja template over the whole row
(`"{{ instruction }}\n{{ input }}"`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from rcpo.data.records import BadRow
from rcpo.errors import ConfigError
from rcpo.system.text import first_line

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
_MISSING = object()


def is_template(spec: str) -> bool:
    """Whether a value of `data.columns` is a Jinja template."""
    return "{{" in spec or "{%" in spec


def column_of(spec: str, row: Mapping[str, Any]) -> str | None:
    """The column that a name or path begins with, None where the row has none such."""
    if spec in row:
        return spec
    first = _STEP.match(spec)
    return first[1] if first is not None and first[1] in row else None


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the wanted fields under rcpo's names, and no more under the file's; raises BadRow.

    A field whose column a row lacks is left out, and so is a column of rcpo's own name that is not the one
    wanted.

    >>> rename({"a": {"b": ["x"]}, "q": "y"}, {"chosen": "a.b[0]", "prompt": "{{ q }}?"})
    {'chosen': 'x', 'prompt': 'y?'}
    """
    if not columns:
        return dict(row)
    used = {column_of(spec, row) for spec in columns.values() if not is_template(spec)}
    found = {name: value for name, value in row.items() if name not in columns and name not in used}
    for name, spec in columns.items():
        value = _rendered(spec, row) if is_template(spec) else _looked_up(spec, row)
        if value is not _MISSING:
            found[name] = value
    hidden = {name for name in found if name not in columns and _in_template(name, columns)}
    return {name: value for name, value in found.items() if name not in hidden}


def check_templates(columns: Mapping[str, str]) -> None:
    """Raise ConfigError for a template that is not Jinja."""
    from jinja2 import TemplateSyntaxError

    for name, spec in columns.items():
        if is_template(spec):
            try:
                _compiled(spec)
            except TemplateSyntaxError as error:
                raise ConfigError(f"data.columns.{name}={spec!r} is not a Jinja template: {error}") from error


def _looked_up(spec: str, row: Mapping[str, Any]) -> Any:
    if spec in row:
        return row[spec]
    value: Any = row
    place = 0
    for step in _STEP.finditer(spec):
        if step.start() != place:
            return _MISSING
        place = step.end()
        try:
            value = value[int(step[2])] if step[2] is not None else value[step[1]]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return value if place == len(spec) else _MISSING


def _rendered(spec: str, row: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return _compiled(spec).render(**{str(name): value for name, value in row.items()}, row=row)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise BadRow(f"a template of data.columns does not fit: {first_line(error)[:200]}") from error


@cache
def _compiled(spec: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printable
    )
    return environment.from_string(spec)


def _printable(value: Any) -> Any:
    """A value that a template writes; raises ValueError for one that would only be Python's name for it."""
    if value is None:
        raise ValueError("it writes a value that the row leaves empty; {{ NAME or '' }} writes nothing then")
    if isinstance(value, dict | list | tuple):
        raise ValueError(
            "it writes a list or an object; take a part of it ([0], .text), or write it as JSON: "
            "{{ NAME | tojson }}"
        )
    return value


@cache
def _names(spec: str) -> frozenset[str]:
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_compiled(spec).environment.parse(spec)))


def _in_template(name: str, columns: Mapping[str, str]) -> bool:
    """Whether a template already says where a column belongs: it is not to be read twice."""
    return any(name in _names(spec) for spec in columns.values() if is_template(spec))
