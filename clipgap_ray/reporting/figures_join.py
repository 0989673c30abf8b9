"""Figures of the join: accuracy against similarity per group, and the drop in its parts."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import GREEN, ORANGE, Theme, grid, legend_above

HISTOGRAM_SHARE = 0.2  # of the panel's height


def drop_at_equal_similarity(result: Record, theme: Theme) -> Figure:
    """One model: accuracy of both groups against similarity, and the drop with its parts and checks beside it."""
    figure, (left, right) = grid(2, columns=2, height=3.9)
    _curves(left, result, theme)
    _parts(right, result, theme)
    legend_above(figure, left)
    return figure


def _curves(axis: Axes, result: Record, theme: Theme) -> None:
    """Binned accuracies with intervals, the fit as lines, and the groups' similarities as a histogram below."""
    colours = dict(zip(result["groups"], (theme.pool, ORANGE), strict=True))
    highest = max(_density(result, group).max() for group in colours)
    for (group, colour), marker in zip(colours.items(), "os", strict=True):
        rows = [b for b in result["bins"] if b["group"] == group]
        value = np.array([b["accuracy"] for b in rows])
        ends = np.array([[b["low"], b["high"]] for b in rows]).T
        errors = np.clip(np.stack([value - ends[0], ends[1] - value]), 0, None)
        at = [b["mean_similarity"] for b in rows]
        axis.errorbar(at, value, errors, ls="", marker=marker, ms=5.5, color=colour, elinewidth=1.2, capsize=2,
                      label=f"{group} (n = {result['num_images'][group]:,})")  # fmt: skip
        line = [p for p in result["curves"] if p["group"] == group]
        axis.plot([p["similarity"] for p in line], [p["accuracy"] for p in line], color=colour, lw=2)
        width = np.array([b["high_similarity"] - b["low_similarity"] for b in rows])
        left = [b["low_similarity"] for b in rows]
        axis.bar(
            left, HISTOGRAM_SHARE * _density(result, group) / highest, width, align="edge", color=colour, alpha=0.25
        )
    axis.set_ylim(-0.02, 1.04)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("similarity to the nearest training image")
    axis.set_ylabel("accuracy (top 1), 95 %")
    shown = "points: bins, lines: fit, bars: density" if result["curves"] else "points: bins, bars: density"
    axis.set_title(f"{result.get('model') or result.get('arm')} · {shown}", fontsize=10.5)


def _density(result: Record, group: str) -> np.ndarray:
    """Share of a group's photos per bin and unit of similarity: the bins are quantiles, so of unequal width."""
    rows = [b for b in result["bins"] if b["group"] == group]
    return (
        np.array([b["num_images"] / max(b["high_similarity"] - b["low_similarity"], 1e-6) for b in rows])
        / (result["num_images"][group])
    )


def _parts(axis: Axes, result: Record, theme: Theme) -> None:
    """Drop, explained, residual as bars from 0, so that the checks of the residual below compare; they add up."""
    parts = result["decomposition"]
    rows = [("drop", result["drop"]["drop_pp"], result["drop"]["interval_pp"], theme.ink)]
    checks = []
    if parts is not None:
        rows += [
            ("explained by\nsimilarity", parts["explained_pp"], parts["explained_interval_pp"], theme.pool),
            ("residual at equal\nsimilarity", parts["residual_pp"], parts["residual_interval_pp"], ORANGE),
        ]
        checks = [("check: matched\npairs", result["matched"]["drop_pp"], result["matched"]["interval_pp"]),
                  ("check: residual\nby bins", result["binned"]["residual_pp"], None)]  # fmt: skip
    for at, (_, value, interval, colour) in enumerate(rows):
        axis.barh(-at, value, 0.62, color=colour)
        axis.hlines(-at, *interval, color=theme.faint, lw=2.2)
    names = [row[0] for row in rows]
    for name, value, interval in (check for check in checks if check[1] is not None):
        axis.plot(value, -len(names), "D", color=GREEN, ms=6.5)
        if interval is not None:
            axis.hlines(-len(names), *interval, color=GREEN, lw=1.6)
        names.append(name)
    axis.set_yticks(-np.arange(len(names)), names)
    axis.set_ylim(-len(names) + 0.4, 0.6)
    axis.axvline(0, color=theme.faint, lw=1)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("points, 95 % over classes and images")
    axis.set_title(_title(result), fontsize=10.5)


