"""What the join adds when asked: neighbours of the photos, backgrounds in the pool, robustness at equal similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import neighbours, robustness
from clipgap_ray.kernels.overlap import Photos
from clipgap_ray.stages.attributes import read_labels
from clipgap_ray.stages.join_pool import PoolReader


def open_pool(settings: DropJoinSettings) -> PoolReader | None:
    """Open --pool with its labels; None without."""
    return PoolReader(settings.pool, settings.pool_attributes) if settings.pool else None


def padded(lists: pa.ChunkedArray, count: int) -> np.ndarray:
    """Return (n, count) int64 of n lists of row ids, -1 where a list is shorter."""
    result = np.full((len(lists), count), -1, np.int64)
    for i, ids in enumerate(lists.to_pylist()):
        own = (ids or [])[:count]
        result[i, : len(own)] = own
    return result


def wrong_names(photos: pa.Table, everything: pa.Table) -> list[str | None]:
    """Name the class that was given instead of the right one.

    Args:
        photos: Predictions of n photos.
        everything: Predictions of the whole test set: they name the labels. A label that no photo has stays nameless.

    Returns:
        n names, None where the prediction was right, or there are no labels.
    """
    if not {"label", "prediction"} <= set(everything.column_names):
        return [None] * photos.num_rows
    labels, names = everything.column("label").to_pylist(), everything.column("class_name").to_pylist()
    known = dict(zip(labels, names, strict=True))
    pairs = zip(photos.column("label").to_pylist(), photos.column("prediction").to_pylist(), strict=True)
    return [known.get(given) if given != label else None for label, given in pairs]


def about_pool(
    settings: DropJoinSettings,
    pool: PoolReader | None,
    photos: Photos,
    uids: list[str],
    nearest: np.ndarray | None,
    wrong: list[str | None],
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe one model's photos by the pool.

    Returns:
        Fields of the result (`neighbours`, `prevalence`; none without --pool), and columns of photos/<model>.parquet.

    Raises:
        DataError: If the query table names no neighbours, or the attributes are of other photos.
    """
    if pool is None:
        return {}, {}
    if nearest is None:
        raise DataError(
            "the query table has no nearest_row_ids: it names no neighbours",
            hint="leave out --pool for tables of `clipgap gaps`, or use the output of `clipgap score`",
        )
    names = [photos.classes[at] for at in photos.class_at]
    labels = read_labels(settings.attributes) if settings.attributes else {}
    backgrounds = [labels.get(uid) for uid in uids] if labels else None
    if backgrounds is not None and not any(backgrounds):
        raise DataError(f"{settings.attributes} labels none of the {len(uids)} photos")
    found = pool.neighbours(nearest, names, wrong, backgrounds)
    far = float(np.median(photos.similarity)) if settings.far is None else settings.far
    regime = neighbours.regimes(photos.similarity, found.names_class, found.same_background, far)
    groups = neighbours.by_group(photos, regime, found.names_class, found.same_background, found.names_wrong)
    result: dict[str, Any] = {"neighbours": {"k": nearest.shape[1], "far": far, "groups": groups}}
    columns: dict[str, Any] = {
        "names_class": found.names_class.sum(axis=1),
        "names_wrong": found.names_wrong.sum(axis=1),
        "regime": [neighbours.REGIMES[at] for at in regime],
    }
    if found.same_background is not None:
        columns["same_background"] = found.same_background.sum(axis=1)
    if settings.pool_attributes and backgrounds is not None:
        result["prevalence"] = _prevalence(pool, photos, backgrounds, rng)
    return result, columns


