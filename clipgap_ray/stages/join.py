"""The join that neither paper has: a drop between groups beside every photo's similarity to the training pool.

Reads: schema.PREDICTIONS of a grouped test set, the query table of `score` (or of `gaps`), joined by uid; with --pool
also captions and backgrounds of the photos' neighbours (`join_pool`).
Writes: OUT/join.json, OUT/models.csv, OUT/per_class.csv, OUT/photos/<model>.parquet, OUT/figures/, OUT/summary.json;
with --pool OUT/neighbours.csv, with --pool-attributes OUT/prevalence.csv, with --parts OUT/parts.csv, with --baseline
OUT/adjusted_robustness.csv.
Unit of restart: the whole command; the bootstrap takes seconds per thousand photos. Needs no Ray, but for large pools.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import threadpoolctl

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.config.predictions import prediction_files
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import decomposition, overlap
from clipgap_ray.reporting import figures_join, figures_pool
from clipgap_ray.reporting.joined import flat, neighbour_lines, parts_lines
from clipgap_ray.reporting.study import positions
from clipgap_ray.reporting.theme import render
from clipgap_ray.stages import join_more, join_parts


@dataclass(frozen=True)
class Model:
    """One model's photos with the uids of both groups, what was left out, and the hashes of what was read."""

    name: str
    photos: overlap.Photos
    uids: list[str]
    read: int
    dropped: dict[str, int]
    left_out: list[str]
    inputs: dict[str, str]
    nearest: np.ndarray | None  # (n, k) int64 nearest pool rows, -1 where there are fewer
    wrong: list[str | None]  # the class that was given instead, where it was wrong and has a name
    parts: dict[str, np.ndarray]  # (n,) float64 similarity of a part of every photo


def run(settings: DropJoinSettings) -> rundir.Summary:
    """Split every model's drop and write the join.

    Raises:
        ConfigError: If a flag names a model that has no predictions.
        DataError: If a file lacks columns, the files share no image, or no class has photos in both groups.
    """
    started = time.monotonic()
    models = _read(settings)
    missing = sorted(set(settings.baseline) - {model.name for model in models})
    if missing:
        raise ConfigError(f"--baseline names {missing}, --predictions {[model.name for model in models]}")
    pool = join_more.open_pool(settings)
    results: dict[str, Any] = {}
    for model in models:
        rng = np.random.default_rng(settings.seed)
        # The sums are small: threads of a BLAS only wait for each other.
        with threadpoolctl.threadpool_limits(1):
            found = decomposition.summarise(model.photos, rng, settings.draws, settings.min_overlap, settings.caliper)
            parts, further = join_parts.about_parts(settings, model.photos, model.parts, rng)
        about = {"model": model.name, "classes_left_out": model.left_out, "inputs": model.inputs}
        more, columns = join_more.about_pool(settings, pool, model.photos, model.uids, model.nearest, model.wrong, rng)
        results[model.name] = {**about, "left_out": model.dropped, **found, **more, **parts}
        _write_model(settings.out, model, results[model.name], {**columns, **further})
    result: dict[str, Any] = {"test": settings.test, "models": results, "settings": settings.fingerprint()}
    result["further_inputs"] = _further_inputs(settings)
    if len(models) == 1:
        result = {**next(iter(results.values())), **result}
    _write_csv(settings.out, "models.csv", [flat(r) for r in results.values()])
    _write_csv(settings.out, "per_class.csv", [{"model": n, **c} for n, r in results.items() for c in r["classes"]])
    _write_figure(settings.out, "parts", partial(figures_join.drop_parts, list(results.values())))
    if settings.baseline:
        result["adjusted_robustness"] = join_more.adjusted_robustness(list(results.values()), settings.baseline)
    _write_more(settings.out, result, results)
    store.write_json(store.join(settings.out, "join.json"), result)
    return _finish(settings, models, results, started)


# --- input -----------------------------------------------------------------------------------------------


