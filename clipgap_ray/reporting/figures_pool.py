"""Figures of the join's pool side: regimes of neighbours, backgrounds against drops, adjusted robustness."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from clipgap_ray.kernels import robustness
from clipgap_ray.kernels.neighbours import REGIMES
from clipgap_ray.reporting.figures_models import round_ticks
from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import BLUE, GREEN, ORANGE, PURPLE, VERMILLION, Theme, grid, legend_above

COLOURS = dict(zip(REGIMES, (VERMILLION, PURPLE, ORANGE, GREEN), strict=True))


def regimes(models: dict[str, Record], theme: Theme) -> Figure:
    """Shares of the regimes per model and group as stacked bars, and the accuracy within each beside them."""
    bars = [(f"{model} · {group['group']}", group) for model, own in models.items() for group in own["groups"]]
    figure, (left, right) = grid(2, columns=2, height=1.2 + 0.42 * len(bars))
    at = -np.arange(len(bars))
    start = np.zeros(len(bars))
    for number, name in enumerate(REGIMES):
        rows = [group["regimes"][number] for _, group in bars]
        share = np.array([row["share"] for row in rows])
        if not share.any():
            continue
        left.barh(at, share, 0.7, left=start, color=COLOURS[name], alpha=0.85, label=name)
        for y, x, row in zip(at, start + share / 2, rows, strict=True):
            if row["share"] > 0.06:
                left.text(
                    float(x), float(y), f"{row['num_images']:,}", ha="center", va="center", fontsize=9, color="#1b1f24"
                )
        start = start + share
        known = [(y, row) for y, row in zip(at, rows, strict=True) if row["num_images"]]
        offset = 0.24 - 0.16 * number
        right.hlines([y + offset for y, _ in known], [r["low"] for _, r in known], [r["high"] for _, r in known],
                     color=COLOURS[name], lw=1.4)  # fmt: skip
        right.plot([r["accuracy"] for _, r in known], [y + offset for y, _ in known], "o", color=COLOURS[name], ms=6,
                   clip_on=False)  # fmt: skip
    left.set_yticks(at, [name for name, _ in bars])
    right.set_yticks(at, [])
    for axis, label in ((left, "share of the photos; numbers are photos"), (right, "accuracy (top 1), 95 %")):
        axis.set_xlim(0, 1)
        axis.set_ylim(-len(bars) + 0.4, 0.6)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
    legend_above(figure, left)
    return figure


def prevalence(models: dict[str, Record], theme: Theme) -> Figure:
    """Drop of every class against how much more common its first background is in the pool."""
    figure, axes = grid(len(models), columns=2, height=3.6, sharex=True, sharey=True)
    for number, (axis, (name, own)) in enumerate(zip(axes, models.items(), strict=True)):
        rows = [row for row in own["classes"] if row["log_ratio"] is not None]
        axis.axhline(0, color=theme.faint, lw=1)
        axis.axvline(0, color=theme.faint, lw=1)
        axis.plot([r["log_ratio"] for r in rows], [r["drop_pp"] for r in rows], "o", color=theme.pool, ms=6)
        if len(rows) <= 50:
            for at, names in _names(rows).items():
                axis.annotate(names, at, xytext=(4, 3), textcoords="offset points", fontsize=8, color=theme.faint)
        rho = "" if own["spearman"] is None else f", Spearman {own['spearman']:.2f}".replace("-", "−")
        axis.set_title(f"{name}  ({len(rows)} classes{rho})", fontsize=11)
        if number + 2 >= len(models):
            axis.set_xlabel("log (pool images: first background / second)")
            axis.tick_params(labelbottom=True)
        if number % 2 == 0:
            axis.set_ylabel("drop in points")
    return figure


def _names(rows: list[Record]) -> dict[tuple[float, float], str]:
    """Names of the classes by their point: those that share one stand behind each other."""
    names: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        names.setdefault((row["log_ratio"], row["drop_pp"]), []).append(row["class_name"].split(",")[0])
    return {at: ", ".join(own) for at, own in names.items()}


def adjusted(result: Record, theme: Theme) -> Figure:
    """First against second group on probit axes, all photos beside those matched on similarity."""
    figure, axes = grid(2, columns=2, height=4.4, sharex=True, sharey=True)
    first, second = result["groups"]
    values = [m[f"{k}_{g}"] for m in result["models"] for k in ("all", "matched") for g in (first, second)]
    known = [v for v in values if v is not None]
    ends = (_probit(min(known)) - 0.3, _probit(max(known)) + 0.3)
    for axis, kind, title in zip(axes, ("all", "matched"), ("all photos", "matched on similarity"), strict=True):
        _panel(axis, result, kind, ends, theme)
        counts = [m[f"{kind}_n"] for m in result["models"] if m.get(f"{kind}_n")]  # older joins have none
        ends_n = " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts)))) if counts else ""
        axis.set_title(f"{title}  (n = {ends_n})" if counts else title, fontsize=11)
        axis.set_xlabel(f"accuracy on {first} (probit)")
    axes[0].set_ylabel(f"accuracy on {second} (probit)")
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    legend_above(figure, fullest)
    return figure


def _panel(axis: Axes, result: Record, kind: str, ends: tuple[float, float], theme: Theme) -> None:
    first, second = result["groups"]
    axis.plot(ends, ends, color=theme.faint, ls=(0, (2, 3)), lw=1.2, label="y = x")
    line, x = result["lines"][kind], np.array(ends)
    axis.plot(x, line["slope"] * x + line["intercept"], color=ORANGE, lw=2, label="baselines' line")
    placed: list[tuple[float, float]] = []
    for model in result["models"]:
        if model[f"{kind}_{first}"] is None:
            continue
        at = (_probit(model[f"{kind}_{first}"]), _probit(model[f"{kind}_{second}"]))
        colour = ORANGE if model["baseline"] else BLUE
        hollow = model[f"{kind}_extrapolates"]
        axis.plot(*at, "o", ms=7.5, color=colour, markerfacecolor=theme.page if hollow else colour, mew=1.6)
        residual = f"{model[f'{kind}_residual_pp']:+.1f}".replace("-", "−")
        reach = 0.06 * (ends[1] - ends[0])
        crowded = any(abs(at[0] - x) < 4 * reach and abs(at[1] - y) < reach for x, y in placed)
        place, side = ((-7, -4), "right") if crowded else ((7, -4), "left")
        axis.annotate(f"{model['model']} {residual}", at, xytext=place, ha=side, textcoords="offset points", fontsize=9)
        placed.append(at)
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(FixedLocator(round_ticks(*ends)))
        which.set_minor_locator(NullLocator())
        which.set_major_formatter(FuncFormatter(lambda z, _: f"{100 * robustness.from_axis(z, 'probit'):.3g} %"))
    axis.set_xlim(ends)
    axis.set_ylim(ends)


def _probit(value: float) -> float:
    return float(robustness.to_axis(np.clip(value, 1e-4, 1 - 1e-4), "probit"))