def _prevalence(
    pool: PoolReader, photos: Photos, backgrounds: list[str | None], rng: np.random.Generator
) -> dict[str, Any]:
    """How common each class's two backgrounds are in the pool, beside its drop."""
    counts = pool.counts(photos.classes)
    usual = _usual(photos, backgrounds, pool.backgrounds)
    rates = photos.cell_means(photos.rate)
    drops = 100 * (rates[:, 0] - rates[:, 1])
    result = neighbours.prevalence(counts, usual, drops, rng)
    ratios, sides = result.pop("log_ratio"), result.pop("more_common")
    classes = []
    for row, name in enumerate(photos.classes):
        record: dict[str, Any] = {"class_name": name, "drop_pp": float(drops[row]), "log_ratio": ratios[row],
                                  "pool_rows": int(counts[row].sum())}  # fmt: skip
        for side, group in enumerate(photos.pair):
            at = usual[row, side]
            record[f"{group}_background"] = pool.backgrounds[at] if at >= 0 else None
            record[f"{group}_pool_rows"] = int(counts[row, at]) if at >= 0 else None
        # The group whose background the pool shows more often, beyond chance; "" where neither, None where unknown.
        names = {1: photos.pair[0], -1: photos.pair[1], 0: "", None: None}
        record["more_common"] = names[sides[row]]
        classes.append(record)
    return {**result, "classes": classes}


def _usual(photos: Photos, backgrounds: list[str | None], names: list[str]) -> np.ndarray:
    """(C, 2) position of the most frequent background of every class and group; -1 where none is known."""
    column = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(photos.classes), 2, len(names)), np.int64)
    for class_at, second, background in zip(photos.class_at, photos.second, backgrounds, strict=True):
        if background in column:
            counts[class_at, int(second), column[background]] += 1
    return np.where(counts.sum(axis=2) > 0, counts.argmax(axis=2), -1)


# --- effective robustness at equal similarity ------------------------------------------------------------


def adjusted_robustness(results: list[dict[str, Any]], baseline: tuple[str, ...]) -> dict[str, Any]:
    """Measure every model's distance from the baselines' line, before and after matching on similarity (7.3, item 7).

    Matching takes each model beside its own training data, so what is left is no difference of distances. Accuracies of
    0 and 1 are pulled inside by their counts; axes are probit.

    Raises:
        ConfigError: With fewer than two different baselines.
    """
    fitted = {}
    for kind in ("all", "matched"):
        points = {r["model"]: _point(r, kind) for r in results}
        known = [point for name in baseline if (point := points[name]) is not None]
        if len({x for x, _ in known}) < 2:
            raise ConfigError(
                f"--baseline {list(baseline)}: {len(known)} with {kind} photos; a line needs two of different accuracy"
            )
        pairs = np.array(known)
        fitted[kind] = (robustness.fit(pairs[:, 0], pairs[:, 1]), points)
    models = []
    for result in results:
        record: dict[str, Any] = {"model": result["model"], "baseline": result["model"] in baseline}
        for kind, (line, points) in fitted.items():
            point = points[result["model"]]
            first, second = result["groups"]
            matched = 2 * result["matched"]["num_pairs"]
            record[f"{kind}_n"] = sum(result["num_images"].values()) if kind == "all" else matched
            record |= dict.fromkeys((f"{kind}_{first}", f"{kind}_{second}", f"{kind}_residual_pp",
                                     f"{kind}_extrapolates"))  # fmt: skip
            if point is not None:
                x, y = np.array([point[0]]), np.array([point[1]])
                record |= {
                    f"{kind}_{first}": point[0],
                    f"{kind}_{second}": point[1],
                    f"{kind}_residual_pp": float(robustness.residuals_pp(line, x, y)[0]),
                    f"{kind}_extrapolates": bool(line.extrapolates(x)[0]),
                }
        models.append(record)
    lines = {
        kind: {"slope": line.slope, "intercept": line.intercept, "r2": line.r2 if np.isfinite(line.r2) else None}
        for kind, (line, _) in fitted.items()
    }
    return {"groups": results[0]["groups"], "baseline": list(baseline), "lines": lines, "models": models}


def _point(result: dict[str, Any], kind: str) -> tuple[float, float] | None:
    first, second = result["groups"]
    if kind == "all":
        values, counts = result["balanced"], result["num_images"]
    else:
        values, pairs = result["matched"]["balanced"], result["matched"]["num_pairs"]
        counts = {first: pairs, second: pairs}
    if values is None:
        return None
    inside = [
        robustness.pull_inside(np.array([values[g]]), np.array([counts[g]]), "probit")[0][0] for g in (first, second)
    ]
    return float(inside[0]), float(inside[1])
