"""Duplicates of a pool: equal bytes by sha256, near ones by exact similarity, and a rule that says which rows stay.

Rows are put in the order in which they stay (`--stays`, `--order`). Of equal bytes the first stays. Among what is left
tasks find edges (row, row, similarity), never a matrix: over all pairs of groups of parts (stages/edges), or within and
across k-means partitions (stages/partitions), where the share of pairs that were not compared is measured and
reported. The driver applies the rule to the edges by rank, so that the result depends on neither shards nor workers.

Writes, for the first threshold and in keep-VALUE, groups-VALUE.parquet for every further one:
    DIR/keep/part-00000.parquet   schema.KEEP
    DIR/groups.parquet            schema.GROUPS
    DIR/found.json                mode and reason, edges, and the measured miss rate; also in summary.json
Unit of restart: the file of edges (and of assigned rows) while pairs are compared, then the part.
Memory of the driver: at most 250 bytes per row (2.5 GB at 10 million; no Python object per row outlives a part), and
the edges (stages/edges). Cost: exact O(n^2 d), minutes at 200,000 rows on two cores; partitioned
O(n (K + probes n / K) d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import duplicates
from clipgap_ray.stages import edges, partitions
from clipgap_ray.stages.dedup_rows import Rows, equal_bytes, ranked, read_rows, stay_order
from clipgap_ray.stages.keep import keep_path
from clipgap_ray.stages.progress import Progress, logger

LEAST_GROUP_BYTES, GROUP_BYTES = 1 << 20, 64 << 20
EXACT_ROWS = 200_000  # (2e5)^2 * 512 flop = 2e13: four minutes at the 85 GFLOP/s of two cores
ROWS_PER_PARTITION = 8192  # the paper's 400 million rows in 50,000 partitions
# The samples that hashes of (seed, uid) draw are independent of each other, and of `dedup_rows.STAYS_STREAM`.
SAMPLE_STREAM, CHECK_STREAM = 0, 1 << 32


@dataclass(frozen=True)
class Plan:
    """What `auto` became: the mode, why, and how many partitions the k-means gets."""

    mode: str
    why: str
    partitions: int

    @staticmethod
    def of(settings: DedupSettings, num_rows: int) -> Plan:
        """Choose the mode for a number of rows."""
        num_partitions = settings.partitions or max(1, round(num_rows / ROWS_PER_PARTITION))
        mode = settings.mode
        if mode == "auto":
            mode = "exact" if num_rows <= EXACT_ROWS else "partitioned"
            reason = f"{num_rows:,} rows are {'at most' if mode == 'exact' else 'more than'} {EXACT_ROWS:,}"
        else:
            reason = "as asked for"
        what = "all pairs" if mode == "exact" else f"{num_partitions:,} partitions, {settings.probes} probed per row"
        return Plan(mode, f"{mode} ({what}): {reason}", num_partitions)


def run(settings: DedupSettings) -> rundir.Summary:
    """Deduplicate a pool.

    Raises:
        ConfigError: If the lowest threshold is so low that more than `edges.MAX_EDGES` pairs pass it.
        StaleOutputError: If the directory was written with other settings.
    """
    pool = EmbeddingSet.open(settings.pool)
    plan = Plan.of(settings, pool.num_rows)
    logger.info("dedup: %s", plan.why)
    with rundir.RunDirectory(settings.out, "dedup", _guarded(settings, plan, pool)) as directory:
        if len(directory.log.records) < len(pool.parts):
            _deduplicate(directory, pool, settings, plan)
        manifest = {"pool": {"uri": pool.uri, "digest": pool.digest, "rows": pool.num_rows}, "encoder": pool.encoder}
        found = store.read_json(directory.path("found.json"))
        summary = directory.finish(manifest, **found, thresholds=_per_threshold(directory, settings))
        partitions.remove_rows(directory.uri)
        return summary


def _guarded(settings: DedupSettings, plan: Plan, pool: EmbeddingSet) -> dict[str, Any]:
    """Settings that decide the output: the resolved mode, and what it does not use left out."""
    guarded = {**settings.fingerprint(), "pool": pool.digest, "mode": plan.mode, "partitions": plan.partitions}
    guarded.pop("out")
    unused = {"probes", "check_rows"} if plan.mode == "exact" else set()
    if plan.mode == "exact" and not settings.needs_centroids:
        unused |= {"partitions"} | ({"seed"} if settings.stays != "random" else set())
    return {name: value for name, value in guarded.items() if name not in unused}


def _deduplicate(directory: rundir.RunDirectory, pool: EmbeddingSet, settings: DedupSettings, plan: Plan) -> None:
    rows = read_rows(pool, settings.stays)
    assigned = None
    if plan.mode == "partitioned" or settings.needs_centroids:
        hashes = schema.hash_uids(rows.uids, settings.seed + SAMPLE_STREAM)
        centroids = partitions.centroids_of(directory.uri, pool, hashes, plan.partitions, settings.seed)
        probes = min(settings.probes, len(centroids)) if plan.mode == "partitioned" else 1
        assigned = partitions.assign_rows(directory.uri, pool, centroids, probes, regroup=plan.mode == "partitioned")
    order = stay_order(rows, settings, assigned.similarity if assigned else None)
    copy_of = equal_bytes(rows, order)
    alive = np.empty(len(order), bool)
    alive[order] = copy_of == np.arange(len(order))
    mask = edges.RowMask(pool, alive)
    lowest = min(settings.thresholds)
    if plan.mode == "exact" or assigned is None:
        # About eight groups make 36 tasks: enough for a few cores and for an ETA, and the same on every cluster.
        group_bytes = min(GROUP_BYTES, max(LEAST_GROUP_BYTES, pool.num_rows * pool.dim * 2 // 8))
        found = edges.exact_edges(directory.uri, pool, mask, lowest, group_bytes)
    else:
        found = partitions.partition_edges(directory.uri, pool, mask, assigned, probes, lowest)
    report: dict[str, Any] = {"mode": plan.mode, "why": plan.why, "edges": len(found.first)}
    if plan.mode == "partitioned":
        report |= {"partitions": len(centroids), "probes": probes}
        if settings.check_rows:
            hashes = schema.hash_uids(rows.uids, settings.seed + CHECK_STREAM)
            from clipgap_ray.stages import partition_check  # statistics take 0.7 s to import, in every task as well

            report["check"] = partition_check.measure_misses(
                directory.uri, pool, mask, hashes, settings.check_rows, found, settings.thresholds
            )
            _tell(report["check"])
    store.write_json(directory.path("found.json"), report)
    _write_all(directory, pool, settings, rows, order, copy_of, ranked(found, mask, order))


def _tell(check: dict[str, Any]) -> None:
    for threshold, counts in check["at"].items():
        low, high = counts["miss_rate_95"]
        rate = counts["miss_rate"]
        found = "no pair to miss" if rate is None else f"miss rate {rate:.2%} ({low:.2%} to {high:.2%})"
        pairs, missed, sampled = f"{counts['pairs']:,}", f"{counts['missed']:,}", f"{check['rows']:,}"
        logger.info(
            "dedup: of %s pairs at %s among %s sampled rows and all others, %s were not compared: %s",
            pairs, threshold, sampled, missed, found,
        )  # fmt: skip


# --- decisions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What one threshold decides, by rank.

    Attributes:
        head: (n,) int64 the rank that stands for each; itself when the row stays.
        similarity: (n,) float32 to the row that removed it; NaN when it stays, or in a component without that edge.
        copy: (n,) bool it went for its bytes.
    """

    head: np.ndarray
    similarity: np.ndarray
    copy: np.ndarray


