"""Numbers of the join for tables and for the study's report (counteranimal.md 7.3)."""

from __future__ import annotations

import numpy as np
import threadpoolctl

from clipgap_ray.kernels import decomposition, overlap
from clipgap_ray.reporting import groups, tables
from clipgap_ray.reporting.study import Study, positions
from clipgap_ray.reporting.tables import Record

MAX_DRAWS = 200  # each is a regression; the report has a model per row


def flat(result: Record) -> Record:
    """Return one line per model: what `decomposition.summarise` nests. The matched accuracies make the axes of a
    similarity-adjusted effective robustness (7.3, item 7): `clipgap robustness --x matched_common ...`."""
    parts, matched = result["decomposition"] or {}, result["matched"]
    first, second = result["groups"]
    line: Record = {key: result[key] for key in ("model", "test", "arm", "split", "supervised") if key in result}
    line |= {
        f"{first}_n": result["num_images"][first],
        f"{second}_n": result["num_images"][second],
        first: result["balanced"][first],
        second: result["balanced"][second],
        "drop_pp": result["drop"]["drop_pp"],
        "drop_low_pp": result["drop"]["interval_pp"][0],
        "drop_high_pp": result["drop"]["interval_pp"][1],
        "identified": result["identified"],
    }
    for name in ("explained", "residual"):
        low, high = parts.get(f"{name}_interval_pp") or (None, None)
        line |= {f"{name}_pp": parts.get(f"{name}_pp"), f"{name}_low_pp": low, f"{name}_high_pp": high}
    line |= {
        "share": parts.get("share"),
        "fit_error_pp": parts.get("fit_error_pp"),
        "difference": result["exposure"]["difference"],
        "difference_low": result["exposure"]["interval"][0],
        "difference_high": result["exposure"]["interval"][1],
        "auc": result["exposure"]["auc"],
        "overlap": result["overlap"]["smallest"],
        "num_pairs": matched["num_pairs"],
        "matched_drop_pp": matched["drop_pp"],
        f"matched_{first}": matched["balanced"] and matched["balanced"][first],
        f"matched_{second}": matched["balanced"] and matched["balanced"][second],
        "binned_explained_pp": result["binned"]["explained_pp"],
        "binned_residual_pp": result["binned"]["residual_pp"],
    }
    return line


def neighbour_lines(model: str, own: Record) -> list[Record]:
    """Return a line per group and regime of what a join says of one model's neighbours."""
    return [
        {"model": model, "group": group["group"], "k": own["k"], "far": own["far"],
         **{key: group[key] for key in ("names_class", "same_background", "names_wrong")}, **regime}
        for group in own["groups"] for regime in group["regimes"]
    ]  # fmt: skip


def parts_lines(model: str, own: Record) -> list[Record]:
    """Return a line per part of photos cut apart."""
    result = []
    for record in own["parts"]:
        split = record["decomposition"] or {}
        line: Record = {"model": model, "part": record["part"], "num_images": own["num_images"],
                        "drop_pp": own["drop_pp"], "difference": record["exposure"]["difference"]}  # fmt: skip
        line["difference_low"], line["difference_high"] = record["exposure"]["interval"]
        line |= {"auc": record["exposure"]["auc"], "correlation_with_whole": record["correlation_with_whole"]}
        for name in ("explained", "residual"):
            low, high = split.get(f"{name}_interval_pp") or (None, None)
            line |= {f"{name}_pp": split.get(f"{name}_pp"), f"{name}_low_pp": low, f"{name}_high_pp": high}
        result.append(line | {"share": split.get("share"), "why_not": record["why_not"]})
    return result


def joins(study: Study, draws: int, seed: int) -> list[Record]:
    """Split the drop of every arm on every grouped test set (`groups.compared`), against its own training set.

    A model of the pool is joined with the similarity to the pool, one of a cut with what the cut left, one of pool and
    reference with the larger of both, one of the reference alone with tau. Seeds are averaged per photo.
    """
    records = []
    for test in study.tests:
        for arm in tables.arms(study):
            found = _photos(study, arm, test)
            if found is None:
                continue
            with threadpoolctl.threadpool_limits(1):
                result = decomposition.summarise(found, np.random.default_rng(seed), min(draws, MAX_DRAWS))
            about = {"test": test, "arm": arm.label, "split": arm.split, "supervised": arm.supervised}
            records.append({**about, "num_samples_seen": arm.num_samples_seen, **result})
    return records


def _photos(study: Study, arm: tables.Arm, test: str) -> overlap.Photos | None:
    outcome = tables.correct(study, arm, test)
    if outcome is None:
        return None
    right, uids = outcome
    pair = groups.compared(study, test)
    first = next(p for run in arm.runs if (p := study.predictions(run.name, test)) is not None)
    if pair is None or not set(pair) <= set(first.groups):
        return None
    similarity = _similarity(study, arm, test)
    if similarity is None:
        return None
    own, values = similarity
    at, there = positions(uids, own), positions(uids, first.uids)
    kept = np.nonzero((at >= 0) & (there >= 0))[0]
    finite = kept[np.isfinite(values[at[kept]])]
    try:
        photos, _, _ = overlap.take(
            [first.classes[i] for i in there[finite]],
            [first.groups[i] for i in there[finite]],
            right.mean(axis=0)[finite],
            values[at[finite]],
            pair,
        )
    except ValueError:
        return None
    return photos


def _similarity(study: Study, arm: tables.Arm, test: str) -> tuple[list[str], np.ndarray] | None:
    """Uids and (n,) float64 similarity of a test set to what an arm was trained on; None where it was not measured."""
    queries = study.queries(test)
    if queries is None:
        return None
    if arm.train_on == "reference":
        return (queries.uids, queries.tau) if queries.has_reference else None
    if arm.split != study.base_split:
        table = study.gaps(arm.split, test)
        if table is None:
            return None
        column = "gap" if arm.train_on == "pool+reference" else "similarity"
        return table.column("uid").to_pylist(), table.column(column).to_numpy()
    if arm.train_on == "pool+reference":
        return (queries.uids, np.fmax(queries.similarity, queries.tau)) if queries.has_reference else None
    return queries.uids, queries.similarity
