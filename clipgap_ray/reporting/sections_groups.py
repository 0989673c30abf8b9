"""Sections about a drop between two groups: how the models were asked, similarity, what the drop comes from."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_groups, figures_join, variants
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.tables import Record


def _named(records: list[Record]) -> list[Record]:
    """Name the test set beside the model where there are several: rows and bars go by the model's name."""
    if len({record["test"] for record in records}) < 2:
        return records
    return [{**record, "arm": f"{record['arm']} · {record['test']}"} for record in records]


def asked(numbers: Numbers) -> Section:
    """Does the drop hang on prompts, candidates or weighting?"""
    section = Section("asked", "Does the drop hang on how the model was asked?", variants.sentence(numbers.variants))
    models: dict[str, list[Record]] = {}
    for record in numbers.variants:
        models.setdefault(f"{record['arm']} on {record['test']}", []).append(record)
    draw = partial(figures_groups.variants, models)
    pairs = " and ".join(dict.fromkeys(f"from {r['first']} to {r['second']}" for r in numbers.variants))
    caption = f"Drop {pairs} for every way of asking; balanced over classes, unbalanced over photos."
    section.plots.append(Plot("shift_variants", draw, caption))
    for name, ways in models.items():
        first, second = pair = (ways[0]["first"], ways[0]["second"])
        headers = ["asked", "prompts", "candidates", first, second, "drop (points)", "change", f"{first}, unbalanced",
                   f"{second}, unbalanced", "unbalanced drop", "change"]  # fmt: skip
        rows = [_way_row(way, pair) for way in ways]
        section.tables.append(Table(headers, rows, f"{name}, n = {ways[0]['num_images']:,}"))
    section.notes = [
        "Change: against the first row, paired by photo; 95 % over classes and photos, unbalanced over photos. "
        "Candidates: the labels among which the model chooses."
    ]
    return section


def _way_row(way: Record, pair: tuple[str, str]) -> list[Any]:
    row: list[Any] = [way["variant"], way["prompts"] or "–", way["candidates"] or "–"]
    for kind, change in (("balanced", "change"), ("unbalanced", "unbalanced_change")):
        row += [say.percent(way[f"{kind}_{group}"]) for group in pair]
        row.append((say.signed(way[f"{kind}_drop_pp"], ".1f"),
                    say.span(way[f"{kind}_low_pp"], way[f"{kind}_high_pp"]), False))  # fmt: skip
        value = way[f"{change}_pp"]
        row.append("–" if value is None else (
            say.signed(value), say.span(way[f"{change}_low_pp"], way[f"{change}_high_pp"], "+.1f"), False
        ))  # fmt: skip
    return row


def join(numbers: Numbers) -> Section:
    """How much of the drop is distance from the training data? (counteranimal.md 7.3)"""
    title = "Is the drop distance from the training data?"
    if not numbers.joins:
        missing = "needs predictions and query scores of a test set whose photos have two groups or more"
        return Section("drop-similarity", title, "", missing=missing)
    results = _named(numbers.joins)
    section = Section("drop-similarity", title, say.on_join(results))
    caption = f"Accuracy of both groups against similarity, {results[0]['arm']}, and the parts of the drop."
    draw = partial(figures_join.drop_at_equal_similarity, results[0])
    section.plots.append(Plot("drop_at_equal_similarity", draw, caption))
    caption = "Every model against its own training set: explained and residual drop."
    section.plots.append(Plot("drop_parts", partial(figures_join.drop_parts, results), caption))
    rows = [_joined_row(r) for r in results]
    headers = ["model", "drop (points)", "explained by similarity", "residual", "share explained", "matched drop",
               "farther by", "overlap"]  # fmt: skip
    section.tables.append(Table(headers, rows))
    section.notes = [
        "Explained: what the groups' different distances from the training images make of the drop, by standardising a "
        "logistic regression with an effect per class and a spline in similarity. Residual: the groups' difference at "
        "equal similarity. Matched: photos of both groups paired on similarity within a class. Small print: 95 % "
        "bootstrap over classes and images. Overlap: share of photos in the common support of both groups, the smaller "
        "group's. This is accounting, not proof of cause: photos that lie farther may also differ otherwise.",
        *_warnings(results),
    ]
    return section


NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def _warnings(results: list[Record]) -> list[str]:
    """Every warning once, with the arms that it is about and the range of its number: fifteen alike say no more."""
    found: dict[str, list[tuple[str, str]]] = {}
    for result in results:
        for warning in result["warnings"]:
            found.setdefault(NUMBER.sub("\0", warning, count=1), []).append((result["arm"], warning))
    lines = []
    for text, cases in found.items():
        arms = ", ".join(dict.fromkeys(arm for arm, _ in cases))
        numbers = [match[0] for _, warning in cases if (match := NUMBER.search(warning))]
        ends = [min(numbers, key=float), max(numbers, key=float)] if numbers else []
        shown = " to ".join(dict.fromkeys(ends)).replace("-", "−")
        lines.append(f"{arms}: {text.replace(chr(0), shown)}.")
    return lines


def hypotheses(numbers: Numbers) -> Section:
    """What does the drop come from? Every hypothesis beside its numbers (counteranimal.md 7.4)"""
    records = numbers.hypotheses
    section = Section("hypotheses", "What does the drop come from?", _on_hypotheses(records))
    tests = list(dict.fromkeys(r["test"] for r in records))
    for test in tests:
        own = [r for r in records if r["test"] == test]
        rows: list[list[Any]] = []
        for before, r in zip([None, *own], own, strict=False):
            first = before is None or before["hypothesis"] != r["hypothesis"]
            style = ".1f" if r["unit"] == "points" else ".3f"
            measured = r["value"] is not None
            value = f"{say.signed(r['value'], style)} {r['unit']}" if measured else "–"
            rows.append(
                [(r["hypothesis"], r["meaning"], False) if first else "", (r["prediction"], r["quantity"], False),
                 (value, say.span(r["low"], r["high"], style), False) if measured else "–", r["outcome"],
                 r["verdict"] if first else ""]
            )  # fmt: skip
        headers = ["hypothesis", "prediction", "measured (95 %)", "outcome", "verdict"]
        section.tables.append(Table(headers, rows, f"{own[0]['arm']} on {test}"))
    section.notes = [
        "A prediction holds when its interval leaves no other reading, fails when it leaves only the opposite, and is "
        "open otherwise; a part of the drop counts as nothing when its interval contains 0 and not the whole drop. "
        "Supported: all hold. In part: some hold, some fail. The hypotheses do not exclude each other."
    ]
    return section


def _on_hypotheses(records: list[Record]) -> str:
    """Name the hypotheses by verdict, for the first test set."""
    verdicts: dict[str, list[str]] = {}
    for r in records:
        if r["test"] == records[0]["test"]:
            names = verdicts.setdefault(r["verdict"].split(":")[0], [])
            names += [] if r["hypothesis"] in names else [r["hypothesis"]]
    return f"{records[0]['arm']}: " + "; ".join(f"{', '.join(n)}: {verdict}" for verdict, n in verdicts.items()) + "."


def _joined_row(result: Record) -> list[Any]:
    parts, matched, exposure = result["decomposition"], result["matched"], result["exposure"]

    def with_interval(value: float | None, interval: list[float] | None, style: str = ".1f") -> Any:
        if value is None or interval is None:
            return "–"
        low, high = interval
        return (f"{value:{style}}".replace("-", "−"), say.span(low, high, style), False)

    split = parts or dict.fromkeys(
        ("explained_pp", "explained_interval_pp", "residual_pp", "residual_interval_pp", "share")
    )
    return [
        ("◆ " if result["supervised"] else "") + result["arm"],
        with_interval(result["drop"]["drop_pp"], result["drop"]["interval_pp"]),
        with_interval(split["explained_pp"], split["explained_interval_pp"]),
        with_interval(split["residual_pp"], split["residual_interval_pp"]),
        "–" if split["share"] is None else say.percent(split["share"], 0),
        with_interval(matched["drop_pp"], matched["interval_pp"]),
        with_interval(exposure["difference"], exposure["interval"], ".3f"),
        say.percent(result["overlap"]["smallest"], 0),
    ]
