"""Group shift of one or several models, from per-sample predictions or from a printed table.

Reads: schema.PREDICTIONS, or a CSV with a row per class. Writes: OUT/shift.json, OUT/models.csv (a row per model and
group that is compared with the base), OUT/per_class.csv, OUT/shift.svg and .png, OUT/summary.json; with variants (the
same photos asked otherwise) OUT/variants.csv, OUT/variants.svg and .png. With one model its numbers stand at the top
level of shift.json; `models` holds all of them: the first pair of groups, and under `further` the others.
"""

from __future__ import annotations

import csv
import io
import time
from functools import partial
from typing import Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.predictions import prediction_files, variant_files
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import robustness, shift
from clipgap_ray.reporting import figures_groups, figures_models, groups, variants
from clipgap_ray.reporting.page import csv_bytes
from clipgap_ray.reporting.study import Predictions, predictions_of
from clipgap_ray.reporting.tables_groups import flat_group
from clipgap_ray.reporting.theme import Draw, render

SUFFIXES = ("_c", "_k")


def run(settings: ShiftSettings) -> rundir.Summary:
    """Write shift.json.

    Raises:
        DataError: If a file lacks columns, or a group has no photos.
    """
    started = time.monotonic()
    read = {name: _predictions(path) for name, path in prediction_files(settings.predictions).items()}
    counted, warnings = _from_table(settings) if settings.table else ({n: _count(p) for n, p in read.items()}, [])
    order = _order(settings, read)
    models = {name: _summarise(settings, name, counts, order) for name, counts in counted.items()}
    for name, model in models.items():
        warnings += [f"{name}: no class has photos of both {order[0]} and {g}" for g in model.pop("apart")]
    ways = _variants(settings, read, models)
    for name, rows in ways.items():
        models[name]["variants"] = rows
    result: dict[str, Any] = {"models": models, "warnings": warnings, "inputs": _inputs(settings),
                              "settings": settings.fingerprint()}  # fmt: skip
    if len(models) == 1:
        result = {**next(iter(models.values())), **result}
    store.write_json(store.join(settings.out, "shift.json"), result)
    _write_csv(settings.out, models)
    shown = [line for model in models.values() for line in _lines(model)]
    _write_figure(settings.out, "shift", partial(figures_models.group_bars, shown))
    if ways:
        lines = [{"model": name, **row} for name, rows in ways.items() for row in rows]
        store.write_bytes(store.join(settings.out, "variants.csv"), csv_bytes(lines))
        _write_figure(settings.out, "variants", partial(figures_groups.variants, ways))
    images = int(sum(counts.totals.sum() for counts in counted.values()))
    summary = rundir.Summary("shift", read=images, kept=images, seconds=time.monotonic() - started)
    summary.extra.update(models={name: m["drop"] for name, m in models.items()}, warnings=warnings)
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


def _order(settings: ShiftSettings, read: dict[str, Predictions]) -> tuple[str, ...]:
    """The base and the groups that are compared with it, of a table or by the first model's predictions."""
    if settings.groups or settings.table:
        return settings.groups or shift.PAIR
    name, first = next(iter(read.items()))
    order = groups.ordered(first.groups)
    if not order:
        found = ", ".join(sorted(set(filter(None, first.groups)))) or "(none)"
        raise DataError(f"{name}: photos of two groups are needed; groups are {found}")
    return order


def _summarise(settings: ShiftSettings, name: str, counts: shift.GroupCounts, order: tuple[str, ...]) -> dict[str, Any]:
    """One model's drops from the base. Groups that nobody named may share no class with it: they are `apart`."""
    base, *others = order
    pairs = [(base, g) for g in others if settings.groups or groups.comparable(counts, (base, g))]
    try:
        found = [
            {"model": name, **shift.summarise(counts, np.random.default_rng(settings.seed), pair, settings.draws)}
            for pair in pairs or [(base, others[0])]
        ]
    except ValueError as error:
        raise DataError(f"{name}: {error}", hint="name the groups with --groups BASE OTHER ...") from None
    apart = [g for g in others if (base, g) not in pairs]
    return {**found[0], **({"further": found[1:]} if found[1:] else {}), "apart": apart}


def _lines(model: dict[str, Any]) -> list[dict[str, Any]]:
    """A model's results, one per group that is compared with the base."""
    return [model, *model.get("further", [])]


def _predictions(path: str) -> Predictions:
    table = store.read_table(path)
    missing = [column for column in ("class_name", "group", "correct") if column not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}", hint=f"expected {', '.join(schema.PREDICTIONS.names)}")
    return predictions_of(table)


def _count(found: Predictions) -> shift.GroupCounts:
    return shift.count(found.classes, found.groups, found.correct)


def _variants(
    settings: ShiftSettings, read: dict[str, Predictions], models: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Every model's ways of being asked, its --predictions first, for the two groups of its own first comparison."""
    files = prediction_files(settings.predictions)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, others in variant_files(settings.variants, list(files)).items():
        paths = {variants.FIRST: files[name], **others}
        ways = {way: read[name] if way == variants.FIRST else _predictions(path) for way, path in paths.items()}
        unnamed = [paths[way] for way, own in ways.items() if not own.uids]
        if unnamed:
            raise DataError(f"{unnamed[0]} has no column uid: its photos cannot be paired with another way's")
        first, *rest = [(way, own, own.correct.astype(np.float64)) for way, own in ways.items()]
        facts = {way: variants.beside(path) for way, path in paths.items()}
        base, other = models[name]["groups"]
        try:
            found[name] = variants.compare(first, rest, facts, (base, other), settings.draws, settings.seed)
        except ValueError as error:
            raise DataError(f"--variants of {name}: {error}") from None
    return found


def _from_table(settings: ShiftSettings) -> tuple[dict[str, shift.GroupCounts], list[str]]:
    """Read `<MODEL>_c` and `<MODEL>_k` columns; cells that no count explains are misprints and become warnings."""
    rows = list(csv.DictReader(io.StringIO(store.read_bytes(settings.table).decode())))
    columns = list(rows[0]) if rows else []
    pair = settings.groups or shift.PAIR
    numbers = [f"n_{group}" for group in pair]
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
    counted = {m: shift.from_accuracies(v / scale, totals, labels, pair) for m, v in values.items()}
    warnings = [
        f"{model}: {name} / {group} is no whole number of photos: misprint or wrong n"
        for model, counts in counted.items()
        for name, group in shift.impossible(counts)
    ]
    return counted, [f"values read as {unit}", *warnings]


def _inputs(settings: ShiftSettings) -> dict[str, str]:
    """Name every file that was read by its sha256."""
    files = prediction_files(settings.predictions)
    asked = variant_files(settings.variants, list(files)).values()
    paths = [*files.values(), *(path for own in asked for path in own.values()), *filter(None, [settings.table])]
    return {path: store.sha256(store.read_bytes(path)) for path in paths}


def _write_csv(out: str, models: dict[str, Any]) -> None:
    lines = [line for model in models.values() for line in _lines(model)]
    store.write_bytes(store.join(out, "models.csv"), csv_bytes([flat_group(line) for line in lines]))
    records = [
        {"model": line["model"], "first": line["groups"][0], "second": line["groups"][1], **row}
        for line in lines for row in line["classes"]
    ]  # fmt: skip
    store.write_bytes(store.join(out, "per_class.csv"), csv_bytes(records))


def _write_figure(out: str, name: str, draw: Draw) -> None:
    files = render(draw)
    for suffix in ("svg", "png"):
        store.write_bytes(store.join(out, f"{name}.{suffix}"), files[f"light.{suffix}"])
