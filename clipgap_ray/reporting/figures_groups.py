"""Figures about how a drop was measured: who chose the groups, and how the models were asked."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import BLUE, ORANGE, Theme, grid, legend_above

BESIDE_MODELS = 4  # more have their two heat maps below each other, or their intervals would overlap
SHOWN_MODELS = 6  # a figure of more panels is a table


def matrix(records: list[Record], models: list[str], theme: Theme) -> Figure:
    """Two heat maps with their numbers: drops on the photos that chose the groups, and on held-out halves."""
    beside = len(models) <= BESIDE_MODELS
    figure, axes = grid(2, columns=1 + beside, height=1.6 + 0.55 * len(models))
    values = {key: _square(records, models, key) for key in ("same_photos_drop_pp", "held_out_drop_pp")}
    highest = max(float(np.nanmax(np.abs(v), initial=1.0)) for v in values.values())
    titles = ("chosen and evaluated on the same photos", "chosen on one half, evaluated on the other")
    for axis, (key, value), title in zip(axes, values.items(), titles, strict=True):
        _heat(axis, value, highest, theme)
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(models)), models, rotation=30, ha="right")
        axis.set_xlabel("evaluated model")
        first = axis is axes[0] or not beside
        axis.set_yticks(range(len(models)), models if first else [])
        axis.set_ylabel("groups chosen by" if first else "")
        if key == "held_out_drop_pp":
            _intervals(axis, records, models)
    figure.suptitle(
        f"drop in points from the best to the worst attribute, mean over classes (n = {_classes(records)})",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _classes(records: list[Record]) -> str:
    counts = [r["num_classes"] for r in records]
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts))))


def _square(records: list[Record], models: list[str], key: str) -> np.ndarray:
    found = {(r["discovered_by"], r["evaluated"]): r[key] for r in records}
    return np.array([[np.nan if found[i, j] is None else found[i, j] for j in models] for i in models], float)


def _heat(axis: Axes, value: np.ndarray, highest: float, theme: Theme) -> None:
    """Tiles whose depth is the drop, each with its number: nobody has to read a colour."""
    axis.set_facecolor("none")
    for (i, j), drop in np.ndenumerate(value):
        depth = 0.0 if np.isnan(drop) else 0.55 * max(drop, 0.0) / highest
        axis.add_patch(_tile(i, j, depth, theme))
        text = "–" if np.isnan(drop) else f"{drop:.1f}".replace("-", "−")
        axis.text(j, i - 0.08, text, ha="center", va="center", fontsize=11, color=theme.ink)
    axis.set_xlim(-0.5, value.shape[1] - 0.5)
    axis.set_ylim(value.shape[0] - 0.5, -0.5)
    axis.grid(visible=False)


def _tile(row: int, column: int, depth: float, theme: Theme) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=(BLUE, depth), edgecolor=theme.grid)


def _intervals(axis: Axes, records: list[Record], models: list[str]) -> None:
    for record in records:
        if record["held_out_drop_pp"] is None:
            continue
        place = (models.index(record["evaluated"]), models.index(record["discovered_by"]) + 0.26)
        text = f"[{record['held_out_low_pp']:.1f}, {record['held_out_high_pp']:.1f}]".replace("-", "−")
        axis.text(*place, text, ha="center", va="center", fontsize=8 if len(models) <= 9 else 7)


def jaccards(records: list[Record], theme: Theme) -> Figure:
    """How much of what a cut removes two encoders have in common, a panel per pair and test set; ticks are chance."""
    panels = list(dict.fromkeys((r["pair"], r["test"]) for r in records))
    rows = max(sum((r["pair"], r["test"]) == panel for r in records) for panel in panels)
    figure, axes = grid(len(panels), height=1.1 + 0.3 * rows, sharex=True)
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        own = [r for r in records if (r["pair"], r["test"]) == panel]
        at = -np.arange(len(own), dtype=float)
        known = [np.nan if r["jaccard"] is None else r["jaccard"] for r in own]
        chance = [np.nan if r["chance"] is None else r["chance"] for r in own]
        axis.barh(at, known, 0.62, color=theme.pool, label="removed by both, of what either removes")
        axis.plot(chance, at, "|", color=ORANGE, ms=13, mew=2.5, label="by chance")
        axis.set_yticks(at, [r["cut"] for r in own])
        axis.set_ylim(-len(own) + 0.4, 0.6)
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.set_title(f"{': '.join(filter(None, panel))}  (n = {own[0]['common_uids']:,} pool images)", fontsize=11)
        axis.tick_params(labelbottom=True)
        if number + 3 >= len(panels):
            axis.set_xlabel("Jaccard index")
    legend_above(figure, axes[0])
    return figure


def variants(models: dict[str, list[Record]], theme: Theme) -> Figure:
    """Drop of every way of asking, balanced and unbalanced, a panel per model (the first few)."""
    shown = dict(list(models.items())[:SHOWN_MODELS])
    rows = max(len(ways) for ways in shown.values())
    figure, axes = grid(len(shown), columns=2, height=1.3 + 0.5 * rows, sharex=True)
    for axis, (name, ways) in zip(axes, shown.items(), strict=True):
        at = -np.arange(len(ways), dtype=float)
        for offset, key, colour, label in (
            (0.13, "balanced", theme.pool, "balanced: every class once"),
            (-0.13, "unbalanced", ORANGE, "unbalanced: every photo once"),
        ):
            low, high = ([w[f"{key}_{end}_pp"] for w in ways] for end in ("low", "high"))
            axis.hlines(at + offset, low, high, color=colour, lw=1.8)
            axis.plot([w[f"{key}_drop_pp"] for w in ways], at + offset, "os"[key[0] == "u"], color=colour, ms=6.5,
                      label=label)  # fmt: skip
        axis.set_yticks(at, [w["variant"] for w in ways])
        axis.set_ylim(-len(ways) + 0.4, 0.6)
        axis.axvline(0, color=theme.faint, lw=1)
        axis.grid(axis="y", visible=False)
        axis.set_title(f"{name}  (n = {ways[0]['num_images']:,})", fontsize=11)
        axis.set_xlabel("drop in points, 95 %")
        axis.tick_params(labelbottom=True)
    legend_above(figure, axes[0])
    return figure
