"""How small may a pool be? Core sets and random sets of their sizes beside the whole pool (the paper's 100 M core set).

One number per training set: the mean accuracy over the test sets that the core sets were cut for, and its difference
from the whole pool's, paired by image and by seed (`kernels.intervals.mean_drop`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from clipgap_ray.kernels import intervals
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.study import Study, aligned
from clipgap_ray.reporting.tables import Arm, Record, arms
from clipgap_ray.reporting.theme import Theme, grid

WITHIN_PP = 1.0  # "as good as the whole pool"
KINDS = {"core": "core set", "capped": "core set, capped per partition", "random": "random"}
MARKERS = {"core": "s", "capped": "D", "random": "o"}


def changes(study: Study) -> list[Record]:
    """Compare every core set, and every random set of the size of one, with the whole pool.

    Args:
        study: The study. Only models count that were evaluated on all of these test sets, and whose whole pool was
            trained alike: the same model, samples seen and seeds, with the reference or without.

    Returns:
        A record per arm, largest first within its kind: `arm, split, kind ("core", "capped" or "random"), tests,
        rows, share` (of the whole pool's rows), `num_seeds, accuracy` and `whole` (means over tests), and
        `change_pp, low_pp, high_pp`, the arm's minus the whole pool's in points with its 95 % interval.
    """
    recipes = study.recipes()
    records = []
    for arm in arms(study):
        recipe = recipes.get(arm.split, {})
        kind = "capped" if recipe.get("cap") else recipe.get("kind")
        cut = recipe if kind != "random" else recipes.get(_matched(recipe), {})
        base = _whole(study, arm)
        if arm.supervised or arm.train_on == "reference" or cut.get("kind") != "core" or base is None:
            continue
        rows, whole = (recipes.get(one.split, {}).get("counts", {}).get("kept") for one in (arm, base))
        if not rows or not whole:
            continue
        pairs = [_paired(study, base, arm, test) for test in cut["tests"] if test in study.tests]
        known = [pair for pair in pairs if pair is not None]
        if not known or len(known) < len(pairs):
            continue
        before, after = (list(side) for side in zip(*known, strict=True))
        drop = intervals.mean_drop(before, after)
        records.append({
            "arm": arm.label, "split": arm.split, "kind": kind, "tests": "+".join(cut["tests"]),
            "rows": rows, "share": rows / whole, "num_seeds": len(before[0]),
            "accuracy": sum(side.mean() for side in after) / len(after),
            "whole": sum(side.mean() for side in before) / len(before),
            "change_pp": -100 * drop.value, "low_pp": -100 * drop.high, "high_pp": -100 * drop.low,
        })  # fmt: skip
    return sorted(records, key=lambda r: (list(KINDS).index(r["kind"]), -r["rows"]))


def _whole(study: Study, like: Arm) -> Arm | None:
    """The arm of the uncut pool that was trained as another was."""
    same = replace(like, split=study.base_split, runs=())
    return next((arm for arm in arms(study) if replace(arm, runs=()) == same), None)


def _matched(recipe: Record) -> str:
    return str(recipe.get("match") or "").rsplit("/", 1)[-1].removesuffix(".npy")


def _paired(study: Study, base: Arm, arm: Arm, test: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, n) outcomes of both arms on the seeds and images that both have; None without such seeds."""
    runs = [{run.seed: run for run in one.runs if study.predictions(run.name, test)} for one in (base, arm)]
    shared = sorted(set(runs[0]) & set(runs[1]))
    found = [study.predictions(side[seed].name, test) for side in runs for seed in shared]
    if not found:
        return None
    _, right = aligned([one for one in found if one], f"{study.path('eval')}: {base.label} and {arm.label} on {test}")
    return right[: len(shared)], right[len(shared) :]


def section(records: list[Record]) -> Section:
    """How small may a pool be?"""
    by_tests = [[r for r in records if r["tests"] == tests] for tests in dict.fromkeys(r["tests"] for r in records)]
    made = Section("core-sets", "How small may a pool be?", " ".join(map(sentence, by_tests)))
    for number, own in enumerate(by_tests):  # core sets of other test sets are another question
        caption = f"Mean accuracy over {_names(own[0]['tests'])}, minus the whole pool's."
        name = f"core_sets_{number}" if number else "core_sets"
        made.plots.append(Plot(name, partial(draw, own), caption))
        made.tables.append(_table(own))
    made.notes = [
        "Only models of equally many samples seen. Differences in points, paired by image and by seed; 95 % over "
        "images and seeds (Student's t: few seeds make it wide)."
    ]
    return made


def _table(records: list[Record]) -> Table:
    headers = ["training set", "pool images", "of the pool", "accuracy", "minus the whole pool"]
    rows = [
        [
            r["arm"], f"{r['rows']:,}", say.percent(r["share"]), say.percent(r["accuracy"]),
            (say.signed(r["change_pp"]), say.span(r["low_pp"], r["high_pp"], "+.1f"), False),
        ]
        for r in records
    ]  # fmt: skip
    return Table(headers, rows, f"Means over {_names(records[0]['tests'])}, {say.seeds(records)}")


def _names(tests: str) -> str:
    names = tests.split("+")
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def sentence(records: list[Record]) -> str:
    """Name the smallest set within a point of the whole pool, and how far the next smaller size falls."""
    num_tests = records[0]["tests"].count("+") + 1
    over = f"over {num_tests} test sets" if num_tests > 1 else f"on {records[0]['tests']}"
    good = [r for r in records if r["change_pp"] >= -WITHIN_PP]
    if not good:
        best = max(records, key=lambda r: r["change_pp"])
        return f"No smaller set comes within a point of the whole pool ({over}): the best is {_told(best)}."
    size = min(r["rows"] for r in good)
    smallest = max((r for r in good if r["rows"] == size), key=lambda r: r["change_pp"])
    text = f"The smallest set within a point of the whole pool ({say.percent(smallest['whole'])} {over}) "
    text += f"is {_told(smallest)}"
    text += "; a loss of more than a point is not ruled out." if smallest["low_pp"] < -WITHIN_PP else "."
    smaller = [r for r in records if r["rows"] < size]
    if smaller:
        following = max(r["rows"] for r in smaller)
        best = max((r for r in smaller if r["rows"] == following), key=lambda r: r["change_pp"])
        text += f" Of the next smaller size the best is {_told(best)}."
    return text


def _told(record: Record) -> str:
    change = f"{say.points(record['change_pp'])} {say.span(record['low_pp'], record['high_pp'], '+.1f')}"
    return f"{record['arm']}, {record['rows']:,} images ({say.percent(record['share'])} of the pool), {change}"


def draw(records: list[Record], theme: Theme) -> Figure:
    """The difference from the whole pool against the share that is left, a line per kind."""
    figure, (axis,) = grid(1, height=3.6)
    kinds = [kind for kind in KINDS if any(r["kind"] == kind for r in records)]
    for number, kind in enumerate(kinds):
        own = [r for r in records if r["kind"] == kind]
        beside = 1.06 ** (number - (len(kinds) - 1) / 2)  # intervals of one size stand beside each other
        value = [r["change_pp"] for r in own]
        reach = [[v - r["low_pp"] for v, r in zip(value, own, strict=True)],
                 [r["high_pp"] - v for v, r in zip(value, own, strict=True)]]  # fmt: skip
        axis.errorbar([beside * r["share"] for r in own], value, reach, color=theme.kind(kind), marker=MARKERS[kind],
                      capsize=3, ms=6.5, elinewidth=1.2, label=KINDS[kind])  # fmt: skip
    axis.axhline(0, color=theme.ink, lw=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted({r["share"] for r in records})))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axis.set_xlabel("share of the pool")
    axis.set_ylabel("points from the whole pool")
    axis.legend(frameon=False, loc="lower right")
    return figure
