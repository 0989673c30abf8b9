"""Numbers about closeness: histograms, accuracy against similarity, the gap check, removed rows."""

from __future__ import annotations

import numpy as np
from scipy import stats

from clipgap_ray.kernels import intervals
from clipgap_ray.reporting import groups, pool_side, tables
from clipgap_ray.reporting.study import Queries, Study, positions
from clipgap_ray.reporting.tables import Record

HISTOGRAM_BINS = 40


def closeness(study: Study) -> list[Record]:
    """Return one record per test set: medians of both gaps, and the share closer to the pool than to the reference."""
    records = []
    for test in study.tests:
        queries = study.queries(test)
        if queries is None:
            continue
        count = len(queries.similarity)
        record: Record = {
            "test": test,
            "num_images": count,
            "median_pool": float(np.median(queries.similarity)),
            "median_reference": None,
            "num_closer_to_pool": None,
            "share_closer_to_pool": None,
            "share_low": None,
            "share_high": None,
        }
        if queries.has_reference:
            closer = int((queries.similarity > queries.tau).sum())
            low, high = intervals.wilson(np.array(closer), np.array(count))
            record |= {
                "median_reference": float(np.median(queries.tau)),
                "num_closer_to_pool": closer,
                "share_closer_to_pool": closer / count,
                "share_low": float(low),
                "share_high": float(high),
            }
        records.append(record)
    return records


def histograms(study: Study) -> list[Record]:
    """Return test images per bin of nearest-neighbour similarity, to pool and reference (paper figure 3a)."""
    loaded = {test: q for test in study.tests if (q := study.queries(test)) is not None}
    return histogram_records({test: (q.similarity, q.tau[~np.isnan(q.tau)]) for test, q in loaded.items()})


