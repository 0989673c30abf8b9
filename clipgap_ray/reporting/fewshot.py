"""Few-shot and linear-probe curves, pruned against full: accuracy over labelled images per class.

Reads probes/<run>/<test>.fewshot.parquet with the columns `k` (images per class; 0 = all of the reference), `seed` (of
the draw of shots), `acc1` (fraction) and `num_samples` (test images), and the same from linear/<run>, where `evaluate
--task linear-probe` without --shots leaves the probe on all of the reference. Nothing is shown where no run has one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from clipgap_ray import store
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import intervals
from clipgap_ray.reporting import tables
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import GREEN, ORANGE, PURPLE, VERMILLION, Theme, grid, legend_above

FOLDERS = ("probes", "linear")
COLUMNS = ("k", "seed", "acc1", "num_samples")


def curves(study: Study) -> list[Record]:
    """Return accuracy per arm, test set and number of shots: mean over draws and training seeds, with their spread.

    Returns:
        Records `test, arm, split, train_on, supervised, k, accuracy, sd, low, high, num_draws, num_images`; `sd` is
        None for one draw, and then `low` and `high` are Wilson's interval over test images; else mean -+ sd.

    Raises:
        DataError: If a file lacks a column or holds accuracies outside [0, 1].
    """
    records = []
    for test in study.tests:
        for arm in tables.arms(study):
            paths = [study.path(folder, run.name, f"{test}.fewshot.parquet") for run in arm.runs for folder in FOLDERS]
            rows = [row for path in paths for row in _rows(path)]
            for k in sorted({row["k"] for row in rows}, key=lambda k: (k == 0, k)):
                own = [row for row in rows if row["k"] == k]
                spread = intervals.over_seeds(np.array([row["acc1"] for row in own]))
                count = int(own[0]["num_samples"])
                sd = spread.sd if spread.num_seeds > 1 else None
                low, high = intervals.wilson(np.array(spread.mean * count), np.array(count))
                records.append(
                    {
                        "test": test,
                        "arm": arm.label,
                        "split": arm.split,
                        "train_on": arm.train_on,
                        "kind": study.recipes().get(arm.split, {}).get("kind", ""),
                        "supervised": arm.supervised,
                        "k": int(k),
                        "accuracy": spread.mean,
                        "sd": sd,
                        "low": float(low) if sd is None else spread.mean - sd,
                        "high": float(high) if sd is None else spread.mean + sd,
                        "num_draws": spread.num_seeds,
                        "num_images": count,
                    }
                )
    return records


def _rows(path: str) -> list[Record]:
    if not store.exists(path):
        return []
    table = store.read_table(path)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {table.column_names}")
    rows: list[Record] = table.select(list(COLUMNS)).to_pylist()
    wrong = [row["acc1"] for row in rows if not 0 <= row["acc1"] <= 1]
    if wrong:
        raise DataError(f"{path}: acc1 {wrong[0]:g} is no fraction", hint="fractions, not percent")
    return rows


def sentence(records: list[Record], main_test: str, base_split: str) -> str:
    """Compare the full pool with the cut that loses most at the most shots on the main test set."""
    own = [r for r in records if r["test"] == main_test] or records
    most = max(own, key=lambda r: (r["k"] == 0, r["k"]))["k"]
    last = {r["arm"]: r for r in own if r["k"] == most and not r["supervised"]}
    cuts = [r for r in last.values() if r["split"] != base_split and r.get("train_on") != "reference"]
    full = _full_pool(list(last.values()), cuts[0].get("train_on"), base_split) if cuts else None
    if full is not None:  # cuts are compared with what was trained as they were
        cuts = [r for r in cuts if r.get("train_on") == full.get("train_on")] or cuts
    where = f"With {shots(most)} on {own[0]['test']}"
    if full is None or not cuts:
        return f"{where}: " + ", ".join(f"{r['arm']} {100 * r['accuracy']:.1f} %" for r in last.values()) + "."
    worst = min(cuts, key=lambda r: r["accuracy"])
    change = f"{100 * (worst['accuracy'] - full['accuracy']):+.1f}".replace("-", "−")
    draws = f"{worst['num_draws']} draw" + ("s" if worst["num_draws"] != 1 else "")
    return (
        f"{where} the full pool's features reach {100 * full['accuracy']:.1f} %, those of {worst['arm']} "
        f"{100 * worst['accuracy']:.1f} % ({change} points, {draws})."
    )


def table(records: list[Record], accuracy: list[Record], base_split: str) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows: zero-shot, few shots and the linear probe of every arm, with the change against the full
    pool's features below each.

    Args:
        records: Of `curves`.
        accuracy: Of `tables.accuracy`, for zero-shot.
        base_split: The uncut pool's.
    """
    ks = sorted({r["k"] for r in records}, key=lambda k: (k == 0, k))
    rows: list[list[Any]] = []
    for test, arm in dict.fromkeys((r["test"], r["arm"]) for r in records):
        own = {r["k"]: r for r in records if (r["test"], r["arm"]) == (test, arm)}
        some = next(iter(own.values()))
        clips = [r for r in records if r["test"] == test and not r["supervised"]]
        full = {k: _full_pool([r for r in clips if r["k"] == k], some.get("train_on"), base_split) for k in ks}
        zero = tables.lookup(accuracy, test=test, arm=arm)
        row: list[Any] = [test, ("◆ " if some["supervised"] else "") + arm, f"{some['num_images']:,}",
                          "–" if zero is None else f"{100 * zero['accuracy']:.1f}"]  # fmt: skip
        row += ["–" if k not in own else _cell(own[k], full.get(k)) for k in ks]
        rows.append(row)
    names = ["linear probe (all)" if k == 0 else f"{k} per class" for k in ks]
    return ["test set", "model", "n", "zero-shot", *names], rows


