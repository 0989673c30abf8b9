"""Is a test set inside a pool? Duplicates, gap and coverage from embeddings alone: no training.

Reads: embeddings of a pool, of test sets, of a reference or thresholds files; predictions; for the positive control and
the pictures the images, by byte range. Writes: OUT/audit.json, OUT/index.html (self-contained), OUT/tests.csv,
OUT/pairs.csv, OUT/summary.json. `Summary.extra["exit_code"]` is 4 when a `--fail-on` rule holds.

The pool is looked through part by part, by Ray tasks from half a million rows on (`audit_pass`); memory holds the test
sets and, per task, one part. Unit of restart: the command.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clipgap_ray import __version__, rundir, schema, store
from clipgap_ray.config.audit import AuditSettings, parse_rule
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import BudgetError, ClipgapError, ConfigError, DataError
from clipgap_ray.hidden import Hidden, read_hidden
from clipgap_ray.kernels.nearest_exact import nearest
from clipgap_ray.reporting import contamination, figures, galleries, page
from clipgap_ray.reporting.similarity import histogram_records
from clipgap_ray.reporting.study import positions
from clipgap_ray.reporting.theme import data_uri, render
from clipgap_ray.stages import audit_pool
from clipgap_ray.stages.audit_pool import Target
from clipgap_ray.stages.canaries import Canaries, Laboratory

EXIT_FAILED_RULE = 4
DRAWS = 2000
OTHERS = 16  # nearest other test images looked at: more equal copies of one image than this hide its neighbour


@dataclass(frozen=True)
class Controls:
    """Positive controls by test set, a recall from elsewhere, or why there is neither."""

    canaries: dict[str, Canaries]
    given: dict[str, float] | None
    why_not: dict[str, str]


def run(settings: AuditSettings) -> rundir.Summary:
    """Audit test sets against a pool.

    Raises:
        IndexMismatchError: If anything was embedded by another encoder than the pool.
        DataError: If an input is missing or belongs to another test set.
        BudgetError: If the page would be larger than 20 MB.
    """
    started = time.monotonic()
    pool = EmbeddingSet.open(settings.pool)
    hidden = read_hidden(settings.blocklist, settings.hide, galleries.rule_columns(pool))
    predictions = audit_pool.per_test(settings.predictions, settings, "--predictions")
    targets = audit_pool.targets(settings, pool)
    coverage = _coverage(pool)
    controls = _controls(settings, pool, targets)
    results = [_audit_one(settings, pool, t, coverage, controls, predictions.get(t.name)) for t in targets]
    failed = _failed_rules(settings, results)
    report = {
        "version": __version__,
        "pool": {"uri": pool.uri, "digest": pool.digest, "encoder": pool.encoder},
        "coverage": coverage,
        "tests": results,
        "failed_rules": failed,
        "inputs": _inputs(settings, predictions),
        "settings": settings.fingerprint(),
    }
    store.write_json(store.join(settings.out, "audit.json"), report)
    store.write_bytes(store.join(settings.out, "tests.csv"), page.csv_bytes([_flat(result) for result in results]))
    pairs = [{"test": result["test"], **pair} for result in results for pair in result["pairs"]]
    if pairs:
        store.write_bytes(store.join(settings.out, "pairs.csv"), page.csv_bytes(pairs))
    _write_page(settings, pool, targets, report, hidden)
    summary = rundir.Summary("audit", coverage["total"], coverage["examined"], dict(coverage["unexamined"]))
    summary.seconds = time.monotonic() - started
    verdicts = {result["test"]: result["verdict"] for result in results}
    code = EXIT_FAILED_RULE if failed else 0
    summary.extra.update(verdicts=verdicts, failed_rules=failed, exit_code=code)
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


def _inputs(settings: AuditSettings, predictions: dict[str, str]) -> dict[str, str]:
    """Name what was read beside pool and test sets by its content: reference, thresholds, predictions, lists."""
    files = [*audit_pool.per_test(settings.thresholds, settings, "--thresholds").values(), *predictions.values()]
    files += filter(None, (settings.recall, settings.blocklist))
    found = {path: store.sha256(store.read_bytes(path)) for path in files}
    return found | ({settings.reference: EmbeddingSet.open(settings.reference).digest} if settings.reference else {})


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """One line per test set for tests.csv: rates with their intervals; None where something is not known."""
    line = {key: result[key] for key in ("test", "verdict", "num_images")}
    found, captions, gap = result["duplicates"], result["captions"] or {}, result["gap"]
    rates = {
        "exact": found["exact"],
        **{f"near_{item['similarity']:g}": item for item in found["near"]},
        "hash": found["hash"],
        "duplicated": found["duplicated"],
        "caption_exact": captions.get("exact"),
        "caption_normalised": captions.get("normalised"),
        "closer_to_pool": gap["closer_to_pool"],
    }
    for name, item in rates.items():
        line |= {f"{name}_{key}": item and item[key] for key in ("count", "rate", "low", "high")}
    for side in ("pool", "reference"):
        line |= {f"{side}_similarity_p{p}": (gap[side] or {}).get(p) for p in gap["pool"]}
    for name in ("whole", "clean", "duplicated"):
        part = (result["accuracy"] or {}).get(name)
        line |= {f"accuracy_{name}_{key}": part and part[key] for key in ("num_images", "rate", "low", "high")}
    control = result["control"] or {}
    line["whole_minus_clean_pp"] = (result["accuracy"] or {}).get("whole_minus_clean_pp")
    return line | {"recall": control.get("recall"), **{f"unknown_{k}": v for k, v in result["unknown"].items()}}


# --- coverage and control --------------------------------------------------------------------------------


def _coverage(rows: EmbeddingSet) -> dict[str, Any]:
    """N of M rows examined: what `embed` could not read, or was told to leave out, was not examined."""
    records = rundir.CommitLog(rows.uri).records.values()
    unexamined: dict[str, int] = {}
    for record in records:
        for reason, count in record.get("dropped", {}).items():
            unexamined[reason] = unexamined.get(reason, 0) + count
    partial_of = rows.manifest.get("partial") or {}
    only = [f"{k} {v}" for k, v in partial_of.items() if v is not None and not (k == "sample" and v == 1.0)]
    total = rows.num_rows + sum(unexamined.values())
    return {"examined": rows.num_rows, "total": total, "unexamined": unexamined, "embedded_only": only}


def _num_unexamined(coverage: dict[str, Any]) -> int:
    """Rows that were not looked at, at least: a share that was never embedded counts as one more."""
    return int(coverage["total"] - coverage["examined"] + len(coverage["embedded_only"]))


def _controls(settings: AuditSettings, pool: EmbeddingSet, targets: list[Target]) -> Controls:
    """Make canaries of every test set; an audit without images or weights goes on and says so."""
    if settings.recall:
        return Controls({}, _recall(settings.recall), {})
    names = [target.name for target in targets]
    if not settings.canaries:
        return Controls({}, None, dict.fromkeys(names, "left out (--canaries 0)"))
    try:
        laboratory = Laboratory(pool.encoder, settings.pretrained, settings.device)
    except ClipgapError as error:
        if settings.pretrained:
            raise
        return Controls({}, None, dict.fromkeys(names, str(error)))
    made, why_not = {}, {}
    for target in targets:
        try:
            made[target.name] = laboratory.make(target.test, settings.canaries, np.random.default_rng(settings.seed))
        except DataError as error:
            why_not[target.name] = str(error)
    return Controls(made, None, why_not)


def _recall(uri: str) -> dict[str, float]:
    value = store.read_json(uri)
    if not isinstance(value, dict) or not {"recall", "similarity"} <= set(value):
        raise DataError(f'{uri} is no measured recall: expected {{"recall": r, "similarity": s}}')
    return {"recall": float(value["recall"]), "similarity": float(value["similarity"])}


def _to_others(target: Target) -> np.ndarray:
    """(m,) float64 similarity of every test image to the nearest other one of other bytes."""
    rows = target.test.all_images()
    similarities, at = nearest(rows, iter([(rows, np.arange(len(rows)))]), min(OTHERS, len(rows)))
    digests = np.array([digest or str(i) for i, digest in enumerate(target.metadata["sha256"].to_pylist())])
    other = (at >= 0) & (digests[at] != digests[:, None])
    return np.asarray(np.where(other, similarities, -np.inf).max(axis=1))


# --- one test set ----------------------------------------------------------------------------------------


def _audit_one(
    settings: AuditSettings,
    pool: EmbeddingSet,
    target: Target,
    coverage: dict[str, Any],
    controls: Controls,
    predictions: str | None,
) -> dict[str, Any]:
    limits = (settings.duplicate, settings.hash_bits)
    found = contamination.duplicates(target.similarity, target.exact, target.bits, settings.near, *limits)
    # A copy found is a copy, but none found among rows of unknown bytes or hash is no rate of 0.
    found["exact"] = found["exact"] if target.bytes_known else None
    found["hash"] = found["hash"] if target.hashes_known else None
    duplicated = contamination.duplicated(target.similarity, target.exact, target.bits, *limits)
    own_coverage = _coverage(target.test)
    unexamined = _num_unexamined(coverage) + _num_unexamined(own_coverage)
    gap = contamination.gap(target.similarity, target.tau)
    canaries = controls.canaries.get(target.name)
    control = None
    if canaries is not None:
        bits = canaries.bits if target.hashes_known else None
        control = contamination.control(canaries.similarity, bits, _to_others(target), settings.near, *limits)
    captions = _caption_counts(target)
    return {
        "test": target.name,
        "uri": target.test.uri,
        "digest": target.test.digest,
        "num_images": len(target.similarity),
        "coverage": own_coverage,
        "verdict": contamination.verdict(
            found["duplicated"]["count"], settings.duplicate, unexamined, control or controls.given
        ),
        "dup_rate": found["duplicated"]["rate"],
        "exact_rate": found["exact"] and found["exact"]["rate"],
        "hash_rate": found["hash"] and found["hash"]["rate"],
        "caption_rate": captions and captions["normalised"]["rate"],
        "closer_rate": gap["closer_to_pool"] and gap["closer_to_pool"]["rate"],
        "duplicates": found,
        "unknown": target.unknown,
        "control": control,
        "why_no_control": controls.why_not.get(target.name, ""),
        "captions": captions,
        "gap": gap,
        "accuracy": _accuracy(predictions, target, duplicated, settings.seed),
        "pairs": _pairs(pool, target, settings.pairs),
    }


def _caption_counts(target: Target) -> dict[str, Any] | None:
    own = target.captions
    if own is None:
        return None
    kinds = {"exact": own.exact, "normalised": own.normalised}
    return {"num_captions": int(own.own.sum()), **{k: contamination.rate(v[own.own]) for k, v in kinds.items()}}


def _accuracy(path: str | None, target: Target, duplicated: np.ndarray, seed: int) -> dict[str, Any] | None:
    if path is None:
        return None
    table = store.read_table(path, ["uid", "correct"])
    at = positions(table["uid"].to_pylist(), target.metadata["uid"].to_pylist())
    if (at < 0).all():
        raise DataError(f"{path} holds predictions of another test set than {target.name}: no uid in common")
    correct = table["correct"].to_numpy(zero_copy_only=False).astype(bool)[at >= 0]
    return contamination.clean_accuracy(correct, duplicated[at[at >= 0]], DRAWS, np.random.default_rng(seed))


def _pairs(pool: EmbeddingSet, target: Target, count: int) -> list[dict[str, Any]]:
    """The closest pairs of test image and pool image: by similarity, then those that only the hash found."""
    chosen = np.argsort(-target.similarity, kind="stable")[:count]
    pairs = [(int(i), int(target.nearest[i]), "similarity") for i in chosen if target.nearest[i] >= 0]
    if target.bits is not None:
        by_hash = np.argsort(target.bits, kind="stable")[:count]
        known = {(i, row) for i, row, _ in pairs}
        more = [(int(i), int(target.hash_nearest[i])) for i in by_hash if target.bits[i] < 64]
        pairs += [(i, row, "hash") for i, row in more if (i, row) not in known and target.bits[i] <= 4]
    columns = ["uid", "row_id", "shard", "image_path", "url", "caption"]
    parts = np.unique([row >> 32 for _, row, _ in pairs]).astype(int).tolist()
    loaded = {part: pool.metadata(part, columns) for part in parts}
    records = []
    for i, row, found_by in pairs:
        known_facts = loaded[row >> 32].slice(row & 0xFFFFFFFF, 1).to_pylist()[0]
        records.append(
            {
                "found_by": found_by,
                "similarity": float(target.similarity[i]) if found_by == "similarity" else _similarity(pool, target, i),
                "hash_bits": int(target.bits[i]) if target.bits is not None and row == target.hash_nearest[i] else None,
                "same_bytes": bool(target.exact[i]),
                "test_uid": target.metadata["uid"][i].as_py(),
                "test_key": target.metadata["image_path"][i].as_py(),
                "test_row_id": target.metadata["row_id"][i].as_py(),
                **{f"pool_{key.replace('image_path', 'key')}": value for key, value in known_facts.items()},
            }
        )
    return records


def _similarity(pool: EmbeddingSet, target: Target, i: int) -> float:
    """Similarity of a test image to the pool row that its hash found."""
    part, row = (int(side[0]) for side in schema.split_row_ids(target.hash_nearest[[i]]))
    own = target.test.all_images()[i].astype(np.float64)
    return float(own @ np.asarray(pool.images(part)[row], np.float64))


def _failed_rules(settings: AuditSettings, results: list[dict[str, Any]]) -> list[str]:
    needs = {
        "closer_rate": "needs --reference or --thresholds",
        "exact_rate": "needs the sha256 of all images: embed pool and test set from images",
        "hash_rate": "needs perceptual hashes of all images: embed them from images (and --hash-bits >= 0)",
        "caption_rate": "needs a test set with captions of its own",
    }
    failed = []
    for text in settings.fail_on:
        metric, sign, limit = parse_rule(text)
        for result in results:
            value = result[metric]
            if value is None:
                lacking = {what: count for what, count in result["unknown"].items() if count}
                raise ConfigError(
                    f"--fail-on {text!r} for {result['test']} {needs[metric]}"
                    + (f" (without: {lacking})" if lacking and metric in ("exact_rate", "hash_rate") else "")
                )
            if value > limit or (sign == ">=" and value == limit):
                failed.append(f"{result['test']}: {metric} is {value:.6g}, rule {text}")
    return failed


# --- page ------------------------------------------------------------------------------------------------


def _write_page(
    settings: AuditSettings, pool: EmbeddingSet, targets: list[Target], report: dict[str, Any], hidden: Hidden
) -> None:
    found = {"pool": pool, **{f"test:{target.name}": target.test for target in targets}}
    pictures = galleries.Thumbnails(found.get, hidden, settings.images)
    strips = {result["test"]: [_strip(pictures, result["test"], pair) for pair in result["pairs"]]
              for result in report["tests"]}  # fmt: skip
    html = page.render_page(
        "audit.html.j2", report=report, figure=_figure(targets), strips=strips, images=settings.images
    ).encode()
    if len(html) > page.LARGEST_BYTES:
        raise BudgetError(
            f"the page would have {len(html) / 2**20:.1f} MB, more than 20 MB",
            hint="use a smaller --pairs, or --no-images",
        )
    store.write_bytes(store.join(settings.out, "index.html"), html)


def _strip(pictures: galleries.Thumbnails, test: str, pair: dict[str, Any]) -> galleries.Strip:
    """A test image and the pool image beside it; the captions of hidden samples stay hidden as well."""
    ours = galleries.tile("test image", pictures.by_row_id(f"test:{test}", pair["test_row_id"]), None)
    theirs = galleries.tile("pool image", pictures.by_row_id("pool", pair["pool_row_id"]), pair["similarity"])
    return galleries.Strip(pair["test_uid"], [ours, theirs])


def _figure(targets: list[Target]) -> dict[str, str]:
    """Histograms of the gap as data addresses, light and dark."""
    records = histogram_records({t.name: (t.similarity, t.tau) for t in targets})
    files = render(partial(figures.similarity_histograms, records, []))
    return {theme: data_uri(files[f"{theme}.svg"], "image/svg+xml") for theme in ("light", "dark")}
