"""What a section of the page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipgap_ray.reporting import galleries
from clipgap_ray.reporting.theme import Draw


@dataclass(frozen=True)
class Plot:
    """A figure to draw: file name, how, and what it shows for those who cannot see it."""

    name: str
    draw: Draw
    caption: str


@dataclass(frozen=True)
class Table:
    """A table to print: headers, rows of cells; a cell is text or (text, small print, emphasised)."""

    headers: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class Section:
    """One section of the page. `missing` says what is not there and which command makes it."""

    anchor: str
    title: str
    conclusion: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    strips: dict[str, list[galleries.Strip]] = field(default_factory=dict)
    answers: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: str = ""
