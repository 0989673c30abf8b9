"""Two score runs of one pool by different encoders: what they agree on, and what hangs on the choice of the encoder.

Reads: two outputs of `score`; rows are matched by uid (`score_pairs`), images of test sets too. Decisions (which rows a
cut removes) are exact, as in `split`; rank correlations are exact below 262,144 uids, else within `rank_error_*` of the
exact ones (`kernels.ranks`; about 2e-5). Writes: OUT/agreement.json, OUT/agreement.csv, OUT/summary.json.

Memory: bounded at any pool size. Tasks hold a million rows; the driver holds counts, the tables of the test images, and
the rows within the rounding bound of a cut (`agreement_cuts`). Small pools start no Ray. Unit of restart: the command.
"""

from __future__ import annotations

import csv
import io
import time
from functools import partial
from typing import Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.embeddings import identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import agreement, ranks, splits, subsets
from clipgap_ray.stages import agreement_cuts, score_pairs
from clipgap_ray.stages.agreement_cuts import Counted, Cut
from clipgap_ray.stages.score_pairs import COLUMNS, Bucket, Pairs, ScoreRun
from clipgap_ray.stages.split import read_tau

Counts = dict[tuple[int, str], np.ndarray]  # by run and m, margin (over common uids), all (m over all uids)


def run(settings: AgreementSettings) -> rundir.Summary:
    """Compare two score runs.

    Raises:
        ConfigError: If a test set is not scored in both.
        DataError: If the pools have no uid in common.
    """
    started = time.monotonic()
    tests = _tests(settings)
    pairs = score_pairs.pair(settings.scores, tests, store.join(settings.out, "partial"))
    try:
        if not pairs.num_common:
            uris = [one.uri for one in pairs.runs]
            raise DataError(f"{uris[0]} and {uris[1]} score no uid in common: they are not of one pool")
        records = [_compare(settings, pairs, test) for test in tests]
    finally:
        pairs.remove()
    result = {
        "scores": [{"uri": one.uri, "digest": one.manifest["digest"], "encoder": one.manifest["encoder"]}
                   for one in pairs.runs],
        "uids": {"common": pairs.num_common, "first": pairs.num_uids[0], "second": pairs.num_uids[1]},
        "tests": records,
        "warnings": _warnings(pairs),
        "settings": settings.fingerprint(),
    }  # fmt: skip
    store.write_json(store.join(settings.out, "agreement.json"), result)
    _write_csv(settings.out, records)
    only_one = pairs.num_uids[0] - pairs.num_common
    summary = rundir.Summary(
        "agreement", pairs.num_uids[0], pairs.num_common, {"not_in_second": only_one} if only_one else {}
    )
    summary.seconds = time.monotonic() - started
    summary.extra.update(tests=records, warnings=result["warnings"])
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


def _tests(settings: AgreementSettings) -> tuple[str, ...]:
    scored = [set(rundir.read_manifest(scores, "score")["tests"]) for scores in settings.scores]
    common = scored[0] & scored[1]
    missing = sorted(set(settings.test) - common)
    if missing or not common:
        raise ConfigError(
            f"{missing or 'no test set'} scored in both: {settings.scores[0]} has {sorted(scored[0])}, "
            f"{settings.scores[1]} has {sorted(scored[1])}",
            hint="add test sets with `clipgap score --add --test NAME=EMB`",
        )
    return settings.test or tuple(sorted(common))


# --- the pool side -----------------------------------------------------------------------------------------


def _compare(settings: AgreementSettings, pairs: Pairs, test: str) -> dict[str, Any]:
    """Everything about one test set: two passes over the buckets, then the rows in the bands of the cuts."""
    edges = {(side, column): ranks.grid(pairs.samples[side, test, column]) for side in (0, 1) for column in COLUMNS}
    counts = _add(list(pairs.each(partial(_count, pairs, test, edges), f"count {test}")))
    cuts = _cuts(settings, pairs, test, edges, counts)
    chunks = sorted(
        pairs.each(partial(_place, pairs, test, edges, counts, cuts), f"place {test}"), key=lambda chunk: chunk[0]
    )
    result: dict[str, Any] = {"test": test}
    for at, column in enumerate(COLUMNS):
        both = counts[0, column], counts[1, column]
        found, error = ranks.correlation([product for _, products, _ in chunks for product in products[at]], both)
        result |= {f"rank_correlation_{column}": found, f"rank_error_{column}": error}
    result |= _queries(*pairs.runs, test)
    result["pruned"] = []
    for at, cut in enumerate(cuts):
        counted = agreement_cuts.merge(one for *_, places in chunks for one in places[at])
        gone = agreement_cuts.removed(pairs, test, cut, counted)
        result["pruned"].append(agreement_cuts.record(cut, gone, pairs.num_common))
    return result


