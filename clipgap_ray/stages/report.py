"""A study's directory in, one page out. Reads what other stages wrote; needs no GPU, and Ray for large pools only.

Reads: study.json, embed/, dedup/keep, scores/, splits/*.recipe.json, gaps/, runs/*/metrics.jsonl, eval/.
Writes: OUT/index.html (self-contained), OUT/figures/*.svg and *.png, OUT/tables/*.csv and *.parquet,
OUT/manifest.json (digests of all inputs and files). Unit of restart: the whole page; it takes seconds.
On failure: what is missing is named in the page; only a directory that is no study is an error.
"""

from __future__ import annotations

import json
import time
from typing import Any

from clipgap_ray import __version__, rundir, store
from clipgap_ray.config.report import ReportSettings, group_orders
from clipgap_ray.errors import BudgetError, ConfigError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.reporting import conclusions, galleries, layout, page, sections
from clipgap_ray.reporting.numbers import Numbers, compute
from clipgap_ray.reporting.pool_side import PoolSide
from clipgap_ray.reporting.study import Study


def run(settings: ReportSettings) -> rundir.Summary:
    """Write the report of a study.

    Returns:
        A summary whose `extra` names the page, its bytes, and the sections that could not be shown.

    Raises:
        DataError: If the directory is no study, or a file in it is not what it should be.
        ConfigError: If a rule of --hide names no column of the pool, or --groups a test set or group that is not there.
        BudgetError: If the page would be larger than 20 MB.
    """
    started = time.monotonic()
    study = Study.open(settings.study)
    study.count_pool = _count_pool
    study.groups |= _group_orders(settings, study)
    hidden = read_hidden(settings.blocklist, settings.hide, galleries.rule_columns(study.embeddings("pool")))
    out = settings.out or study.path("report")
    numbers = compute(study, settings.bin_width, settings.draws, settings.seed)
    pictures = galleries.Thumbnails(study.embeddings, hidden, settings.images)
    built = sections.build(study, numbers, pictures, settings.gallery_rows)
    images, hashes = page.write_figures(out, built)
    hashes |= page.write_tables(out, numbers.exports(), numbers.digests)
    html = page.render_page(
        "report.html.j2",
        study=study,
        subtitle=_subtitle(study, numbers),
        sections=built,
        images=images,
        planted_sentence=conclusions.on_planted(numbers.planted),
        provenance_tables=_provenance(study, numbers),
        settings=json.dumps({"study": study.info.get("settings", {}), "report": settings.fingerprint()}, indent=2),
    ).encode()
    if len(html) > page.LARGEST_BYTES:
        raise BudgetError(
            f"the page would have {len(html) / 2**20:.1f} MB, more than 20 MB",
            hint="use a smaller --gallery-rows, or --no-images",
        )
    store.write_bytes(store.join(out, "index.html"), html)
    manifest = {
        "stage": "report",
        "version": __version__,
        "settings": settings.fingerprint(),
        "inputs": numbers.digests,
        "files": {"index.html": store.sha256(html), **hashes},
    }
    store.write_json(store.join(out, "manifest.json"), manifest)
    summary = rundir.Summary("report", read=len(study.runs), kept=len(study.runs), seconds=time.monotonic() - started)
    missing = {section.anchor: section.missing for section in built if section.missing}
    summary.extra.update(page=store.join(out, "index.html"), page_bytes=len(html), missing=missing)
    store.write_json(store.join(out, "summary.json"), summary.as_dict())
    return summary


def _group_orders(settings: ReportSettings, study: Study) -> dict[str, tuple[str, ...]]:
    """The order of groups that the settings ask for."""
    found = group_orders(settings.groups)
    unknown = sorted(set(found) - set(study.tests))
    if unknown:
        raise ConfigError(f"--groups names {unknown[0]!r}; the study's test sets are {study.tests}")
    return found


def _count_pool(folder: str, slack: float) -> PoolSide:
    """Count a large pool's scores on the cluster; Ray is imported only then."""
    from clipgap_ray.stages import pool_side

    return pool_side.count(folder, slack)


def _subtitle(study: Study, numbers: Numbers) -> str:
    pool = study.embeddings("pool")
    metric = study.info.get("metric", {})
    parts = [
        f"Study {study.name}",
        f"{pool.num_rows:,} pool images" if pool is not None else "no pool embeddings",
        f"{len(study.tests)} test sets",
        f"{len(study.runs)} models" + (f", {conclusions.seeds(numbers.accuracy)}" if numbers.accuracy else ""),
    ]
    if metric:
        parts.append(f"similarity by {metric.get('model')} ({str(metric.get('pretrained')).rsplit('/', 1)[-1]})")
    return " · ".join(parts)


def _provenance(study: Study, numbers: Numbers) -> list[layout.Table]:
    """Planted truth, encoder, runs and digests."""
    result = []
    if numbers.planted:
        rows: list[list[Any]] = [
            [r["what"], r["test"] or "–", f"{r['planted']:,}", f"{r['found']:,}",
             "–" if r["not_planted"] is None else f"{r['not_planted']:,}"] for r in numbers.planted
        ]  # fmt: skip
        headers = ["planted", "test set", "planted", "found", "found, not planted"]
        result.append(layout.Table(headers, rows, "Planted truth"))
    pool = study.embeddings("pool")
    if pool is not None:
        encoder = [[key, str(value)] for key, value in pool.encoder.items()]
        result.append(layout.Table(["field", "value"], encoder, "Encoder of the similarities"))
    runs = [[r.name, r.split, r.objective, r.train_on, r.model, str(r.seed), f"{r.num_samples_seen:,}"]
            for r in study.runs]  # fmt: skip
    headers = ["run", "split", "objective", "trained on", "model", "seed", "samples seen"]
    result.append(layout.Table(headers, runs, "Runs"))
    digests = [[d["artefact"], d["digest"][:16]] for d in numbers.digests]
    result.append(layout.Table(["artefact", "sha256 (first 16)"], digests, "Digests of the inputs"))
    return result
