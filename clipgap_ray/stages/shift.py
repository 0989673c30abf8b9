"""Group shift of one or several models, from per-sample predictions or from a printed table.

Reads: schema.PREDICTIONS, or a CSV with a row per class. Writes: OUT/shift.json, OUT/per_class.csv, OUT/shift.svg and
.png, OUT/summary.json. With one model its numbers stand at the top level of shift.json; `models` holds all of them.
"""

from __future__ import annotations

import csv
import io
import time
from functools import partial
from typing import Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import robustness, shift
from clipgap_ray.reporting import figures_models
from clipgap_ray.reporting.theme import render

SUFFIXES = ("_c", "_k")


def run(settings: ShiftSettings) -> rundir.Summary:
    """Write shift.json.

    Raises:
        DataError: If a file lacks columns, or a group has no photos.
    """
    started = time.monotonic()
    counted, warnings = _from_table(settings) if settings.table else (_from_predictions(settings), [])
    models: dict[str, Any] = {}
    for name, counts in counted.items():
        try:
            rng = np.random.default_rng(settings.seed)
            models[name] = {"model": name, **shift.summarise(counts, rng, settings.groups, settings.draws)}
        except ValueError as error:
            raise DataError(f"{name}: {error}", hint="name the groups with --groups FIRST SECOND") from None
    result: dict[str, Any] = {"models": models, "warnings": warnings, "settings": settings.fingerprint()}
    if len(models) == 1:
        result = {**next(iter(models.values())), **result}
    store.write_json(store.join(settings.out, "shift.json"), result)
    _write_csv(settings.out, models)
    draw = partial(figures_models.group_bars, list(models.values()), settings.groups)
    for suffix, kind in (("svg", "light.svg"), ("png", "light.png")):
        store.write_bytes(store.join(settings.out, f"shift.{suffix}"), render(draw)[kind])
    images = int(sum(counts.totals.sum() for counts in counted.values()))
    summary = rundir.Summary("shift", read=images, kept=images, seconds=time.monotonic() - started)
    summary.extra.update(models={name: m["drop"] for name, m in models.items()}, warnings=warnings)
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


def _from_predictions(settings: ShiftSettings) -> dict[str, shift.GroupCounts]:
    counted = {}
    for word in settings.predictions:
        name, separator, path = word.partition("=")
        if not separator:
            name, path = word.rsplit("/", 1)[-1].removesuffix(".parquet"), word
        table = store.read_table(path)
        missing = [column for column in ("class_name", "group", "correct") if column not in table.column_names]
        if missing:
            raise DataError(
                f"{path} lacks the columns {missing}", hint=f"expected {', '.join(schema.PREDICTIONS.names)}"
            )
        correct = table.column("correct").to_numpy(zero_copy_only=False).astype(bool)
        groups = [group or "" for group in table.column("group").to_pylist()]
        counted[name] = shift.count(table.column("class_name").to_pylist(), groups, correct)
    return counted


def _from_table(settings: ShiftSettings) -> tuple[dict[str, shift.GroupCounts], list[str]]:
    """Read `<MODEL>_c` and `<MODEL>_k` columns; cells that no count explains are misprints and become warnings."""
    rows = list(csv.DictReader(io.StringIO(store.read_bytes(settings.table).decode())))
    columns = list(rows[0]) if rows else []
    numbers = [f"n_{group}" for group in settings.groups]
    models = [c[:-2] for c in columns if c.endswith(SUFFIXES[0]) and c[:-2] + SUFFIXES[1] in columns]
    missing = [c for c in ("label", *numbers) if c not in columns] or ([] if models else ["<MODEL>_c, <MODEL>_k"])
    if missing:
        raise DataError(f"{settings.table} lacks the columns {missing}; it has {columns}")
    try:
        totals = np.array([[int(row[name]) for name in numbers] for row in rows])
        values = {m: np.array([[float(row[m + s]) for s in SUFFIXES] for row in rows]) for m in models}
        _, unit = robustness.as_fractions(np.concatenate(list(values.values())))
    except ValueError as error:
        raise DataError(f"{settings.table}: {error}") from None
    labels = [row["label"] for row in rows]
    scale = 100.0 if unit == "percent" else 1.0
    counted = {m: shift.from_accuracies(v / scale, totals, labels, settings.groups) for m, v in values.items()}
    warnings = [
        f"{model}: {name} / {group} is no whole number of photos: misprint or wrong n"
        for model, counts in counted.items()
        for name, group in shift.impossible(counts)
    ]
    return counted, [f"values read as {unit}", *warnings]


def _write_csv(out: str, models: dict[str, Any]) -> None:
    buffer = io.StringIO()
    records = [{"model": name, **row} for name, model in models.items() for row in model["classes"]]
    writer = csv.DictWriter(buffer, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    store.write_bytes(store.join(out, "per_class.csv"), buffer.getvalue().encode())
