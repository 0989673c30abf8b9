"""Figures about models: pruning curves, effective robustness on probit axes, groups of test sets."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from clipgap_ray.kernels import robustness
from clipgap_ray.reporting.figures import names_in_order
from clipgap_ray.reporting.robust import RobustnessPanel
from clipgap_ray.reporting.tables import Record, short
from clipgap_ray.reporting.theme import ORANGE, Theme, grid, legend_above

TICKS_PERCENT = (0.1, 1, 5, 10, 20, 50, 80, 90, 95, 99, 99.9)  # as many as fit a small panel
MORE_TICKS_PERCENT = (0.1, 0.5, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 98, 99, 99.5, 99.9)
MARKERS = "osD^vP*X<>hp"
WORD = 0.12  # of an axis: the width of "85 %"
PADDING: dict[robustness.Axes, float] = {"probit": 0.25, "logit": 0.4, "linear": 0.03}  # beyond the points
KIND_MARKER = {"near": "v", "random": "o", "far": "^", "core": "s", "capped": "D", "full": "*"}  # readable in grey
KIND_LABEL = {
    "near": "near-pruned (most alike removed)",
    "random": "random",
    "far": "far-pruned (least alike removed)",
    "core": "core set",
    "capped": "core set, capped per partition",
    "full": "full pool",
}


def pruning_curves(curves: list[Record], theme: Theme) -> Figure:
    """Accuracy against rows kept, one panel per test set, near, random, far and core (figure 4)."""
    tests = names_in_order(curves)
    figure, axes = grid(len(tests), height=3.1)
    sizes = [r["rows"] for r in curves if r["rows"]]
    wide = bool(sizes) and max(sizes) > 20 * min(sizes)  # sizes by halves: the smallest would lie on each other
    for axis, test in zip(axes, tests, strict=True):
        rows = [r for r in curves if r["test"] == test]
        full = [r for r in rows if r["kind"] == "full"][:1]
        for kind in ("near", "random", "far", "core", "capped"):
            targets = names_in_order([r for r in rows if r["kind"] == kind], "target")
            for number, target in enumerate(targets):
                points = [r for r in rows if r["kind"] == kind and r["target"] == target]
                style = ("-", "--", ":")[number % 3]
                suffix = f", by {target}" if target and len(targets) > 1 else ""
                _curve(axis, sorted([*points, *full], key=lambda r: r["rows"]), theme.kind(kind), style,
                       KIND_LABEL[kind] + suffix, KIND_MARKER[kind])  # fmt: skip
        if full:
            _curve(axis, full, theme.ink, "-", KIND_LABEL["full"], KIND_MARKER["full"])
        axis.set_title(f"{test}  (n = {rows[0]['num_images']:,})")
        axis.set_xlabel("pool images kept")
        _at_least(axis, 0.1)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        if wide:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.margins(x=0.08)
    axes[0].set_ylabel("accuracy (top 1)")
    legend_above(figure, axes[0], columns=4)
    return figure


def _at_least(axis: Axes, span: float) -> None:
    """Show at least a span of `span`: a panel that zooms into noise looks like an effect."""
    low, high = axis.get_ylim()
    if high - low < span:
        centre = min(max((low + high) / 2, span / 2), 1.02 - span / 2)
        axis.set_ylim(centre - span / 2, centre + span / 2)


def _curve(axis: Axes, rows: list[Record], colour: str, style: str, label: str, marker: str) -> None:
    """A line with error bars: the spread over seeds where there are several, else Wilson's interval."""
    value = np.array([r["accuracy"] for r in rows])
    low = np.array([r["accuracy"] - r["sd_seeds"] if r["sd_seeds"] is not None else r["low"] for r in rows])
    high = np.array([r["accuracy"] + r["sd_seeds"] if r["sd_seeds"] is not None else r["high"] for r in rows])
    errors = np.clip(np.stack([value - low, high - value]), 0, None)
    axis.errorbar([r["rows"] for r in rows], value, errors, color=colour, ls=style, marker=marker, capsize=3,
                  ms=11 if marker == "*" else 6.5, elinewidth=1.2, label=label)  # fmt: skip


