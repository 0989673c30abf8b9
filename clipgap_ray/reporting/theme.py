"""How figures look: Okabe and Ito's colours, which stay apart under every common colour blindness; light and dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
WIDTH_INCHES = 11.0
PNG_DPI = 150
TITLE_SIZES = (9.5, 8.0)  # points: down to the first in one line, then to the second in two
TITLE_MARGIN = 8  # pixels to what is beside it
LEGEND_SHARE = 0.98  # of the figure's width; the rest is its margin


@dataclass(frozen=True)
class Theme:
    """Ink on a transparent page; `strong` replaces blue and black where the page is dark."""

    name: str
    ink: str
    faint: str
    grid: str
    page: str
    pool: str

    def kind(self, kind: str) -> str:
        """Return the colour of a kind of split or model."""
        return {
            "full": self.ink,
            "near": VERMILLION,
            "far": GREEN,
            "random": self.faint,
            "core": PURPLE,
            "gap-match": self.pool,
            "supervised": ORANGE,
        }.get(kind, SKY)


LIGHT = Theme("light", "#1b1f24", "#6b7280", "#e3e6ea", "#ffffff", BLUE)
DARK = Theme("dark", "#e8eaed", "#9aa3ad", "#343a42", "#15181c", SKY)
Draw = Callable[[Theme], Figure]


@contextmanager
def using(theme: Theme) -> Iterator[None]:
    """Set matplotlib's defaults for a theme; text becomes outlines, so that a figure looks alike everywhere."""
    settings: Any = {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "legend.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "lines.linewidth": 2.0,
        "svg.hashsalt": "clipgap",
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def grid(
    count: int, columns: int = 3, height: float = 2.9, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in rows of up to `columns`, and its axes; unused panels are hidden."""
    columns = min(columns, count)
    rows = -(-count // columns)
    # A single panel would stretch over the whole page: keep it at a comfortable reading width.
    width = WIDTH_INCHES if count > 1 else 7.5
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.5),
        squeeze=False,
        sharex=sharex,
        sharey=sharey,
        layout="constrained",
    )
    flat = list(axes.ravel())
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def legend_above(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """Put one legend for all panels above them: the entries of one panel, then what only others have.

    It has `columns` columns, or as many as the figure is wide enough for.
    """
    handles, labels = axes.get_legend_handles_labels()
    known = set(labels)
    for other in figure.axes:  # a kind that only a later panel has
        for handle, label in zip(*other.get_legend_handles_labels(), strict=True):
            if label not in known:
                known.add(label)
                handles.append(handle)
                labels.append(label)
    for count in range(min(columns, max(len(labels), 1)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=count)
        if count == 1 or legend.get_window_extent().width <= LEGEND_SHARE * figure.bbox.width:
            return
        legend.remove()


def fit_titles(figure: Figure) -> None:
    """Make titles that reach into the next panel, or out of the figure, smaller; break before "  (" what still does."""
    figure.draw_without_rendering()
    panels = [axis for axis in figure.axes if axis.get_visible() and axis.get_title("left")]
    for axis in panels:
        place = axis.get_window_extent()
        beside = [other.get_window_extent() for other in panels]
        ends = [box.x0 for box in beside if box.x0 > place.x0 and box.y0 < place.y1 and box.y1 > place.y0]
        room = min([*ends, figure.bbox.width]) - place.x0 - TITLE_MARGIN
        title = next(text for text in axis.findobj(Text) if text.get_text() == axis.get_title("left"))
        for smallest in TITLE_SIZES:
            while title.get_window_extent().width > room and float(title.get_fontsize()) > smallest:
                title.set_fontsize(float(title.get_fontsize()) - 0.5)
            if title.get_window_extent().width > room:
                title.set_text(title.get_text().replace("  (", "\n("))


def render(draw: Draw) -> dict[str, bytes]:
    """Draw a figure as `light.svg`, `dark.svg` and `light.png` (white page, for slides)."""
    files = {}
    for theme in (LIGHT, DARK):
        with using(theme):
            figure = draw(theme)
            fit_titles(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            files[f"{theme.name}.svg"] = buffer.getvalue()
            if theme is LIGHT:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
                files["light.png"] = buffer.getvalue()
            plt.close(figure)
    return files


def page_share(svg: bytes) -> int:
    """Return how much of the page's width a figure takes, in percent, so that letters are of one size everywhere."""
    width = re.search(rb'width="([0-9.]+)pt"', svg)
    return 100 if width is None else min(100, round(100 * float(width[1]) / (72 * WIDTH_INCHES)))


def data_uri(data: bytes, media: str) -> str:
    """Return bytes as a data: address, so that the page needs no other file."""
    return f"data:{media};base64,{base64.b64encode(data).decode()}"