def decide(copy_of: np.ndarray, found: edges.Edges, min_similarity: float, rule: duplicates.Rule) -> Decision:
    """Apply equal bytes first, then the rule to the edges among what is left.

    Args:
        copy_of: (n,) int64 of `equal_bytes`.
        found: Edges between ranks of rows that are nobody's copy.
        min_similarity: Threshold, inclusive; edges below it are ignored.
        rule: Of `kernels.duplicates`.
    """
    close = found.similarity >= min_similarity
    chosen = found if close.all() else edges.Edges(*(column[close] for column in found))
    _, removed_by = duplicates.resolve(len(copy_of), chosen.first, chosen.second, chosen.similarity, rule)
    similarity = duplicates.similarity_to(removed_by, *chosen).astype(np.float32)
    copy = copy_of != np.arange(len(copy_of))
    similarity[copy] = 1.0
    return Decision(duplicates.heads(np.where(copy, copy_of, removed_by)), similarity, copy)


def _write_all(
    directory: rundir.RunDirectory,
    pool: EmbeddingSet,
    settings: DedupSettings,
    rows: Rows,
    order: np.ndarray,
    copy_of: np.ndarray,
    found: edges.Edges,
) -> None:
    """Decide every threshold, write its groups, then the keep tables: a part's commit holds all its thresholds."""
    decisions = {}
    for threshold in settings.thresholds:
        decision = decide(copy_of, found, threshold, settings.rule)
        suffix = "" if threshold == settings.min_similarity else f"-{threshold!r}"
        store.write_table(directory.path(f"groups{suffix}.parquet"), groups_table(rows, order, decision))
        decisions[suffix] = decision
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    progress = Progress("dedup, write", len(pool.parts), "parts", done=len(directory.log.records))
    start = 0
    for part in pool.parts:
        here = slice(start, start + part.num_rows)
        start += part.num_rows
        if part.number in directory.log.records:
            continue
        files, counts = {}, {}
        for suffix, decision in decisions.items():
            table = _keep_table(rows, order, decision, here, rank[here])
            data = store.table_bytes(table)
            store.write_bytes(keep_path(directory.uri, part.number, f"keep{suffix}"), data)
            files[f"keep{suffix}"] = store.sha256(data)
            counts[suffix] = _counts(table)
        also = {suffix: counts[suffix] for suffix in decisions if suffix}
        record = {"part": part.number, "read": part.num_rows, **counts[""], "files": files, "also": also}
        directory.log.append([record])
        progress.advance(rows=part.num_rows)
    progress.close()