def robustness_scatter(
    panels: list[RobustnessPanel], main_test: str, theme: Theme, scale: robustness.Axes = "probit"
) -> Figure:
    """Accuracy on every shifted set against the main one, on the axes of the baselines' line (figure 6)."""
    figure, axes = grid(len(panels), columns=2 if len(panels) in (2, 4) else 3, height=3.9)
    arms = names_in_order([p for panel in panels for p in panel.points if not p["supervised"]], "arm")
    many = len(arms) > len(MARKERS)  # a legend of thirty names explains nothing: the table lists them
    marker = dict.fromkeys(arms, "o") if many else dict(zip(arms, MARKERS, strict=False))
    for axis, panel in zip(axes, panels, strict=True):
        _robustness_panel(axis, panel, marker, many, theme, scale)
        count = {side: max((p.get(f"n_{side}") or 0 for p in panel.points), default=0) for side in "xy"}
        known = f", n = {count['x']:,}" if count["x"] else ""
        axis.set_xlabel(f"{main_test} accuracy ({scale} scale{known})")
        axis.set_ylabel(f"{panel.test} accuracy ({scale} scale)")
        about = [f"n = {count['y']:,}"] * bool(count["y"]) + ["no line"] * (panel.line is None)
        axis.set_title(panel.test + (f"  ({', '.join(about)})" if about else ""))
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    legend_above(figure, fullest, columns=5)
    return figure


def _robustness_panel(
    axis: Axes, panel: RobustnessPanel, marker: dict[str, str], many: bool, theme: Theme, scale: robustness.Axes
) -> None:
    place = partial(_place, scale=scale)
    values = np.array([[p["x"], p["y"]] for p in panel.points])
    bounds = _padded(values, scale)
    diagonal = np.linspace(*bounds, 2)
    axis.plot(place(diagonal), place(diagonal), color=theme.faint, ls=(0, (2, 3)), lw=1.2, label="y = x")
    if panel.line is not None:
        _baseline(axis, panel.line, bounds, theme, scale)
        for number, other in enumerate(panel.lines):
            x = np.linspace(*bounds, 80)
            axis.plot(place(x), place(other.predict(x)), color=ORANGE, lw=0.8, alpha=0.6,
                      label=None if number else "without one baseline")  # fmt: skip
    names = set()
    for point in panel.points:
        arm = "baseline" if point["supervised"] else "model" if many else point["arm"]
        colour = ORANGE if point["supervised"] else theme.kind(point["kind"])
        errors = _place_errors(point, scale)
        axis.errorbar(
            place(point["x"]), place(point["y"]), yerr=errors[1], xerr=errors[0], elinewidth=0.7, ls="",
            ecolor=(colour, 0.45), markeredgewidth=1.6,
            marker="o" if point["supervised"] else marker[point["arm"]], ms=7.5, color=colour,
            markerfacecolor=theme.page if point["extrapolates"] else colour, label=None if arm in names else arm,
        )  # fmt: skip
        names.add(arm)
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(FixedLocator(round_ticks(float(place(bounds[0])), float(place(bounds[1])), scale)))
        which.set_minor_locator(NullLocator())
        which.set_major_formatter(FuncFormatter(lambda z, _: f"{100 * robustness.from_axis(z, scale):.3g} %"))
    ends = (float(place(bounds[0])), float(place(bounds[1])))
    axis.set_xlim(ends)
    axis.set_ylim(ends)


def round_ticks(low: float, high: float, scale: robustness.Axes = "probit") -> list[float]:
    """Return the places of round percentages between two ends of an axis, more of them on a short axis.

    None is so close to the one before that their words would touch.
    """
    for percents in (TICKS_PERCENT, MORE_TICKS_PERCENT):
        places = [place for percent in percents if low <= (place := float(_place(percent / 100, scale))) <= high]
        if len(places) >= 4:
            break
    kept = places[:1]
    for place in places[1:]:
        if place - kept[-1] >= WORD * (high - low):
            kept.append(place)
    return kept


def _baseline(
    axis: Axes, line: robustness.Line, bounds: tuple[float, float], theme: Theme, scale: robustness.Axes
) -> None:
    """The line over the whole panel, solid where baselines support it, with its 95 % band."""
    place = partial(_place, scale=scale)
    x = np.linspace(*bounds, 80)
    inside = ~line.extrapolates(x)
    axis.plot(place(x), place(line.predict(x)), color=ORANGE, lw=1.2, ls="--", label="baselines' line, extrapolated")
    axis.plot(place(x[inside]), place(line.predict(x[inside])), color=ORANGE, lw=2.4, label="baselines' line")
    band = line.band(x)
    if band is not None:
        low, high = (np.clip(side, 1e-4, 1 - 1e-4) for side in band)
        axis.fill_between(place(x), place(low), place(high), color=ORANGE, alpha=0.15, lw=0)


def _place(values: np.ndarray | float, scale: robustness.Axes) -> np.ndarray:
    inside = np.asarray(values, np.float64) if scale == "linear" else np.clip(values, 1e-4, 1 - 1e-4)
    return robustness.to_axis(inside, scale)