def histogram_records(gaps: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> list[Record]:
    """Bin gaps on one scale for all test sets.

    Args:
        gaps: Per test set (n,) float64 similarities to the pool, and to the reference if there is one.

    Returns:
        One record per test set and bin: `test, low, high, pool, reference`.
    """
    known = {name: (pool, pool[:0] if tau is None else tau) for name, (pool, tau) in gaps.items()}
    values = np.concatenate([side for pair in known.values() for side in pair] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    # One common scale, its low end cut at the half percentile: a few strays would squeeze everything else.
    edges = np.linspace(min(np.quantile(values, 0.005), 0.99), max(values.max(), 1.0), HISTOGRAM_BINS + 1)
    records = []
    for test, pair in known.items():
        pool, reference = (np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] for side in pair)
        for i in range(HISTOGRAM_BINS):
            ends = {"low": float(edges[i]), "high": float(edges[i + 1])}
            records.append({"test": test, **ends, "pool": int(pool[i]), "reference": int(reference[i])})
    return records


def accuracy_by_similarity(study: Study, width: float) -> list[Record]:
    """Return accuracy in bins of similarity to the uncut pool (paper figure 3b), before and after the gap-matched cut.

    Args:
        study: The study.
        width: Bin width; the paper's is 0.05. Bins start at multiples of it.
    """
    records = []
    for test in study.tests:
        queries, base = study.queries(test), tables.base_arm(study)
        cut = study.gap_matched(test)
        shown = [("full", base)] if base is not None else []
        shown += [("gap-match", arm) for arm in tables.arms(study) if arm.split == cut and not arm.supervised][:1]
        for kind, arm in shown:
            outcome = tables.correct(study, arm, test) if queries is not None else None
            if queries is not None and outcome is not None:
                binned = _bins(queries, *outcome, width)
                records += [{"test": test, "model": kind, "split": arm.split, **row} for row in binned]
    return records


NARROWER = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
FEWEST_BINS = 4


def bin_width(study: Study, widest: float) -> float:
    """Return the widest bins that show a curve: an encoder whose similarities lie in 0.95..1 needs narrower ones.

    Args:
        study: The study.
        widest: What is wanted; kept if the middle 98 % of any test set fill at least FEWEST_BINS of it.
    """
    spans = [float(np.ptp(np.quantile(q.similarity, [0.01, 0.99])))
             for test in study.tests if (q := study.queries(test)) is not None]  # fmt: skip
    if not spans:
        return widest
    fitting = [width for width in (widest, *NARROWER) if width <= widest and max(spans) >= FEWEST_BINS * width]
    return max(fitting, default=min(widest, NARROWER[-1]))


def _bins(queries: Queries, right: np.ndarray, uids: list[str], width: float) -> list[Record]:
    at = positions(uids, queries.uids)
    similarity, rate = queries.similarity[at[at >= 0]], right.mean(axis=0)[at >= 0]
    bins = np.floor(np.round(similarity / width, 9)).astype(int)
    bins = np.minimum(bins, int(np.ceil(1 / width)) - 1)  # an exact copy (s = 1) belongs to the last bin
    records = []
    for number in np.unique(bins):
        inside = bins == number
        hits, count = float(rate[inside].sum()), int(inside.sum())
        low, high = intervals.wilson(np.array(hits), np.array(count))
        records.append(
            {
                "low_similarity": float(number * width),
                "high_similarity": float((number + 1) * width),
                "num_images": count,
                "accuracy": hits / count,
                "low": float(low),
                "high": float(high),
            }
        )
    return records


def rank_correlations(study: Study, draws: int, seed: int) -> list[Record]:
    """Return Spearman's correlation of similarity to the pool and correctness of the uncut model, bootstrapped."""
    records = []
    base = tables.base_arm(study)
    for test in study.tests:
        queries = study.queries(test)
        outcome = tables.correct(study, base, test) if base is not None and queries is not None else None
        if outcome is None or queries is None:
            continue
        at = positions(outcome[1], queries.uids)
        similarity, rate = queries.similarity[at[at >= 0]], outcome[0].mean(axis=0)[at >= 0]
        if len(similarity) < 10 or rate.std() == 0 or similarity.std() == 0:
            continue
        rng = np.random.default_rng(seed)
        ranks = np.stack([stats.rankdata(similarity), stats.rankdata(rate)])
        picks = rng.integers(0, len(similarity), size=(min(draws, 500), len(similarity)))
        # Ranks are taken once: re-ranking every draw changes the third digit and costs fifty times as much.
        with np.errstate(invalid="ignore"):  # a draw of equal outcomes has no correlation
            drawn = np.array([np.corrcoef(ranks[:, pick])[0, 1] for pick in picks])
        low, high = intervals.percentile_interval(drawn[np.isfinite(drawn)])
        rho = float(np.corrcoef(ranks)[0, 1])
        records.append({"test": test, "num_images": len(similarity), "rho": rho, "low": low, "high": high})
    return records


# --- gap check -------------------------------------------------------------------------------------------


def gap_check(study: Study) -> list[Record]:
    """Return, for every gap-matched split and target test set, how far the gap after the cut is from tau.

    With slack 0 the deviation is 0 at every test point: the pool keeps nothing closer than the reference, and the
    reference is mixed in (paper 1.4). A point whose gap lies above tau + slack is a violation.
    """
    records = []
    for name, recipe in study.recipes().items():
        if recipe.get("kind") != "gap-match":
            continue
        slack = float(recipe.get("slack") or 0.0)
        for test in recipe.get("tests", []):
            table = study.gaps(name, test)
            if table is None:
                continue
            tau, gap = table.column("tau").to_numpy(), table.column("gap").to_numpy()
            deviation = np.abs(gap - tau)
            records.append(
                {
                    "split": name,
                    "test": test,
                    "slack": slack,
                    "num_points": len(tau),
                    "num_equal": int((deviation == 0).sum()),
                    "max_deviation": float(deviation.max(initial=0.0)),
                    "num_violations": int((gap > tau + slack).sum()),
                }
            )
    return records


# --- removed rows ----------------------------------------------------------------------------------------


def removed(study: Study) -> tuple[list[Record], list[Record]]:
    """Attribute every removed pool row to the test image whose threshold it exceeds most.

    Returns:
        Per test image (test, uid, class_name, num_removed; only images with any) and per class.
    """
    per_image: list[Record] = []
    per_class: list[Record] = []
    for test in study.tests:
        queries, split = study.queries(test), study.gap_matched(test)
        if queries is None or split is None or not queries.has_reference:
            continue
        side = study.pool_side(test, _slack(study, test))
        counts = np.zeros(len(queries.row_ids), np.int64)
        order = np.argsort(queries.row_ids)
        counts[order[np.searchsorted(queries.row_ids, side.culprits, sorter=order)]] = side.removed
        classes = _class_names(study, test, queries)
        for i in np.argsort(-counts, kind="stable"):
            if counts[i]:
                row = {"test": test, "uid": queries.uids[i], "class_name": classes[i]}
                per_image.append({**row, "num_removed": int(counts[i])})
        for name in sorted(set(classes)):
            chosen = np.array([c == name for c in classes])
            count = int(counts[chosen].sum())
            per_class.append({"test": test, "class_name": name, "num_removed": count, "num_images": int(chosen.sum())})
    return per_image, per_class


def _class_names(study: Study, test: str, queries: Queries) -> list[str]:
    embeddings = study.embeddings(test)
    if embeddings is None:
        return [""] * len(queries.uids)
    metadata = embeddings.all_metadata(["uid", "class_name"])
    names = [name or "" for name in metadata.column("class_name").to_pylist()]
    at = positions(queries.uids, metadata.column("uid").to_pylist())
    return [names[i] if i >= 0 else "" for i in at]


def pool_histograms(study: Study) -> list[Record]:
    """Return pool rows by their similarity m to the nearest test image: `test, low, high, num_rows`; empty bins go."""
    records = []
    for test in study.tests:
        side = study.pool_side(test, _slack(study, test))
        for at in np.nonzero(side.nearest)[0].tolist():
            ends = {"low": float(pool_side.EDGES[at]), "high": float(pool_side.EDGES[at + 1])}
            records.append({"test": test, **ends, "num_rows": int(side.nearest[at])})
    return records


def _slack(study: Study, test: str) -> float:
    split = study.gap_matched(test)
    return float(study.recipes()[split].get("slack") or 0.0) if split is not None else 0.0


# --- exposure of groups ----------------------------------------------------------------------------------


def exposure(study: Study) -> list[Record]:
    """Return how much farther from the pool every group of a test set is than its base (counteranimal.md 7.3, item 1).

    Returns:
        Records `test, first` (the base), `second, difference` of the mean similarities with `low` and `high` (Welch's
        95 %), `auc` = P(similarity of a photo of the first group > of the second), 0.5 = equally close, `n_first`,
        `n_second`.
    """
    records = []
    for test in study.tests:
        queries, embeddings = study.queries(test), study.embeddings(test)
        if queries is None or embeddings is None:
            continue
        metadata = embeddings.all_metadata(["uid", "group"])
        at = positions(queries.uids, metadata.column("uid").to_pylist())
        names = np.array([g or "" for g in metadata.column("group").to_pylist()])[at]
        order = groups.of_test(study, test) or groups.ordered(names.tolist(), study.groups.get(test, ()))
        base, *others = order or ("",)
        for other in others:
            first, second = (queries.similarity[names == name] for name in (base, other))
            if not len(first) or not len(second):
                continue
            welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
            records.append(
                {
                    "test": test,
                    "first": base,
                    "second": other,
                    "difference": float(first.mean() - second.mean()),
                    "low": float(welch.low),
                    "high": float(welch.high),
                    "auc": float(stats.mannwhitneyu(first, second).statistic / (len(first) * len(second))),
                    "n_first": len(first),
                    "n_second": len(second),
                }
            )
    return records
