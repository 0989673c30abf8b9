"""Two score runs of one pool by different encoders: what they agree on, and what hangs on the choice of the encoder.

Reads: two outputs of `score`; rows are matched by uid, images of test sets too. Decisions (which rows a cut removes)
are exact, as in `split`. Writes: OUT/agreement.json, OUT/agreement.csv, OUT/summary.json. Unit of restart: the command.
"""

from __future__ import annotations

import csv
import io
import time
from typing import Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.config.split import AnySplit, Far, GapMatch, Near
from clipgap_ray.embeddings import identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import agreement, subsets
from clipgap_ray.stages import split
from clipgap_ray.stages.split import Table


def run(settings: AgreementSettings) -> rundir.Summary:
    """Compare two score runs.

    Raises:
        ConfigError: If a test set is not scored in both.
        DataError: If the pools have no uid in common.
    """
    started = time.monotonic()
    tests = _tests(settings)
    first, second = (split.open_table(scores, tests) for scores in settings.scores)
    at = subsets.find(second.uids, first.uids)
    pairs = np.nonzero(at >= 0)[0], at[at >= 0]
    if not len(pairs[0]):
        raise DataError(f"{first.scores} and {second.scores} score no uid in common: they are not of one pool")
    records = []
    for test in tests:
        records.append({"test": test, **_ranks(first, second, test, pairs), **_queries(first, second, test)})
        records[-1]["pruned"] = _pruned(settings, (first, second), test, pairs)
    result = {
        "scores": [{"uri": t.scores, "digest": t.manifest["digest"], "encoder": t.manifest["encoder"]}
                   for t in (first, second)],
        "uids": {"common": len(pairs[0]), "first": first.num_uids, "second": second.num_uids},
        "tests": records,
        "warnings": _warnings(first, second, len(pairs[0])),
        "settings": settings.fingerprint(),
    }  # fmt: skip
    store.write_json(store.join(settings.out, "agreement.json"), result)
    _write_csv(settings.out, records)
    only_one = first.num_uids - len(pairs[0])
    summary = rundir.Summary(
        "agreement", first.num_uids, len(pairs[0]), {"not_in_second": only_one} if only_one else {}
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


def _ranks(first: Table, second: Table, test: str, pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Spearman's correlations of the pool side over common uids."""
    result = {}
    for column in ("m", "margin"):
        values = [table.column(test, column)[at] for table, at in zip((first, second), pairs, strict=True)]
        result[f"rank_correlation_{column}"] = agreement.rank_correlation(*values)
    return result


def _queries(first: Table, second: Table, test: str) -> dict[str, Any]:
    """The query side over common test images: tau, similarity to the pool, and who the nearest row is."""
    columns = ["uid", "tau", "similarity", "nearest_uid", "reference_uid"]
    tables = [store.read_table(store.join(t.scores, "queries", f"{test}.parquet"), columns) for t in (first, second)]
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


def _pruned(
    settings: AgreementSettings, tables: tuple[Table, Table], test: str, pairs: tuple[np.ndarray, np.ndarray]
) -> list[dict[str, Any]]:
    """Jaccard of what each cut removes by either encoder, beside what two random sets of these sizes have in common."""
    records = []
    for name, kind, more in _cuts(settings, tables, test):
        removed = []
        for table, at in zip(tables, pairs, strict=True):
            chosen: AnySplit = kind(scores=table.scores, out="unwritten.npy", test=(test,), **more)
            removed.append(~split.select(chosen, table)[at])
        counts = [int(side.sum()) for side in removed]
        records.append(
            {
                "cut": name,
                "removed_first": counts[0],
                "removed_second": counts[1],
                "removed_both": int((removed[0] & removed[1]).sum()),
                "jaccard": agreement.jaccard(*removed),
                "chance": agreement.chance_jaccard(len(removed[0]), *counts),
            }
        )
    return records


def _cuts(settings: AgreementSettings, tables: tuple[Table, Table], test: str) -> list[tuple[str, Any, dict[str, str]]]:
    cuts: list[tuple[str, Any, dict[str, str]]] = []
    if not any(np.isnan(split.read_tau(table.scores, test)).any() for table in tables):
        cuts.append(("gap-match", GapMatch, {}))
    for share in settings.sizes:
        cuts += [
            (f"{name} {share:g}", kind, {"size": f"{1 - share:.9f}"}) for name, kind in (("near", Near), ("far", Far))
        ]
    return cuts


def _warnings(first: Table, second: Table, common: int) -> list[str]:
    found = []
    if identity(first.manifest["encoder"]) == identity(second.manifest["encoder"]):
        found.append("both score runs are of the same encoder: they agree by construction")
    if common < max(first.num_uids, second.num_uids):
        found.append(
            f"{common:,} uids are in both of {first.num_uids:,} and {second.num_uids:,}; the others are left out"
        )
    return found


def _write_csv(out: str, records: list[dict[str, Any]]) -> None:
    rows = [{**{k: v for k, v in r.items() if k != "pruned"}, **cut} for r in records for cut in r["pruned"]]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    store.write_bytes(store.join(out, "agreement.csv"), buffer.getvalue().encode())