def _place_errors(point: Record, scale: robustness.Axes) -> list[np.ndarray]:
    """Wilson's intervals as distances on the axes, for x and y."""
    ends = []
    for name in ("x", "y"):
        centre = _place(point[name], scale)
        reach = [centre - _place(point[f"{name}_low"], scale), _place(point[f"{name}_high"], scale) - centre]
        ends.append(np.clip(np.array(reach).reshape(2, 1), 0, None))
    return ends


def _padded(values: np.ndarray, scale: robustness.Axes) -> tuple[float, float]:
    """Common ends for both axes, a little beyond the points."""
    low, high = _place(values.min(), scale) - PADDING[scale], _place(values.max(), scale) + PADDING[scale]
    return float(robustness.from_axis(low, scale)), float(robustness.from_axis(high, scale))


def group_bars(results: list[Record], theme: Theme) -> Figure:
    """Balanced accuracy of two groups, and the drop with its interval over classes beside it; a row per model and group
    that is compared with the base."""
    figure, (left, right) = grid(2, columns=2, height=1.2 + 0.42 * len(results))
    several = len({r["groups"][1] for r in results}) > 1
    models = len({arm_name(r) for r in results}) > 1
    names = [" · ".join([arm_name(r)] * (models or not several) + [_group_of(r)] * several) for r in results]
    at = np.arange(len(results))[::-1].astype(float)
    for offset, side, colour in ((0.2, 0, theme.pool), (-0.2, 1, ORANGE)):
        group = [r["groups"][side] for r in results]
        value = np.array([r["balanced"][g] for r, g in zip(results, group, strict=True)])
        ends = np.array([r["intervals"]["balanced_images"][g] for r, g in zip(results, group, strict=True)]).T
        errors = np.clip(np.stack([value - ends[0], ends[1] - value]), 0, None)
        counts = _range([r["num_images"][g] for r, g in zip(results, group, strict=True)])
        label = "the group named" if several and side else f"{group[0]} (n = {counts})"
        left.barh(at + offset, value, 0.38, xerr=errors, color=colour, label=label,
                  error_kw={"ecolor": theme.ink, "elinewidth": 1, "capsize": 2})  # fmt: skip
    drop = np.array([r["drop"]["drop_pp"] for r in results])
    for key, width in (("drop_pp_classes", 1.2), ("drop_pp_images", 3.2)):
        low, high = np.array([r["intervals"][key] for r in results]).T
        right.hlines(at, low, high, color=theme.ink, lw=width)
    right.plot(drop, at, "o", color=theme.ink, ms=7)
    right.axvline(0, color=theme.faint, lw=1)
    left.set_yticks(at, names)
    right.set_yticks(at, [])
    for axis in (left, right):
        axis.set_ylim(-0.6, len(results) - 0.4)
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.set_xlabel("balanced accuracy, 95 % over images")
    right.set_xlabel("drop in points; 95 % over images (thick), classes (thin)")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    legend_above(figure, left)
    return figure


def _group_of(result: Record) -> str:
    group = result["groups"][1]
    return f"{group} (n = {result['num_images'][group]:,})"


def class_drop_bars(result: Record, theme: Theme) -> Figure:
    """The drop of every class of one model with its 95 % interval, largest first (paper 2403.11497, figure 4)."""
    rows = sorted((r for r in result["classes"] if r["drop_pp"] is not None), key=lambda r: -r["drop_pp"])
    figure, (axis,) = grid(1, height=3.4)
    figure.set_size_inches(max(7.5, min(11.0, 0.24 * len(rows) + 2)), 4.4)
    at = np.arange(len(rows))
    axis.bar(at, [r["drop_pp"] for r in rows], 0.75, color=theme.pool,
             yerr=[1.96 * (r["drop_se_pp"] or 0) for r in rows],
             error_kw={"ecolor": theme.faint, "elinewidth": 1})  # fmt: skip
    axis.axhline(0, color=theme.ink, lw=1)
    axis.set_xticks(at, [r["class_name"] for r in rows], rotation=60, ha="right", fontsize=8.5)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("drop in points (95 %)")
    photos = ", ".join(f"n = {count:,} {group}" for group, count in result["num_images"].items())
    axis.set_title(f"{len(rows)} classes, {photos} photos", fontsize=11)
    return figure


def arm_name(result: Record) -> str:
    """Return what a bar or row is called: the arm in a report, the model in a command's output."""
    return str(result.get("arm") or result.get("model"))


def _range(counts: list[int]) -> str:
    """Return a count, or the smallest and the largest."""
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts))))
