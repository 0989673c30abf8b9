"""Which backgrounds is a model good and bad at, class by class, and how much of that drop is only selection?

CounterAnimal chooses groups and reports their drop with the same model on the same photos; without any effect that
alone makes 10 points (counteranimal.md 2 and 7.3, item 8). Here one half chooses and the other is evaluated, every
model chooses for every model, and a class counts only when dealing its photos out at random rarely differs as much.

Writes: OUT/discover.json, OUT/groups.csv (every class), OUT/matrix.csv (who chose, who is evaluated), OUT/figures/,
OUT/photos.parquet and OUT/predictions/<model>.parquet (the photos of the classes kept with their new groups common and
counter: input of `clipgap shift` and `clipgap join`). Needs no Ray; memory is the test set times the models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.groups import DiscoverSettings
from clipgap_ray.config.predictions import prediction_files
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import intervals, selection
from clipgap_ray.reporting import figures_groups
from clipgap_ray.reporting.page import csv_bytes
from clipgap_ray.reporting.study import positions
from clipgap_ray.reporting.theme import render
from clipgap_ray.stages.attributes import read_labels

CLASS_DRAWS = 2000


@dataclass(frozen=True)
class Photos:
    """The n photos that every model predicted and that have an attribute.

    Attributes:
        tables: Predictions of every model, row i = photo i.
        uids: n strings.
        cell: (n,) int64 class * B + attribute.
        classes: C names.
        names: B attributes.
        correct: (M, n) bool.
        read: Photos of the first model, before any was left out.
        dropped: What was left out, by reason.
        inputs: sha256 of the files read.
    """

    tables: dict[str, pa.Table]
    uids: list[str]
    cell: np.ndarray
    classes: list[str]
    names: list[str]
    correct: np.ndarray
    read: int
    dropped: dict[str, int]
    inputs: dict[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        """(C, B)."""
        return len(self.classes), len(self.names)


def run(settings: DiscoverSettings) -> rundir.Summary:
    """Discover groups and measure the inflation.

    Raises:
        ConfigError: If --by names no model, or two models have one name.
        DataError: If files lack columns, share no photo, or no class has two attributes with enough photos.
    """
    started = time.monotonic()
    photos = _read(settings)
    models = list(photos.tables)
    by = settings.by or models[0]
    if by not in models:
        raise ConfigError(f"--by {by!r} is no model; --predictions names {models}")
    rng = np.random.default_rng(settings.seed)
    half = selection.halve(photos.cell, rng)
    records, chosen = _choose(settings, photos, models.index(by), half, rng)
    matrix = selection.discover_and_evaluate(
        photos.correct, photos.cell, photos.shape, settings.min_photos, settings.splits, rng
    )
    cells = _matrix_records(matrix, models, rng)
    result = {
        "by": by,
        "models": {name: _model(name, i, matrix, cells) for i, name in enumerate(models)},
        "num_classes": len(records),
        "num_classes_with_groups": int((chosen[0] >= 0).sum()),
        "num_classes_kept": sum(record["kept"] for record in records),
        "classes": records,
        "matrix": cells,
        "attributes": photos.names,
        "inputs": photos.inputs,
        "settings": settings.fingerprint(),
    }
    written = _write(settings, photos, result, chosen, half)
    summary = rundir.Summary("discover", photos.read, len(photos.uids), photos.dropped)
    summary.seconds = time.monotonic() - started
    summary.extra.update({key: result[key] for key in ("by", "num_classes_with_groups", "num_classes_kept", "models")})
    summary.extra["num_photos_written"] = written
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


# --- input -----------------------------------------------------------------------------------------------


def _read(settings: DiscoverSettings) -> Photos:
    paths = prediction_files(settings.predictions)
    labels = read_labels(settings.attributes)
    tables = {name: _predictions(path) for name, path in paths.items()}
    first = next(iter(tables.values()))
    uids = first.column("uid").to_pylist()
    at = np.stack([positions(uids, table.column("uid").to_pylist()) for table in tables.values()])
    everywhere = (at >= 0).all(axis=0)
    labelled = np.array([uid in labels for uid in uids], bool)
    kept = np.nonzero(everywhere & labelled)[0]
    if not len(kept):
        raise DataError(
            f"no photo has predictions of every model and an attribute: {len(uids)} of {next(iter(paths))}, "
            f"{int(everywhere.sum())} of all models, {len(labels)} attributes",
            hint="all must come from one test set read the same way",
        )
    tables = {name: table.take(pa.array(at[i][kept])) for i, (name, table) in enumerate(tables.items())}
    class_names, class_at = np.unique(
        np.array([word or "" for word in first.column("class_name").take(pa.array(kept)).to_pylist()]),
        return_inverse=True,
    )
    names, label_at = np.unique(np.array([labels[uids[i]] for i in kept]), return_inverse=True)
    dropped = {"not_predicted_by_all": int((~everywhere).sum()), "no_attribute": int((everywhere & ~labelled).sum())}
    return Photos(
        tables,
        [uids[i] for i in kept],
        class_at * len(names) + label_at,
        class_names.tolist(),
        names.tolist(),
        np.stack([t.column("correct").to_numpy(zero_copy_only=False).astype(bool) for t in tables.values()]),
        len(uids),
        {reason: count for reason, count in dropped.items() if count},
        {path: store.sha256(store.read_bytes(path)) for path in paths.values()},
    )


def _predictions(path: str) -> pa.Table:
    table = store.read_table(path)
    missing = [name for name in ("uid", "class_name", "correct") if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}", hint="`clipgap evaluate` writes them")
    return table


# --- choosing --------------------------------------------------------------------------------------------


def _choose(
    settings: DiscoverSettings, photos: Photos, by: int, half: np.ndarray, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
    """Every class's groups, its p- and q-values, and whether it is kept; and the groups as (C,) positions."""
    correct = photos.correct[by]
    choosing = np.ones(len(half), bool) if settings.evaluate_on == "all" else half == 0
    least = settings.min_photos if settings.evaluate_on == "all" else -(-settings.min_photos // 2)
    hits, totals = _counts(photos, correct, choosing)
    best, worst = selection.best_and_worst(hits, totals, least)
    if (best < 0).all():
        raise DataError(
            f"no class has two attributes with {settings.min_photos} photos each: {len(photos.uids)} photos in "
            f"{photos.shape[0]} classes and {photos.shape[1]} attributes",
            hint="a smaller --min-photos",
        )
    gaps = selection.class_drops(hits, totals, best, worst)
    p = selection.permutation_p(hits, totals, least, settings.permutations, rng)
    q = selection.q_values(p)
    other_hits, other_totals = _counts(photos, correct, ~choosing if (~choosing).any() else choosing)
    held = selection.class_drops(other_hits, other_totals, best, worst)
    records = []
    for row, name in enumerate(photos.classes):
        known = best[row] >= 0
        kept = bool(known and 100 * gaps[row] > settings.min_gap_pp and q[row] <= settings.fdr)
        record: dict[str, Any] = {"class_name": name, "kept": kept}
        for group, at in (("common", best[row]), ("counter", worst[row])):
            record |= {
                group: photos.names[at] if known else None,
                f"{group}_n": int(totals[row, at]) if known else None,
                f"{group}_accuracy": float(hits[row, at] / totals[row, at]) if known else None,
            }
        record |= {"gap_pp": _points(gaps[row]), "p": _number(p[row]), "q": _number(q[row])}
        record["held_out_drop_pp"] = _points(held[row]) if settings.evaluate_on == "held-out" else None
        records.append(record)
    return records, (best, worst)


def _counts(photos: Photos, correct: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = photos.shape[0] * photos.shape[1]
    hits = np.bincount(photos.cell[chosen], correct[chosen].astype(float), size)
    return hits.reshape(photos.shape), np.bincount(photos.cell[chosen], minlength=size).reshape(photos.shape)


def _matrix_records(matrix: selection.Matrix, models: list[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    """One record per pair: drop on the photos that chose and held out, with bootstraps over classes."""
    records = []
    for i, chooser in enumerate(models):
        for j, evaluated in enumerate(models):
            record: dict[str, Any] = {"discovered_by": chooser, "evaluated": evaluated}
            for name, drops in (("same_photos", matrix.same[i, j]), ("held_out", matrix.held_out[i, j])):
                known = drops[np.isfinite(drops)]
                if not len(known):
                    record |= {f"{name}_drop_pp": None, f"{name}_low_pp": None, f"{name}_high_pp": None}
                    continue
                picks = intervals.resample_classes(len(known), CLASS_DRAWS, rng)
                low, high = 100 * intervals.percentile_interval(known[picks].mean(axis=1))
                record |= {f"{name}_drop_pp": 100 * float(known.mean()), f"{name}_low_pp": float(low),
                           f"{name}_high_pp": float(high)}  # fmt: skip
            record["num_classes"] = int(np.isfinite(matrix.held_out[i, j]).sum())
            records.append(record)
    return records


def _model(name: str, at: int, matrix: selection.Matrix, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What choosing and evaluating with one model on the same photos adds to its drop."""
    own = next(c for c in cells if c["discovered_by"] == name and c["evaluated"] == name)
    same, held = matrix.same[at, at], matrix.held_out[at, at]
    both = np.isfinite(same) & np.isfinite(held)
    inflation = 100 * float((same - held)[both].mean()) if both.any() else None
    return {
        "same_photos_drop_pp": own["same_photos_drop_pp"],
        "held_out_drop_pp": own["held_out_drop_pp"],
        "held_out_interval_pp": [own["held_out_low_pp"], own["held_out_high_pp"]],
        "inflation_pp": inflation,
    }


# --- output ----------------------------------------------------------------------------------------------


def _write(
    settings: DiscoverSettings, photos: Photos, result: dict[str, Any], chosen: tuple[np.ndarray, np.ndarray],
    half: np.ndarray,
) -> int:  # fmt: skip
    """Write everything; returns the number of photos in the groups of the classes kept."""
    out = settings.out
    store.write_json(store.join(out, "discover.json"), result)
    store.write_bytes(store.join(out, "groups.csv"), csv_bytes(result["classes"]))
    store.write_bytes(store.join(out, "matrix.csv"), csv_bytes(result["matrix"]))
    files = render(partial(figures_groups.matrix, result["matrix"], list(photos.tables)))
    for suffix in ("svg", "png"):
        store.write_bytes(store.join(out, "figures", f"matrix.{suffix}"), files[f"light.{suffix}"])
    class_at, label_at = np.divmod(photos.cell, photos.shape[1])
    kept = np.array([record["kept"] for record in result["classes"]])[class_at]
    shown = kept if settings.evaluate_on == "all" else kept & (half == 1)
    best, worst = (side[class_at] for side in chosen)
    group = np.where(label_at == best, "common", np.where(label_at == worst, "counter", ""))
    rows = np.nonzero(shown & (group != ""))[0]
    groups = pa.array(group[rows].tolist(), pa.string())
    table = pa.table(
        {
            "uid": [photos.uids[i] for i in rows],
            "class_name": [photos.classes[i] for i in class_at[rows]],
            "attribute": [photos.names[i] for i in label_at[rows]],
            "group": groups,
        },
        schema=schema.DISCOVERED,
    )
    store.write_table(store.join(out, "photos.parquet"), table)
    for name, own in photos.tables.items():
        own = own.take(pa.array(rows))
        if "group" in own.column_names:
            own = own.drop_columns("group")
        path = store.join(out, "predictions", f"{name.replace('/', '-')}.parquet")
        store.write_table(path, own.append_column("group", groups))
    return len(rows)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _points(value: float) -> float | None:
    return 100 * float(value) if np.isfinite(value) else None