def _title(result: Record) -> str:
    drop, parts = result["drop"]["drop_pp"], result["decomposition"]
    if parts is None:
        return f"drop {drop:.1f}: not identified"
    text = f"{drop:.1f} = {parts['explained_pp']:.1f} explained + {parts['residual_pp']:.1f} residual"
    return text.replace("-", "−").replace("+ −", "− ")


def similarity_parts(models: dict[str, Record], theme: Theme) -> Figure:
    """How much the groups differ in the similarity of the whole photo, the animal and the rest, and what each explains
    of the drop; a row per model and part."""
    rows = [(name, record, own["num_images"]) for name, own in models.items() for record in own["parts"]]
    figure, (left, right) = grid(2, columns=2, height=1.1 + 0.36 * len(rows))
    at = -np.arange(len(rows), dtype=float)
    colours = dict(
        zip(dict.fromkeys(r["part"] for _, r, _ in rows), (theme.ink, ORANGE, theme.pool, GREEN), strict=False)
    )
    for y, (_, record, _) in zip(at, rows, strict=True):
        colour = colours.get(record["part"], theme.faint)
        left.hlines(y, *record["exposure"]["interval"], color=colour, lw=2)
        left.plot(record["exposure"]["difference"], y, "o", color=colour, ms=7)
        parts = record["decomposition"]
        if parts is None:
            right.annotate("not identified", (0, y), xytext=(6, -4), textcoords="offset points", fontsize=9,
                           color=theme.faint)  # fmt: skip
            continue
        right.hlines(y, *parts["explained_interval_pp"], color=colour, lw=2)
        right.plot(parts["explained_pp"], y, "o", color=colour, ms=7)
    left.set_yticks(at, [f"{name} · {record['part']} (n = {count:,})" for name, record, count in rows])
    right.set_yticks(at, [])
    labels = ("second group farther from the pool by, 95 %", "points of the drop that it explains, 95 %")
    for axis, label in zip((left, right), labels, strict=True):
        axis.set_ylim(-len(rows) + 0.4, 0.6)
        axis.axvline(0, color=theme.faint, lw=1)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="y", visible=False)
    return figure


def _counted(result: Record) -> str:
    return f"{result.get('arm') or result.get('model')}\nn = {sum(result['num_images'].values()):,}"


def drop_parts(results: list[Record], theme: Theme) -> Figure:
    """Several models: explained and residual drop side by side with their intervals; without parts the drop alone."""
    figure, (axis,) = grid(1, height=1.0 + 0.5 * len(results))
    for at, result in enumerate(results):
        parts = result["decomposition"]
        axis.plot(
            result["drop"]["drop_pp"], -at, "|", color=theme.ink, ms=20, mew=2.5, label="drop" if not at else None
        )
        for offset, key, colour in ((0.15, "explained", theme.pool), (-0.15, "residual", ORANGE)):
            if parts is None:
                continue
            axis.hlines(-at + offset, *parts[f"{key}_interval_pp"], color=colour, lw=1.8)
            axis.plot(parts[f"{key}_pp"], -at + offset, "o", color=colour, ms=7)
        if parts is None:
            axis.annotate("not identified", (result["drop"]["drop_pp"], -at), xytext=(8, -4),
                          textcoords="offset points", fontsize=9, color=theme.faint)  # fmt: skip
    for key, colour in (("explained by similarity", theme.pool), ("residual at equal similarity", ORANGE)):
        axis.plot([], [], "o-", color=colour, ms=7, lw=1.8, label=key)
    axis.axvline(0, color=theme.faint, lw=1)
    axis.set_yticks(-np.arange(len(results)), [_counted(r) for r in results])
    axis.set_ylim(-len(results) + 0.4, 0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("points, 95 % over classes and images")
    legend_above(figure, axis)
    return figure
