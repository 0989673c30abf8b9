"""What a cut would keep, before anything is cut: from the stored columns, in seconds.

Sizes are read off float32 scores, so a previewed size may differ from the cut's by the few rows of its rounding band.

Writes (only with --out): preview.csv, preview.png.
"""

from __future__ import annotations

import csv
import io
import logging
from typing import Any

import numpy as np

from clipgap_ray import store
from clipgap_ray.config.split import PreviewSettings
from clipgap_ray.reporting.preview import cut_sizes
from clipgap_ray.reporting.theme import render
from clipgap_ray.stages.split import Table, open_table, read_tau

logger = logging.getLogger("clipgap")

SLACKS = (-0.1, -0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05, 0.1)
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)
THRESHOLD_STEPS = 11


def run(settings: PreviewSettings) -> dict[str, Any]:
    """Tabulate kept uids against slack (gap-match), similarity (threshold) and rank (near, far).

    Returns:
        {pool, tests, rows: [{cut, value, kept, kept_share, rows}]}; `value` is a slack, a similarity, or the similarity
        at the rank where near- and far-pruning of that size cut.
    """
    table = open_table(settings.scores, settings.test)
    m = np.max([table.column(test, "m") for test in settings.test], axis=0)
    rows = _threshold_rows(m) + _rank_rows(m)
    if not any(np.isnan(read_tau(table.scores, test)).any() for test in settings.test):
        margin = np.max([table.column(test, "margin") for test in settings.test], axis=0)
        rows = _slack_rows(margin) + rows
    for row in rows:
        row["kept_share"] = row["kept"] / table.num_uids
    _show(rows, table.num_uids)
    if settings.out:
        _write(settings.out, rows, settings.test, table)
    return {"pool": table.num_uids, "tests": list(settings.test), "rows": rows}


def _slack_rows(margin: np.ndarray) -> list[dict[str, Any]]:
    return [{"cut": "gap-match", "value": slack, "kept": int((margin <= slack).sum())} for slack in SLACKS]


def _threshold_rows(m: np.ndarray) -> list[dict[str, Any]]:
    """Between the bulk and the most similar row: where thresholds are chosen."""
    values = np.linspace(np.floor(20 * np.quantile(m, 0.05)) / 20, np.ceil(20 * m.max()) / 20, THRESHOLD_STEPS)
    return [{"cut": "threshold", "value": round(float(value), 4), "kept": int((m < value).sum())} for value in values]


def _rank_rows(m: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    ordered = np.sort(m)
    for fraction in FRACTIONS:
        keep = round(fraction * len(m))
        for cut, at in (("near", keep - 1), ("far", len(m) - keep)):
            value = float(ordered[at]) if 0 <= at < len(m) else float("nan")
            rows.append({"cut": cut, "value": value, "kept": keep})
    return rows


def _show(rows: list[dict[str, Any]], pool: int) -> None:
    """Show the table on stderr, one block per kind of cut."""
    names = {"gap-match": "slack", "threshold": "max similarity", "near": "keeps m up to", "far": "keeps m from"}
    previous = ""
    for row in sorted(rows, key=lambda row: list(names).index(row["cut"])):
        if row["cut"] != previous:
            previous = row["cut"]
            logger.info("%-12s%16s%14s%9s", previous, names[previous], "kept", "share")
        logger.info("%28.4f%14s%9s", row["value"], f"{row['kept']:,}", f"{row['kept'] / pool:.1%}")


def _write(out: str, rows: list[dict[str, Any]], tests: tuple[str, ...], table: Table) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["cut", "value", "kept", "kept_share"])
    writer.writeheader()
    writer.writerows(rows)
    store.write_bytes(store.join(out, "preview.csv"), text.getvalue().encode())
    figures = render(lambda theme: cut_sizes(rows, f"{', '.join(tests)}: {table.num_uids:,} uids", theme))
    store.write_bytes(store.join(out, "preview.png"), figures["light.png"])