def _read(settings: DropJoinSettings) -> list[Model]:
    paths = prediction_files(settings.predictions)
    scores = _per_model(settings.scores, list(paths), "--scores")
    columns = _per_model(settings.column, list(paths), "--column")
    return [_model(settings, name, path, scores[name], columns[name]) for name, path in paths.items()]


def _per_model(words: tuple[str, ...], models: list[str], what: str) -> dict[str, str]:
    """Read one VALUE for all models, or NAME=VALUE for each (a VALUE beside them is for the others)."""
    named = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in models and "=" in word)
    others = [word for word in words if "=" not in word or word.split("=", 1)[0] not in models]
    unknown = [word for word in others if "=" in word]
    if unknown:
        raise ConfigError(f"{what} {unknown[0]!r} names no model of --predictions", hint=f"models are {models}")
    without = [name for name in models if name not in named]
    if len(others) > 1 or (without and not others):
        raise ConfigError(f"{what} {list(words)} is not clear for {without}", hint=f"one for all, or {what} NAME=VALUE")
    return {name: named[name] if name in named else others[0] for name in models}


def _model(settings: DropJoinSettings, name: str, path: str, scores: str, column: str) -> Model:
    needed = ["uid", "class_name", "group", "correct"]
    predictions = _columns(path, needed, "`clipgap evaluate` writes them", ["label", "prediction"])
    table = scores if scores.endswith(".parquet") else store.join(scores, "queries", f"{settings.test}.parquet")
    if table != scores:
        _check_scored(scores, settings.test)
    queries = _columns(table, ["uid", column], "see --column", ["nearest_row_ids"])
    values = queries.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
    unknown = ~np.isfinite(values)
    if unknown.any():
        raise DataError(
            f"{table}: {int(unknown.sum())} of {len(values)} images have no {column}",
            hint="score with --reference EMB or --thresholds NAME=FILE" if column == "tau" else "",
        )
    uids = predictions.column("uid").to_pylist()
    at = positions(uids, queries.column("uid").to_pylist())
    if (at < 0).all():
        raise DataError(
            f"{path} and {table} share no image: {len(uids)} predictions, {len(values)} scored images",
            hint="both must come from one test set read the same way",
        )
    scored = np.nonzero(at >= 0)[0]
    classes = np.array([word or "" for word in predictions.column("class_name").to_pylist()])[scored]
    groups = np.array([word or "" for word in predictions.column("group").to_pylist()])[scored]
    correct = predictions.column("correct").to_numpy(zero_copy_only=False).astype(float)[scored]
    try:
        photos, kept, left_out = overlap.take(
            classes.tolist(), groups.tolist(), correct, values[at[scored]], settings.groups
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}", hint="name the groups with --groups FIRST SECOND") from None
    other = int((~np.isin(groups, settings.groups)).sum())
    dropped = {"not_scored": len(uids) - len(scored), "other_group": other,
               "class_without_both_groups": len(scored) - len(kept) - other}  # fmt: skip
    inputs = {path: store.sha256(store.read_bytes(path)), table: store.sha256(store.read_bytes(table))}
    ours = [uids[i] for i in scored[kept]]
    dropped = {reason: count for reason, count in dropped.items() if count}
    nearest = None
    if "nearest_row_ids" in queries.column_names:
        nearest = join_more.padded(
            queries.column("nearest_row_ids").take(pa.array(at[scored[kept]])), settings.neighbours
        )
    wrong = join_more.wrong_names(predictions.take(pa.array(scored[kept])), predictions)
    parts = join_parts.read(settings, column, ours)
    return Model(name, photos, ours, len(uids), dropped, left_out, inputs, nearest, wrong, parts)


def _further_inputs(settings: DropJoinSettings) -> dict[str, str]:
    """Name what was read beside predictions and scores by its content: pool, labels, parts."""
    found = {settings.pool: EmbeddingSet.open(settings.pool).digest} if settings.pool else {}
    for path in filter(None, (settings.attributes, settings.pool_attributes)):
        # What a command left in a folder goes by its manifest: it names its input and its settings.
        manifest = store.join(path, "manifest.json")
        found[path] = store.sha256(store.read_bytes(manifest if store.exists(manifest) else path))
    for path in schema.named(settings.parts, "--parts").values():
        table = join_parts.table_of(path, settings.test)
        found[table] = store.sha256(store.read_bytes(table))
    return found


