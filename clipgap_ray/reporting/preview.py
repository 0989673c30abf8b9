"""The figure of `clipgap split preview`: size of the cut against slack, similarity and rank."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import Theme, grid

PANELS = {
    "gap-match": (("gap-match",), "slack"),
    "threshold": (("threshold",), "rows at least this similar go"),
    "near and far": (("near", "far"), "similarity at the cut"),
}


def cut_sizes(rows: list[Record], title: str, theme: Theme) -> Figure:
    """Draw the share of the pool that each cut keeps.

    Args:
        rows: Records {cut, value, kept_share}.
        title: What was cut.
        theme: Colours.
    """
    cuts = {row["cut"] for row in rows}
    panels = {name: panel for name, panel in PANELS.items() if cuts & set(panel[0])}
    figure, axes = grid(len(panels), height=3.2, sharey=True)
    for axis, (name, (kinds, label)) in zip(axes, panels.items(), strict=True):
        for kind in kinds:
            _line(axis, [row for row in rows if row["cut"] == kind], kind, theme)
        axis.set_title(name)
        axis.set_xlabel(label)
        axis.set_ylim(-0.02, 1.05)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if len(kinds) > 1:
            axis.legend()
    axes[0].set_ylabel("kept of the pool")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=theme.faint)
    return figure


def _line(axis: Axes, rows: list[Record], kind: str, theme: Theme) -> None:
    points = sorted((row["value"], row["kept_share"]) for row in rows)
    axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=theme.kind(kind), label=f"{kind}-pruned")