def _full_pool(records: list[Record], train_on: str | None, base_split: str) -> Record | None:
    """The full pool's record among CLIPs: of the one trained as another model was, with the reference or without."""
    whole = [r for r in records if r["split"] == base_split and r.get("train_on") != "reference"]
    return next((r for r in whole if r.get("train_on") == train_on), whole[0] if whole else None)


def _cell(record: Record, full: Record | None) -> Any:
    text = f"{100 * record['accuracy']:.1f}" + ("" if record["sd"] is None else f" ± {100 * record['sd']:.1f}")
    if full is None or full is record:
        return (text, "", False)
    return (text, f"Δ {100 * (record['accuracy'] - full['accuracy']):+.1f}".replace("-", "−"), False)


def shots(k: int) -> str:
    """1 -> one image per class; 0 -> all labelled images."""
    return "all labelled images" if k == 0 else f"{k} image{'s' if k != 1 else ''} per class"


def draw(records: list[Record], theme: Theme) -> Figure:
    """One panel per test set: accuracy over images per class, a line per arm; "all" stands at the right end."""
    tests = list(dict.fromkeys(r["test"] for r in records))
    arms = list(dict.fromkeys(r["arm"] for r in records))
    ks = sorted({r["k"] for r in records}, key=lambda k: (k == 0, k))
    place = {k: i for i, k in enumerate(ks)}
    palette = (theme.ink, theme.pool, ORANGE, GREEN, VERMILLION, PURPLE)
    figure, axes = grid(len(tests), height=3.1, sharex=True)
    for axis, test in zip(axes, tests, strict=True):
        for number, arm in enumerate(arms):
            rows = [r for r in records if r["test"] == test and r["arm"] == arm]
            if not rows:
                continue
            value = np.array([r["accuracy"] for r in rows])
            errors = np.clip([value - [r["low"] for r in rows], [r["high"] for r in rows] - value], 0, None)
            axis.errorbar(
                [place[r["k"]] for r in rows], value, errors, marker="os^Dv"[number % 5], ms=5, capsize=2,
                elinewidth=1.2, color=palette[number % 6], ls=("-", "--", ":")[number // 6 % 3], label=arm,
            )  # fmt: skip
        axis.set_title(f"{test}  (n = {next(r['num_images'] for r in records if r['test'] == test):,})")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.xaxis.set_major_locator(FixedLocator(list(range(len(ks)))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda at, _: "all" if ks[int(at)] == 0 else str(ks[int(at)])))
        axis.set_xlabel("labelled images per class")
        axis.tick_params(labelbottom=True)
    axes[0].set_ylabel("accuracy (top 1)")
    legend_above(figure, axes[0], columns=4)
    return figure