def _check_scored(scores: str, test: str) -> None:
    known = rundir.read_manifest(scores, "score")["tests"]
    if test not in known:
        raise ConfigError(
            f"{scores} has no scores for {test!r}; it has {sorted(known)}",
            hint="add it with `clipgap score --add --test NAME=EMB`",
        )


def _columns(path: str, names: list[str], hint: str, further: list[str]) -> pa.Table:
    table = store.read_table(path)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {table.column_names}", hint=hint)
    return table.select(list(dict.fromkeys([*names, *(name for name in further if name in table.column_names)])))


# --- output ----------------------------------------------------------------------------------------------


def _write_model(out: str, model: Model, result: dict[str, Any], further: dict[str, Any]) -> None:
    """The joined photos of one model (schema.JOINED) and its figure."""
    photos = model.photos
    table = pa.table(
        {
            "uid": model.uids,
            "class_name": [photos.classes[at] for at in photos.class_at],
            "group": [photos.pair[int(second)] for second in photos.second],
            "similarity": photos.similarity,
            "correct": photos.rate,
            "supported": overlap.supported(photos),
        },
        schema=schema.JOINED,
    )
    for column, values in further.items():
        table = table.append_column(column, pa.array(values))
    name = model.name.replace("/", "-")
    store.write_table(store.join(out, "photos", f"{name}.parquet"), table)
    _write_figure(out, f"join-{name}", partial(figures_join.drop_at_equal_similarity, result))


def _write_more(out: str, result: dict[str, Any], models: dict[str, Any]) -> None:
    """Tables and figures of what was asked for beside the split of the drop."""
    with_neighbours = {name: own["neighbours"] for name, own in models.items() if own.get("neighbours")}
    lines = [line for name, own in with_neighbours.items() for line in neighbour_lines(name, own)]
    if lines:
        _write_csv(out, "neighbours.csv", lines)
        _write_figure(out, "neighbours", partial(figures_pool.regimes, with_neighbours))
    with_prevalence = {name: own["prevalence"] for name, own in models.items() if own.get("prevalence")}
    lines = [{"model": name, **line} for name, own in with_prevalence.items() for line in own["classes"]]
    if lines:
        _write_csv(out, "prevalence.csv", lines)
        _write_figure(out, "prevalence", partial(figures_pool.prevalence, with_prevalence))
    with_parts = {name: own["similarity_parts"] for name, own in models.items() if own.get("similarity_parts")}
    if with_parts:
        _write_csv(out, "parts.csv", [line for name, own in with_parts.items() for line in parts_lines(name, own)])
        _write_figure(out, "similarity_parts", partial(figures_join.similarity_parts, with_parts))
    if "adjusted_robustness" in result:
        _write_csv(out, "adjusted_robustness.csv", result["adjusted_robustness"]["models"])
        _write_figure(out, "adjusted_robustness", partial(figures_pool.adjusted, result["adjusted_robustness"]))


def _write_figure(out: str, name: str, draw: Any) -> None:
    files = render(draw)
    store.write_bytes(store.join(out, "figures", f"{name}.svg"), files["light.svg"])
    store.write_bytes(store.join(out, "figures", f"{name}.png"), files["light.png"])


def _write_csv(out: str, name: str, records: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    store.write_bytes(store.join(out, name), buffer.getvalue().encode())


def _finish(settings: DropJoinSettings, models: list[Model], results: dict[str, Any], started: float) -> rundir.Summary:
    dropped: dict[str, int] = {}
    for model in models:
        for reason, count in model.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    kept = sum(len(model.uids) for model in models)
    summary = rundir.Summary("join", sum(m.read for m in models), kept, dropped, seconds=time.monotonic() - started)
    summary.extra["models"] = {
        name: {"drop": r["drop"], "decomposition": r["decomposition"], "warnings": r["warnings"]}
        for name, r in results.items()
    }
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary
