"""Is it the animal or what is behind it that lies farther from the pool? (counteranimal.md 7.3, item 4)

Counter photos also change the animal: winter coats on snow, hatchlings on the ground. So the photos are scored three
times, whole, with the animal alone and with the animal removed (`clipgap cutout` makes the sets), and each similarity
takes the place of the whole one: how much do the groups differ in it, and how much of the drop does it explain?
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from clipgap_ray import schema, store
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import decomposition, overlap
from clipgap_ray.reporting.study import positions

WHOLE = "whole"
KEPT = ("exposure", "overlap", "identified", "why_not", "decomposition")


def read(settings: DropJoinSettings, column: str, uids: list[str]) -> dict[str, np.ndarray]:
    """Read the similarity of every part of n photos: (n,) float64 by part, NaN where a part was not scored.

    Raises:
        DataError: If a file lacks the column, or has none of the photos.
    """
    found = {}
    for name, path in schema.named(settings.parts, "--parts").items():
        where = table_of(path, settings.test)
        table = store.read_table(where)
        lacking = {"uid", column} - set(table.column_names)
        if lacking:
            raise DataError(f"{where} lacks the columns {sorted(lacking)}; it has {table.column_names}")
        at = positions(uids, table.column("uid").to_pylist())
        if (at < 0).all():
            raise DataError(
                f"--parts {name}: {where} and the predictions share no image: {table.num_rows} scored, {len(uids)} "
                "photos",
                hint="`clipgap cutout` keeps the uids of the photos: score what it wrote, under the same folder name",
            )
        values = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
        own = np.where(at >= 0, values[at], np.nan)
        found[name] = np.where(np.isfinite(own), own, np.nan)
    return found


def table_of(path: str, test: str) -> str:
    """Return the query table of --parts NAME=PATH: itself, or that of a test set in the output of `score`."""
    return path if path.endswith(".parquet") else store.join(path, "queries", f"{test}.parquet")


def about_parts(
    settings: DropJoinSettings, photos: overlap.Photos, parts: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare the groups by every part's similarity, on the photos that have all parts.

    Returns:
        The field `similarity_parts` of the result (none without --parts), and columns of photos/<model>.parquet.

    Raises:
        DataError: If no class has photos of both groups with all parts.
    """
    if not parts:
        return {}, {}
    complete = np.isfinite(np.stack(list(parts.values()))).all(axis=0)
    at = np.nonzero(complete)[0]
    names = [photos.classes[i] for i in photos.class_at[at]]
    groups = [photos.pair[int(second)] for second in photos.second[at]]
    try:
        whole, kept, left_out = overlap.take(names, groups, photos.rate[at], photos.similarity[at], photos.pair)
    except ValueError as error:
        raise DataError(f"--parts, on the {len(at)} of {len(complete)} photos that have all parts: {error}") from None
    records = []
    for name, similarity in {WHOLE: photos.similarity, **parts}.items():
        own = replace(whole, similarity=similarity[at][kept])
        found = decomposition.summarise(own, rng, settings.draws, settings.min_overlap, settings.caliper)
        record = {"part": name, **{key: found[key] for key in KEPT}}
        record["correlation_with_whole"] = within_cells(whole, own.similarity)
        records.append(record)
    about = {"num_images": len(kept), "without_all_parts": int((~complete).sum()), "classes_left_out": left_out,
             "drop_pp": float(100 * np.subtract(*whole.cell_means(whole.rate).mean(axis=0))),
             "parts": records}  # fmt: skip
    columns = {f"similarity_{name}": values for name, values in parts.items()}
    return {"similarity_parts": about}, columns


def within_cells(photos: overlap.Photos, other: np.ndarray) -> float | None:
    """Return Spearman's correlation of two (n,) similarities inside classes and groups; None without spread."""
    ranks = []
    for values in (photos.similarity, other):
        own = stats.rankdata(values)
        ranks.append(own - photos.cell_means(own).ravel()[photos.cell])
    if not all(np.ptp(side) for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])
