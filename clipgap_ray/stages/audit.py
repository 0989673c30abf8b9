"""Is a test set inside a pool? Duplicates, gap and coverage from embeddings alone: no training, no images, no Ray.

Reads: embeddings of a pool, of test sets, of a reference or thresholds files; predictions. Streams the pool part by
part, so memory holds one part and the test sets. Writes: OUT/audit.json, OUT/index.html, OUT/summary.json.
`Summary.extra["exit_code"]` is 4 when a `--fail-on` rule holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import __version__, rundir, schema, store
from clipgap_ray.config.audit import AuditSettings, parse_rule
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder, identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels.nearest import nearest
from clipgap_ray.reporting import contamination, figures, page
from clipgap_ray.reporting.similarity import histogram_records
from clipgap_ray.reporting.study import positions
from clipgap_ray.reporting.theme import data_uri, render

EXIT_FAILED_RULE = 4
DRAWS = 2000


@dataclass(frozen=True)
class Target:
    """A test set under audit: (n,) exact similarity and row id of its nearest pool row, bytes seen, thresholds."""

    name: str
    test: EmbeddingSet
    metadata: pa.Table
    similarity: np.ndarray
    nearest: np.ndarray
    exact: np.ndarray
    tau: np.ndarray | None


def run(settings: AuditSettings) -> rundir.Summary:
    """Audit test sets against a pool.

    Raises:
        IndexMismatchError: If anything was embedded by another encoder than the pool.
        DataError: If an input is missing or belongs to another test set.
    """
    started = time.monotonic()
    pool = EmbeddingSet.open(settings.pool)
    targets = _targets(settings, pool)
    coverage = _coverage(pool)
    recall = _recall(settings.recall)
    predictions = _per_test(settings.predictions, settings, "--predictions")
    results = [_audit_one(settings, pool, t, coverage, recall, predictions.get(t.name)) for t in targets]
    failed = _failed_rules(settings, results)
    report = {
        "version": __version__,
        "pool": {"uri": pool.uri, "digest": pool.digest, "encoder": pool.encoder},
        "coverage": coverage,
        "tests": results,
        "failed_rules": failed,
        "settings": settings.fingerprint(),
    }
    store.write_json(store.join(settings.out, "audit.json"), report)
    html = page.render_page("audit.html.j2", report=report, figure=_figure(targets))
    store.write_bytes(store.join(settings.out, "index.html"), html.encode())
    summary = rundir.Summary("audit", coverage["total"], coverage["examined"], dict(coverage["unexamined"]))
    summary.seconds = time.monotonic() - started
    verdicts = {result["test"]: result["verdict"] for result in results}
    code = EXIT_FAILED_RULE if failed else 0
    summary.extra.update(verdicts=verdicts, failed_rules=failed, exit_code=code)
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


# --- input -----------------------------------------------------------------------------------------------


def _targets(settings: AuditSettings, pool: EmbeddingSet) -> list[Target]:
    """Find every test row's nearest pool row, all test sets in one pass."""
    named = schema.named(settings.test, "--test")
    tests = {name: EmbeddingSet.open(uri) for name, uri in named.items()}
    for name, test in tests.items():
        check_same_encoder(pool.encoder, test.encoder, (f"pool {pool.uri}", f"test set {name}"))
    thresholds = _thresholds(settings, tests)
    rows = [test.all_images() for test in tests.values()]
    similarity, row_ids = nearest(np.concatenate(rows), _blocks(pool), 1)
    metadata = [test.all_metadata(["uid", "sha256", "image_path", "class_name"]) for test in tests.values()]
    seen = _exact(pool, metadata)
    ends = np.cumsum([len(block) for block in rows])[:-1]
    parts = zip(tests.items(), metadata, np.split(similarity[:, 0], ends), np.split(row_ids[:, 0], ends), strict=True)
    return [
        Target(name, test, table, s, ids, np.array([digest in seen for digest in table["sha256"].to_pylist()], bool),
               thresholds.get(name)) for (name, test), table, s, ids in parts
    ]  # fmt: skip


