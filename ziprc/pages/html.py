"""How pages are made: jinja2 templates that escape what they are given, and how numbers are written on them.

Templates, style sheets and scripts lie in `templates/`. They lay out; every number and finding comes from Python as plain
data. `fill` is the only way to a page: text of a model or a user is escaped there, and no template may say otherwise (a
test reads them all). Only what `fill` has filled in and the drawings of figures.py are taken as HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the report: its heading, the template below `templates/` that lays it out, and what that is given."""

    title: str
    template: str
    data: Record


def as_interval(result: Record | float | None) -> Record:
    """A result that may be a bare number, as an interval without ends."""
    return result if isinstance(result, Mapping) else {"value": result, "low": None, "high": None}


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def found(value: float | None, digits: int = 3) -> str:
    """A result or a count; counts are integers in the record and have no decimals."""
    return f"{value:,}" if isinstance(value, int) else number(value, digits)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent, without the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference of shares in points; never a negative zero."""
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def missed(rows: Sequence[Record], lacking: str) -> Iterator[str]:
    """The headline numbers that missed their targets, in sentences; what is `lacking` where that cannot be said."""
    for row in rows:
        if row["met"] is None:
            yield f"{row['name']}: cannot be said, {lacking}."
        elif not row["met"]:
            result = found(as_interval(row["result"])["value"])
            yield f"{row['name']}: {result}, wanted {row['direction']} {row['target']:.3g}."


def side(interval: Record) -> int:
    """On which side of zero an interval lies; 0 when it holds zero, or has no ends."""
    return 0 if interval["low"] is None else int(interval["low"] > 0) - int(interval["high"] < 0)


_TEMPLATES = Environment(loader=PackageLoader("ziprc.pages"), autoescape=True, undefined=StrictUndefined)
_TEMPLATES.trim_blocks = _TEMPLATES.lstrip_blocks = True
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
_TEMPLATES.globals |= {f.__name__: f for f in (as_interval, number, found, percent, signed, side)}


def fill(template: str, **data: Any) -> Markup:
    """A template with everything in `data` escaped; a name that the template uses and `data` lacks is an error."""
    return Markup(_TEMPLATES.get_template(template).render(data))