def _cuts(
    settings: AgreementSettings, pairs: Pairs, test: str, edges: dict[tuple[int, str], np.ndarray], counts: Counts
) -> list[Cut]:
    bounds = pairs.runs[0].bound, pairs.runs[1].bound
    found = []
    if not any(np.isnan(read_tau(one.uri, test)).any() for one in pairs.runs):
        found.append(agreement_cuts.gap_match(bounds))
    of_m = (counts[0, "all"], counts[1, "all"]), (edges[0, "m"], edges[1, "m"]), bounds
    for share in settings.sizes:
        # As `split near` and `split far` read --size: the number kept.
        first, second = (splits.parse_size(f"{1 - share:.9f}", total) for total in pairs.num_uids)
        gone = pairs.num_uids[0] - first, pairs.num_uids[1] - second
        found.append(agreement_cuts.by_rank(f"near {share:g}", (first, second), *of_m, removes_low=False))
        found.append(agreement_cuts.by_rank(f"far {share:g}", gone, *of_m, removes_low=True))
    return found


def _count(pairs: Pairs, test: str, edges: dict[tuple[int, str], np.ndarray], buckets: list[int]) -> Counts:
    """Count values per cell: of both columns over common uids where both runs have a number, of m over all uids."""
    counts: list[Counts] = []
    for bucket in buckets:
        read = pairs.read(bucket, test)
        own: Counts = {}
        for side in (0, 1):
            own[side, "all"] = ranks.count(read.values[side]["m"], edges[side, "m"])
        for column in COLUMNS:
            for side, values in enumerate(_usable(read, column)):
                own[side, column] = ranks.count(values, edges[side, column])
        counts.append(own)
    return _add(counts)


def _add(counts: list[Counts]) -> Counts:
    return {key: np.sum([one[key] for one in counts], axis=0) for key in counts[0]}


def _place(
    pairs: Pairs,
    test: str,
    edges: dict[tuple[int, str], np.ndarray],
    counts: Counts,
    cuts: list[Cut],
    buckets: list[int],
) -> tuple[int, list[list[ranks.Products]], list[list[Counted]]]:
    """Products of ranks by column and bucket, and every cut's counts by bucket; the first bucket's number before."""
    products: list[list[ranks.Products]] = [[] for _ in COLUMNS]
    places: list[list[Counted]] = [[] for _ in cuts]
    for bucket in buckets:
        read = pairs.read(bucket, test, uids=True)
        for at, column in enumerate(COLUMNS):
            first, second = _usable(read, column)
            of_column = (edges[0, column], edges[1, column]), (counts[0, column], counts[1, column])
            products[at].append(ranks.products(first, second, *of_column))
        for own, one in zip(places, agreement_cuts.count(pairs, read, cuts), strict=True):
            own.append(one)
    return buckets[0], products, places


def _usable(bucket: Bucket, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of the uids for which both runs have a number."""
    first, second = (values[column][at] for values, at in zip(bucket.values, bucket.common, strict=True))
    usable = np.isfinite(first) & np.isfinite(second)
    return first[usable], second[usable]


# --- the query side ----------------------------------------------------------------------------------------


def _queries(first: ScoreRun, second: ScoreRun, test: str) -> dict[str, Any]:
    """The query side over common test images: tau, similarity to the pool, and who the nearest row is."""
    columns = ["uid", "tau", "similarity", "nearest_uid", "reference_uid"]
    tables = [store.read_table(store.join(t.uri, "queries", f"{test}.parquet"), columns) for t in (first, second)]
    uids = [schema.pack_uids(table.column("uid")) for table in tables]
    known, first_at = np.unique(uids[0], return_index=True)
    at = subsets.find(known, uids[1])
    pairs = first_at[at[at >= 0]], np.nonzero(at >= 0)[0]
    result: dict[str, Any] = {"num_images": len(pairs[0])}
    for column in ("tau", "similarity"):
        values = [t.column(column).to_numpy()[rows] for t, rows in zip(tables, pairs, strict=True)]
        result[f"rank_correlation_{column}"] = agreement.rank_correlation(*values)
    for name, column in (("same_nearest", "nearest_uid"), ("same_reference", "reference_uid")):
        sides = [
            np.array(t.column(column).to_pylist(), dtype=object)[rows] for t, rows in zip(tables, pairs, strict=True)
        ]
        known_both = np.array([a is not None and b is not None for a, b in zip(*sides, strict=True)], bool)
        result[name] = float((sides[0] == sides[1])[known_both].mean()) if known_both.any() else None
    return result


def _warnings(pairs: Pairs) -> list[str]:
    first, second = pairs.runs
    found = []
    if identity(first.manifest["encoder"]) == identity(second.manifest["encoder"]):
        found.append("both score runs are of the same encoder: they agree by construction")
    if pairs.num_common < max(pairs.num_uids):
        found.append(
            f"{pairs.num_common:,} uids are in both of {pairs.num_uids[0]:,} and {pairs.num_uids[1]:,}; the others are "
            "left out"
        )
    return found


def _write_csv(out: str, records: list[dict[str, Any]]) -> None:
    rows = [{**{k: v for k, v in r.items() if k != "pruned"}, **cut} for r in records for cut in r["pruned"]]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    store.write_bytes(store.join(out, "agreement.csv"), buffer.getvalue().encode())