def _blocks(embeddings: EmbeddingSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in embeddings.parts:
        if part.num_rows:
            yield np.asarray(embeddings.images(part.number)), schema.row_ids(part.number, part.num_rows)


def _exact(pool: EmbeddingSet, metadata: list[pa.Table]) -> set[str]:
    """Return the image hashes of the test sets that occur in the pool."""
    wanted = pa.array(sorted({h for table in metadata for h in table["sha256"].to_pylist() if h}), pa.string())
    seen: set[str] = set()
    for part in pool.parts:
        column = pool.metadata(part.number, ["sha256"]).column("sha256")
        seen.update(column.filter(pc.is_in(column, wanted)).to_pylist())
    return seen - {None, ""}


def _thresholds(settings: AuditSettings, tests: dict[str, EmbeddingSet]) -> dict[str, np.ndarray]:
    if settings.reference:
        reference = EmbeddingSet.open(settings.reference)
        for name, test in tests.items():
            check_same_encoder(reference.encoder, test.encoder, (f"reference {reference.uri}", f"test set {name}"))
        return {name: nearest(test.all_images(), _blocks(reference), 1)[0][:, 0] for name, test in tests.items()}
    files = _per_test(settings.thresholds, settings, "--thresholds")
    return {name: _read_thresholds(uri, tests[name]) for name, uri in files.items()}


def _read_thresholds(uri: str, test: EmbeddingSet) -> np.ndarray:
    """Read (n,) tau in the order of the test set; marks in the file say which encoder and test set it is for."""
    table = store.read_table(uri)
    marks = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    expected = {"clipgap.encoder": store.digest(identity(test.encoder)), "clipgap.test": test.digest}
    for key, value in expected.items():
        if marks.get(key) != value:
            raise DataError(f"{uri}: {key} differs from that of {test.uri}", hint="make it with `clipgap score`")
    at = positions(test.all_metadata(["uid"])["uid"].to_pylist(), table["uid"].to_pylist())
    if (at < 0).any():
        raise DataError(f"{uri} lacks thresholds for {(at < 0).sum()} of {len(at)} images of {test.uri}")
    return table["tau"].to_numpy()[at]


def _per_test(words: tuple[str, ...], settings: AuditSettings, what: str) -> dict[str, str]:
    """Read FILE (for the only test set) or NAME=FILE words."""
    tests = list(schema.named(settings.test, "--test"))
    if len(words) == 1 and "=" not in words[0]:
        if len(tests) > 1:
            raise ConfigError(f"{what} {words[0]!r}: which of {tests} is it for?", hint=f"{what} {tests[0]}=FILE")
        return {tests[0]: words[0]}
    named = schema.named(words, what)
    unknown = sorted(set(named) - set(tests))
    if unknown:
        raise ConfigError(f"{what} names {unknown}, --test names {tests}")
    return named


def _recall(uri: str) -> dict[str, float] | None:
    if not uri:
        return None
    value = store.read_json(uri)
    if not isinstance(value, dict) or not {"recall", "similarity"} <= set(value):
        raise DataError(f'{uri} is no measured recall: expected {{"recall": r, "similarity": s}}')
    return {"recall": float(value["recall"]), "similarity": float(value["similarity"])}


def _coverage(pool: EmbeddingSet) -> dict[str, Any]:
    """N of M rows examined: what `embed` could not read, or was told to leave out, was not examined."""
    records = rundir.CommitLog(pool.uri).records.values()
    unexamined: dict[str, int] = {}
    for record in records:
        for reason, count in record.get("dropped", {}).items():
            unexamined[reason] = unexamined.get(reason, 0) + count
    partial_of = pool.manifest.get("partial") or {}
    only = [f"{k} {v}" for k, v in partial_of.items() if v is not None and not (k == "sample" and v == 1.0)]
    total = pool.num_rows + sum(unexamined.values())
    return {"examined": pool.num_rows, "total": total, "unexamined": unexamined, "embedded_only": only}


# --- one test set ----------------------------------------------------------------------------------------


def _audit_one(
    settings: AuditSettings,
    pool: EmbeddingSet,
    target: Target,
    coverage: dict[str, Any],
    recall: dict[str, float] | None,
    predictions: str | None,
) -> dict[str, Any]:
    found = contamination.duplicates(target.similarity, target.exact, settings.near, settings.duplicate)
    duplicated = target.exact | (target.similarity >= settings.duplicate)
    unexamined = coverage["total"] - coverage["examined"] + len(coverage["embedded_only"])
    gap = contamination.gap(target.similarity, target.tau)
    return {
        "test": target.name,
        "uri": target.test.uri,
        "digest": target.test.digest,
        "num_images": len(target.similarity),
        "verdict": contamination.verdict(found["duplicated"]["count"], settings.duplicate, unexamined, recall),
        "dup_rate": found["duplicated"]["rate"],
        "exact_rate": found["exact"]["rate"],
        "closer_rate": gap["closer_to_pool"] and gap["closer_to_pool"]["rate"],
        "duplicates": found,
        "gap": gap,
        "accuracy": _accuracy(predictions, target, duplicated),
        "pairs": _pairs(pool, target, settings.pairs),
    }


def _accuracy(path: str | None, target: Target, duplicated: np.ndarray) -> dict[str, Any] | None:
    if path is None:
        return None
    table = store.read_table(path, ["uid", "correct"])
    at = positions(table["uid"].to_pylist(), target.metadata["uid"].to_pylist())
    if (at < 0).all():
        raise DataError(f"{path} holds predictions of another test set than {target.name}: no uid in common")
    correct = table["correct"].to_numpy(zero_copy_only=False).astype(bool)[at >= 0]
    return contamination.clean_accuracy(correct, duplicated[at[at >= 0]], DRAWS, np.random.default_rng(0))


def _pairs(pool: EmbeddingSet, target: Target, count: int) -> list[dict[str, Any]]:
    """The closest pairs of test image and pool image, with what is known of the pool image."""
    chosen = np.argsort(-target.similarity, kind="stable")[:count]
    chosen = chosen[target.nearest[chosen] >= 0]
    parts, rows = schema.split_row_ids(target.nearest[chosen])
    columns = ["uid", "shard", "image_path", "url", "caption"]
    loaded = {part: pool.metadata(int(part), columns) for part in np.unique(parts)}
    pairs = []
    for i, part, row in zip(chosen, parts, rows, strict=True):
        known = loaded[part].slice(int(row), 1).to_pylist()[0]
        pairs.append(
            {
                "similarity": float(target.similarity[i]),
                "same_bytes": bool(target.exact[i]),
                "test_uid": target.metadata["uid"][int(i)].as_py(),
                "test_key": target.metadata["image_path"][int(i)].as_py(),
                **{f"pool_{key.replace('image_path', 'key')}": value for key, value in known.items()},
            }
        )
    return pairs


def _failed_rules(settings: AuditSettings, results: list[dict[str, Any]]) -> list[str]:
    failed = []
    for text in settings.fail_on:
        metric, sign, limit = parse_rule(text)
        for result in results:
            value = result[metric]
            if value is None:
                raise ConfigError(f"--fail-on {text!r} needs --reference or --thresholds")
            if value > limit or (sign == ">=" and value == limit):
                failed.append(f"{result['test']}: {metric} is {value:.6g}, rule {text}")
    return failed


def _figure(targets: list[Target]) -> dict[str, str]:
    """Histograms of the gap as data addresses, light and dark."""
    records = histogram_records({t.name: (t.similarity, t.tau) for t in targets})
    files = render(partial(figures.similarity_histograms, records, []))
    return {theme: data_uri(files[f"{theme}.svg"], "image/svg+xml") for theme in ("light", "dark")}
