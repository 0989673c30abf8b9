"""Figures about closeness: records in, a matplotlib figure out. Every axis has its unit, every panel its n."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from clipgap_ray.reporting.tables import Record, short
from clipgap_ray.reporting.theme import ORANGE, Theme, grid, legend_above

MAX_BARS = 24
NAMED_RUNS = 12  # lines that a legend can name


def names_in_order(records: list[Record], key: str = "test") -> list[str]:
    """Return the distinct values of a key in order of first appearance."""
    return list(dict.fromkeys(record[key] for record in records))


def similarity_histograms(bins: list[Record], closeness: list[Record], theme: Theme) -> Figure:
    """Histograms of nearest-neighbour similarity, pool against reference, one panel per test set (figure 3a)."""
    tests = names_in_order(bins)
    figure, axes = grid(len(tests), sharex=True)
    for axis, test in zip(axes, tests, strict=True):
        rows = [row for row in bins if row["test"] == test]
        edges = np.array([row["low"] for row in rows] + [rows[-1]["high"]])
        count = sum(row["pool"] for row in rows)
        for name, colour, label in (
            ("reference", ORANGE, "to the reference"),
            ("pool", theme.pool, "to the pool"),
        ):
            if not any(row[name] for row in bins):
                continue  # an audit without reference
            share = np.array([row[name] for row in rows]) / max(count, 1)
            axis.stairs(share, edges, fill=True, alpha=0.32, color=colour, linewidth=0)
            axis.stairs(share, edges, color=colour, linewidth=1.8, label=label)
        facts = next((row for row in closeness if row["test"] == test), None)
        axis.set_title(f"{test}  (n = {count:,})")
        if facts is not None and facts["share_closer_to_pool"] is not None:
            text = f"{facts['share_closer_to_pool']:.0%} closer\nto the pool"
            axis.annotate(text, (0.03, 0.95), xycoords="axes fraction", va="top", fontsize=10)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.margins(x=0)
    _label_outer(axes, "similarity to the nearest image", "share of test images")
    legend_above(figure, axes[0])
    return figure


def pool_histograms(records: list[Record], theme: Theme) -> Figure:
    """Pool rows by similarity to the nearest test image, counts on a log scale: cuts are about the right tail."""
    tests = names_in_order(records)
    figure, axes = grid(len(tests), sharex=True, sharey=True)
    for axis, test in zip(axes, tests, strict=True):
        rows = [row for row in records if row["test"] == test]
        width = rows[0]["high"] - rows[0]["low"]
        axis.bar([row["low"] for row in rows], [row["num_rows"] for row in rows], width, align="edge",
                 color=theme.pool, alpha=0.75)  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(f"{test}  (n = {sum(row['num_rows'] for row in rows):,})")
        axis.margins(x=0)
    _label_outer(axes, "similarity to the nearest test image", "pool images")
    return figure


def accuracy_curves(bins: list[Record], theme: Theme) -> Figure:
    """Accuracy against similarity to the uncut pool with Wilson intervals, counts as bars below (figure 3b)."""
    tests = names_in_order(bins)
    figure, axes = grid(len(tests), height=3.1, sharex=True, sharey=True)
    for axis, test in zip(axes, tests, strict=True):
        for model, colour, marker in (("full", theme.ink, "o"), ("gap-match", theme.pool, "s")):
            rows = [row for row in bins if row["test"] == test and row["model"] == model]
            if not rows:
                continue
            centre = np.array([(row["low_similarity"] + row["high_similarity"]) / 2 for row in rows])
            width = rows[0]["high_similarity"] - rows[0]["low_similarity"]
            if model == "full":
                _count_bars(axis, rows, centre, width, theme)
            shift = 0.0 if model == "full" else 0.14 * width  # so that two intervals do not cover each other
            errors = _errors(rows)
            label = "full pool" if model == "full" else "pool cut to the reference's gap"
            axis.errorbar(
                centre + shift, [r["accuracy"] for r in rows], errors, marker=marker, ms=5, color=colour,
                elinewidth=1.2, capsize=2, label=label,
            )  # fmt: skip
        axis.set_title(f"{test}  (n = {sum(r['num_images'] for r in bins if _is_full(r, test)):,})")
        axis.set_ylim(-0.02, 1.04)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    _label_outer(axes, "similarity to the nearest pool image", "accuracy (top 1)")
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    legend_above(figure, fullest)
    return figure


def _is_full(row: Record, test: str) -> bool:
    return bool(row["test"] == test and row["model"] == "full")


def _errors(rows: list[Record]) -> np.ndarray:
    """(2, n) distances from the accuracies to the ends of their intervals."""
    value = np.array([row["accuracy"] for row in rows])
    low, high = (np.array([row[name] for row in rows]) for name in ("low", "high"))
    return np.clip(np.stack([value - low, high - value]), 0, None)


def _count_bars(axis: Axes, rows: list[Record], centre: np.ndarray, width: float, theme: Theme) -> None:
    """Counts in the lowest fifth of the panel: the reader sees which points carry weight."""
    counts = np.array([row["num_images"] for row in rows])
    axis.bar(centre, 0.2 * counts / counts.max(), 0.9 * width, color=theme.grid, label="test images per bin")
    for x, count in zip(centre, counts, strict=True):
        axis.annotate(f"{count:,}", (x, 0.0), ha="center", va="bottom", fontsize=7.5, color=theme.faint)


def removed_rows(per_class: list[Record], theme: Theme) -> Figure:
    """Removed pool images per test image of every class, one panel per test set."""
    tests = [t for t in names_in_order(per_class) if any(r["num_removed"] for r in per_class if r["test"] == t)]
    longest = max(min(sum(r["test"] == t for r in per_class), MAX_BARS) for t in tests)
    figure, axes = grid(len(tests), height=0.6 + 0.19 * longest)
    for axis, test in zip(axes, tests, strict=True):
        rows = sorted((r for r in per_class if r["test"] == test), key=lambda r: -r["num_removed"] / r["num_images"])
        shown = rows[:MAX_BARS][::-1]
        axis.barh([r["class_name"] for r in shown], [r["num_removed"] / r["num_images"] for r in shown], 0.72,
                  color=theme.pool)  # fmt: skip
        total, images = sum(r["num_removed"] for r in rows), sum(r["num_images"] for r in rows)
        more = f", {MAX_BARS} of {len(rows)} classes" if len(rows) > MAX_BARS else ""
        axis.set_title(f"{test}\n{total:,} rows, {images:,} images{more}", fontsize=11)
        axis.tick_params(axis="y", labelsize=9, length=0)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("pool images removed per test image")
    return figure


def removed_per_image(per_image: list[Record], per_class: list[Record], theme: Theme) -> Figure:
    """Share of test images that cost the pool at least so many images, one panel per test set (log scale)."""
    tests = names_in_order(per_image)
    figure, axes = grid(len(tests), height=2.6, sharey=True)
    for number, (axis, test) in enumerate(zip(axes, tests, strict=True)):
        counts = np.sort([r["num_removed"] for r in per_image if r["test"] == test])[::-1]
        images = sum(r["num_images"] for r in per_class if r["test"] == test)
        axis.step(counts, np.arange(1, len(counts) + 1) / images, where="pre", color=theme.pool)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if counts[0] < 1000 else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_title(f"{test}  (n = {images:,})")
        axis.annotate(f"{len(counts) / images:.0%} cost any\nmost: {counts[0]:,}", (0.97, 0.95), ha="right", va="top",
                      xycoords="axes fraction", fontsize=10)  # fmt: skip
        axis.set_xlabel("pool images removed, at least")
        if number % 3 == 0:
            axis.set_ylabel("share of test images")
    return figure


def training_curves(curves: list[Record], theme: Theme) -> Figure:
    """Training loss against samples seen, contrastive and supervised runs apart: their losses do not compare.

    Where there are more runs than a legend can name, a line is the mean over the seeds of one model.
    """
    families = [(False, "CLIP (contrastive loss)"), (True, "supervised (cross-entropy)")]
    shown = [(flag, title) for flag, title in families if any(c["supervised"] == flag for c in curves)]
    figure, axes = grid(len(shown), columns=2, height=3.4)
    for axis, (supervised, title) in zip(axes, shown, strict=True):
        own = [c for c in curves if c["supervised"] == supervised]
        runs = names_in_order(own, "run")
        many = len(runs) > NAMED_RUNS
        lines: dict[str, dict[int, list[float]]] = {}
        for c in own:
            name = c["run"].removesuffix(f"-s{c['seed']}") if many else c["run"]
            lines.setdefault(name, {}).setdefault(c["samples"], []).append(c["loss"])
        for (name, points), (colour, dashes) in zip(lines.items(), _line_styles(len(lines), theme), strict=True):
            seen = sorted(points)
            losses = [np.mean(points[samples]) for samples in seen]
            axis.plot(seen, losses, color=colour, ls=dashes, lw=1.5, label=name)
        means = ", mean over seeds" if many else ""
        axis.set_title(f"{title}, {len(runs)} run{'s' if len(runs) != 1 else ''}{means}")
        axis.set_xlabel("samples seen")
        axis.set_ylabel("training loss (nats)")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        if len(lines) <= NAMED_RUNS:
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.05 * len(lines) * (high - low) / 2)  # room above the curves for the names
            axis.legend(fontsize=8, ncols=2, loc="upper right")
    return figure


def _line_styles(count: int, theme: Theme) -> list[tuple[str, str]]:
    colours = [theme.ink, theme.pool, ORANGE, "#009E73", "#D55E00", "#CC79A7"]
    return [(colours[i % 6], ("-", "--", ":", "-.")[i // 6 % 4]) for i in range(count)]


def _label_outer(axes: list[Axes], x: str, y: str) -> None:
    """Label the lowest panel of every column and the first of every row: shared axes need no repetition."""
    columns = min(len(axes), 3)
    for i, axis in enumerate(axes):
        if i + columns >= len(axes):
            axis.set_xlabel(x)
            axis.tick_params(labelbottom=True)
        if i % columns == 0:
            axis.set_ylabel(y)
