"""Sections that appear when a study's directory holds what they show (`found`); a study without it lacks nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_groups, found, sections_chosen
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record


def build(study: Study, numbers: Numbers) -> list[Section]:
    """Return the sections whose results are there, in the order of the page."""
    sections = []
    if numbers.duplicates or numbers.removed_duplicates:
        sections.append(_duplicates(numbers))
    sections += [sections_chosen.neighbours(study, name, result) for name, result in found.joins(study).items()]
    sections += [sections_chosen.selection(study, name, result) for name, result in found.selections(study).items()]
    if numbers.agreements:
        sections.append(agreement(study, numbers.agreements))
    return sections


# --- duplicates ------------------------------------------------------------------------------------------


def _duplicates(numbers: Numbers) -> Section:
    section = Section("duplicates", "Duplicates", _on_duplicates(numbers))
    rates = {(r["test"], r["similarity"], r["where"]): r for r in numbers.duplicates}
    if rates:
        levels = sorted({r["similarity"] for r in numbers.duplicates}, key=lambda at: 2.0 if at is None else at)
        places = [w for w in (found.POOL, found.CUT, found.REFERENCE) if any(key[2] == w for key in rates)]
        rows: list[list[Any]] = []
        for test in dict.fromkeys(r["test"] for r in numbers.duplicates):
            own = [rates.get((test, level, place)) for level in levels for place in places]
            count = next(r["num_images"] for r in own if r is not None)
            rows.append([test, f"{count:,}", *("–" if r is None else _rate(r) for r in own)])
        words = {level: "equal bytes" if level is None else f"≥ {level:g}" for level in levels}
        headers = ["test set", "n", *(f"{words[level]}: {place}" for level in levels for place in places)]
        caption = (
            "Test images with an image at least so similar, or of equal bytes (sha256), in the pool before and after "
            "the cut; Wilson's 95 %."
        )
        section.tables.append(Table(headers, rows, caption))
    if numbers.removed_duplicates:
        rows = [
            [f"≥ {r['min_similarity']:g}", f"{r['kept']:,}", f"{r['sha256']:,}", f"{r['near']:,}",
             say.percent(1 - r["kept"] / r["rows"])]
            for r in sorted(numbers.removed_duplicates, key=lambda r: r["min_similarity"])
        ]  # fmt: skip
        headers = ["similarity", "pool rows kept", "removed: equal bytes", "removed: similar", "removed"]
        section.tables.append(Table(headers, rows, "Rows that the pool's own deduplication removes at each threshold."))
    section.notes = [
        "A similarity is no proof: what value means a copy depends on the encoder. `clipgap audit` measures with which "
        "recall altered copies are found, and compares bytes and perceptual hashes."
    ]
    return section


def _rate(record: Record) -> Any:
    return (say.percent(record["rate"]), say.span(100 * record["low"], 100 * record["high"]), False)


def _on_duplicates(numbers: Numbers) -> str:
    parts = []
    alike = [r for r in numbers.duplicates if r["by"] == "similarity"]
    if alike:
        highest = max(r["similarity"] for r in alike)
        most = max(
            (r for r in alike if r["similarity"] == highest and r["where"] == found.POOL),
            key=lambda r: r["rate"],
        )
        text = (
            f"{say.percent(most['rate'])} {say.span(100 * most['low'], 100 * most['high'])} of {most['test']}, the "
            f"most, have a pool image of similarity {highest:g} or more"
        )
        after = next(
            (r for r in alike if r["where"] == found.CUT and r["test"] == most["test"]
             and r["similarity"] == highest), None,
        )  # fmt: skip
        parts.append(text + (f", {say.percent(after['rate'])} after gap matching." if after else "."))
    equal = [r for r in numbers.duplicates if r["by"] == "sha256" and r["where"] == found.POOL]
    if equal:
        images = sum(round(r["rate"] * r["num_images"]) for r in equal)
        count = sum(r["num_images"] for r in equal)
        parts.append(f"Byte for byte {images:,} of all {count:,} test images lie in the pool.")
    if numbers.removed_duplicates:
        first = numbers.removed_duplicates[0]
        parts.append(
            f"The pool's deduplication at {first['min_similarity']:g} removes {first['sha256'] + first['near']:,} of "
            f"{first['rows']:,} rows, {first['sha256']:,} of them for equal bytes."
        )
    return " ".join(parts)


# --- two encoders ----------------------------------------------------------------------------------------


def agreement(study: Study, records: list[Record]) -> Section:
    """What do two encoders agree on?

    Args:
        study: The study.
        records: Of `found.agreements`, not empty.
    """
    section = Section("encoders", "Does it hang on the encoder?", _on_agreement(records))
    caption = "Jaccard index of what each cut removes by either encoder; bars' ticks: two random sets of these sizes."
    section.plots.append(Plot("encoder_agreement", partial(figures_groups.jaccards, records), caption))
    rows: list[list[Any]] = []
    for pair, test in dict.fromkeys((r["pair"], r["test"]) for r in records):
        r = next(r for r in records if (r["pair"], r["test"]) == (pair, test))
        ranks = [_two(r[f"rank_correlation_{key}"]) for key in ("m", "margin", "tau", "similarity")]
        rows.append([f"{r['first']} and {r['second']}", test, f"{r['num_images']:,}", *ranks,
                     say.percent(r["same_nearest"], 0), say.percent(r["same_reference"], 0)])  # fmt: skip
    headers = ["encoders", "test set", "n", "m", "margin", "tau", "similarity", "same nearest", "same reference"]
    section.tables.append(Table(headers, rows, "Spearman's rank correlations, and how often both name the same image."))
    rows = [
        [f"{r['first']} and {r['second']}", r["test"], r["cut"], f"{r['removed_first']:,}", f"{r['removed_second']:,}",
         f"{r['removed_both']:,}", _two(r["jaccard"]), _two(r["chance"])]
        for r in records
    ]  # fmt: skip
    headers = [
        "encoders",
        "test set",
        "cut",
        "removed by the first",
        "by the second",
        "by both",
        "Jaccard",
        "by chance",
    ]
    section.tables.append(Table(headers, rows))
    for name, result in study.results("agreement", "agreement.json").items():
        where = f"{name}: " if name else ""
        doubt = found.other_scores(study, result)
        section.notes += [f"{where}{doubt}."] if doubt else []
        section.notes += [f"{where}{warning}." for warning in result["warnings"]]
    return section


def _two(value: float | None) -> str:
    return "–" if value is None else say.signed(value, ".2f")


def _on_agreement(records: list[Record]) -> str:
    known = [r for r in records if r["jaccard"] is not None]
    pair = f"{records[0]['first']} and {records[0]['second']}"
    ranks = [r["rank_correlation_m"] for r in records if r["rank_correlation_m"] is not None]
    text = f"{pair} rank the pool's nearness by Spearman {_two(min(ranks))} to {_two(max(ranks))}" if ranks else pair
    if not known:
        return f"{text}; no cut removes anything."
    worst = min(known, key=lambda r: r["jaccard"])
    return (
        f"{text}; least alike is {worst['cut']} on {worst['test']}: of all rows that either removes, both remove "
        f"{say.percent(worst['jaccard'], 0)} (by chance {say.percent(worst['chance'], 0)})."
    )