def _keep_table(rows: Rows, order: np.ndarray, decision: Decision, here: slice, ranks: np.ndarray) -> pa.Table:
    """`schema.KEEP` of one part: positions `here` of the pool, which have these ranks."""
    head = decision.head[ranks]
    keep = head == ranks
    stands = order[head]
    similarity = decision.similarity[ranks]
    return pa.table(
        {
            "row_id": rows.row_ids[here],
            "uid": schema.hex_uids(rows.uids[here]),
            "keep": keep,
            "kept_uid": schema.hex_uids(rows.uids[stands]),
            "similarity": pa.array(similarity, mask=keep | np.isnan(similarity)),
            "reason": np.where(keep, "", np.where(decision.copy[ranks], "sha256", "similarity")),
            "group": rows.row_ids[stands],
        },
        schema=schema.KEEP,
    )


def groups_table(rows: Rows, order: np.ndarray, decision: Decision) -> pa.Table:
    """Return `schema.GROUPS`: the members of groups of two and more, group by group in the order of staying."""
    size = np.bincount(decision.head, minlength=len(order))
    members = np.nonzero(size[decision.head] > 1)[0]
    members = members[np.argsort(decision.head[members], kind="stable")]
    stands = order[decision.head[members]]
    similarity = decision.similarity[members]
    return pa.table(
        {
            "uid": schema.hex_uids(rows.uids[order[members]]),
            "kept_uid": schema.hex_uids(rows.uids[stands]),
            "similarity": pa.array(similarity, mask=np.isnan(similarity)),
            "group": rows.row_ids[stands],
        },
        schema=schema.GROUPS,
    )


def _counts(table: pa.Table) -> dict[str, Any]:
    reasons = {item["values"]: item["counts"] for item in table.column("reason").value_counts().to_pylist()}
    dropped = {name: reasons[name] for name in ("sha256", "similarity") if name in reasons}
    return {"kept": reasons.get("", 0), "dropped": dropped}


def _per_threshold(directory: rundir.RunDirectory, settings: DedupSettings) -> dict[str, Any]:
    """Rows kept and dropped at every threshold, summed over the parts."""
    totals = {}
    for threshold in settings.thresholds:
        total = rundir.Summary("dedup")
        for record in directory.log.records.values():
            total.add(record if threshold == settings.min_similarity else record["also"][f"-{threshold!r}"])
        totals[repr(threshold)] = {"kept": total.kept, "dropped": total.dropped}
    return totals
