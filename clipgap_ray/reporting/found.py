"""Numbers that other commands left in a study's directory: duplicates, two encoders, neighbours, chosen groups.

    dedup/summary.json, gaps/diagnostics.json     duplicates, at the thresholds of `dedup --also` and `gaps`
    agreement/agreement.json                      `clipgap agreement --out STUDY/agreement`
    join/join.json                                `clipgap join --pool ... --out STUDY/join`
    discover/discover.json                        `clipgap discover --out STUDY/discover`

The last three may also lie one folder deeper, one per test set or pair of encoders. Nothing is shown where nothing is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipgap_ray.kernels import intervals
from clipgap_ray.reporting import joined
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record

POOL, CUT, REFERENCE = "pool", "after the cut", "reference"


def duplicates(study: Study) -> list[Record]:
    """Return the share of test images with a duplicate: in the pool, in its cut, in the reference.

    Returns:
        Records `test, where, split, by, similarity, num_images, rate, low, high` (Wilson over test images). `by` is
        sha256 (equal bytes; `similarity` is None) or similarity (an image at least so similar).
    """
    found = {(record["split"], record["test"]): record for record in study.diagnostics()}
    records = []
    for test in study.tests:
        for where, split in ((POOL, "pool"), (CUT, study.gap_matched(test)), (REFERENCE, "reference")):
            own = found.get((split, test), {})
            rates: dict[float | None, float] = {float(at): rate for at, rate in own.get("duplicate_rate", {}).items()}
            if own.get("same_bytes_rate") is not None:
                rates[None] = own["same_bytes_rate"]
            for similarity, rate in rates.items():
                count = int(own["num_images"])
                low, high = intervals.wilson(np.array(round(rate * count)), np.array(count))
                records.append(
                    {"test": test, "where": where, "split": split, "by": "sha256" if similarity is None else
                     "similarity", "similarity": similarity, "num_images": count, "rate": float(rate),
                     "low": float(low), "high": float(high)}
                )  # fmt: skip
    return records


def removed_duplicates(study: Study) -> list[Record]:
    """Return pool rows at every threshold of the deduplication: `min_similarity, rows, kept, sha256, near`."""
    thresholds: dict[str, Any] = (study.summary("dedup") or {}).get("thresholds", {})
    return [
        {"min_similarity": float(at), "rows": one["kept"] + sum(one["dropped"].values()), "kept": one["kept"],
         "sha256": one["dropped"].get("sha256", 0), "near": one["dropped"].get("similarity", 0)}
        for at, one in thresholds.items()
    ]  # fmt: skip


def agreements(study: Study) -> list[Record]:
    """Return what two encoders agree on, one record per pair, test set and cut; ranks are repeated per cut."""
    records = []
    for name, result in study.results("agreement", "agreement.json").items():
        encoders = [encoder_name(side["encoder"]) for side in result["scores"]]
        if encoders[0] == encoders[1]:  # one architecture, other weights: the folders tell them apart
            encoders = [str(side["uri"]).rstrip("/").rsplit("/", 1)[-1] for side in result["scores"]]
        for test in result["tests"]:
            ranks = {key: value for key, value in test.items() if key != "pruned"}
            about = {"pair": name, "first": encoders[0], "second": encoders[1], "common_uids": result["uids"]["common"]}
            records += [{**about, **ranks, **cut} for cut in test["pruned"]]
    return records


def encoder_name(encoder: dict[str, Any]) -> str:
    """Name an encoder by its model and the last part of its weights."""
    weights = str(encoder.get("pretrained") or "").rstrip("/").rsplit("/", 1)[-1]
    return str(encoder.get("model", "?")) + (f" ({weights})" if weights else "")


def joins(study: Study) -> dict[str, Record]:
    """Return the joins that say more than the report itself computes, by name: of neighbours, backgrounds, photos cut
    apart, or robustness at equal similarity."""
    return {
        name: result
        for name, result in study.results("join", "join.json").items()
        if "adjusted_robustness" in result
        or any(own.get("neighbours") or own.get("similarity_parts") for own in result["models"].values())
    }


def selections(study: Study) -> dict[str, Record]:
    """Return the results of `discover` by name."""
    return study.results("discover", "discover.json")


def chosen(study: Study) -> dict[str, list[Record]]:
    """Return what joins and chosen groups say as tables, by file name; `folder` tells several of a kind apart."""
    tables: dict[str, list[Record]] = {}

    def add(table: str, folder: str, lines: list[Record]) -> None:
        tables.setdefault(table, []).extend({"folder": folder, **line} for line in lines)

    for folder, result in joins(study).items():
        for model, own in result["models"].items():
            if own.get("neighbours"):
                add("pool_neighbours", folder, joined.neighbour_lines(model, own["neighbours"]))
            if own.get("prevalence"):
                about = {key: value for key, value in own["prevalence"].items() if key != "classes"}
                low, high = about.pop("interval", None) or (None, None)
                more = about.pop("first_more_common", None) or {}
                ends = {"spearman_low": low, "spearman_high": high}
                line = {"model": model, **about, **ends, **{f"first_more_common_{k}": v for k, v in more.items()}}
                add("background_prevalence", folder, [line])
                classes = own["prevalence"]["classes"]
                add("background_prevalence_per_class", folder, [{"model": model, **line} for line in classes])
            if own.get("similarity_parts"):
                add("similarity_parts", folder, joined.parts_lines(model, own["similarity_parts"]))
        if "adjusted_robustness" in result:
            add("adjusted_robustness", folder, result["adjusted_robustness"]["models"])
    for folder, result in selections(study).items():
        for model, own in result["models"].items():
            low, high = own["held_out_interval_pp"]
            flat = {key: value for key, value in own.items() if key != "held_out_interval_pp"}
            add("group_selection", folder, [{"model": model, **flat, "held_out_low_pp": low, "held_out_high_pp": high}])
        add("group_selection_matrix", folder, result["matrix"])
        add("group_selection_per_class", folder, [{"discovered_by": result["by"], **c} for c in result["classes"]])
    return tables


def not_this_study(study: Study, inputs: dict[str, str]) -> str:
    """Say that a result was made from other predictions than the study's; "" if it was made from the study's.

    Args:
        study: The study.
        inputs: sha256 by path, as results store them.
    """
    if set(inputs.values()) & {record["digest"] for record in study.digests()}:
        return ""
    return "made from predictions that are not those of this study (or that were evaluated again since)"


def other_scores(study: Study, result: Record) -> str:
    """Say that neither side of an agreement is the study's scores; "" if one is."""
    own = next((record["digest"] for record in study.digests() if record["artefact"] == "scores"), "")
    if own in {side["digest"] for side in result["scores"]}:
        return ""
    return "neither side is this study's scores (or they were scored again since)"
