"""The hypotheses about a drop between groups (counteranimal.md 7.4), each held against the numbers that were measured.

A hypothesis predicts something of a few numbers; each number is stored with its 95 % interval by the report's own join,
by `clipgap join` or by `clipgap discover`. A prediction

    holds       when the interval leaves no other reading,
    fails       when it leaves the opposite reading only,
    is open     when the interval is too wide to tell.

"About 0" would never be shown by an interval that merely contains 0: it holds when the interval contains 0 and leaves
out the whole effect (the drop, or the whole photos' difference), fails when it leaves out 0, and is open when it
contains both. All predictions of a hypothesis together make the verdict; nothing here is decided by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from clipgap_ray.kernels import intervals
from clipgap_ray.kernels.neighbours import OTHER, WRONG
from clipgap_ray.kernels.shift import PAIR
from clipgap_ray.reporting import causal
from clipgap_ray.reporting.tables import Record, lookup

HOLDS, FAILS, OPEN, MISSING = "holds", "fails", "open", "not measured"
SUPPORTED, CONTRADICTED, IN_PART, UNDECIDED = "supported", "contradicted", "in part", "undecided"
NO_DROP = "no drop to explain"

MEANINGS = {
    "exposure": "{second} photos are merely farther from the training data; more coverage is the remedy",
    "shortcut": "the model relies on {difference}, at equal distance",
    "caption": "similar images were seen, but their captions do not name the class",
    "foreground": "the animals differ, not only what is behind them",
    "selection": "choosing the groups by a model's accuracy made the drop",
}
RUN_NEIGHBOURS = "run `clipgap join --pool` (in a study: analyses.join)"
RUN_BACKGROUNDS = "run `clipgap attributes` and `clipgap join --pool` (in a study: analyses.backgrounds and join)"
RUN_PARTS = "run `clipgap cutout` and `clipgap join --parts foreground=...`"
RUN_DISCOVER = "run `clipgap discover` (in a study: analyses.backgrounds and discover)"


def above(low: float, high: float, whole: float | None = None) -> str:
    """Is a number above 0? With `whole` > 0, an interval of 0 that leaves the whole effect out says no."""
    if low > 0:
        return HOLDS
    return FAILS if high <= 0 or (whole is not None and whole > 0 and high < whole) else OPEN


def about_zero(low: float, high: float, whole: float | None) -> str:
    """Is a number 0 rather than the whole effect?"""
    if low > 0 or high < 0:
        return FAILS
    return HOLDS if whole is not None and not low <= whole <= high else OPEN


def differs(low: float, high: float, whole: float | None) -> str:
    """Is a number other than 0, either way?"""
    return {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[about_zero(low, high, whole)]


def at_most(low: float, high: float, most: float) -> str:
    """Is a number at most `most`?"""
    if high <= most:
        return HOLDS
    return FAILS if low > most else OPEN


def verdict(outcomes: Iterable[tuple[str, str]]) -> str:
    """Sum up a hypothesis.

    Args:
        outcomes: (outcome, what is missing and how to get it) of each of its predictions.

    Returns:
        supported (all hold), contradicted (one fails, none holds), in part (some hold, some fail), "not measured: why"
        (none fails and one is missing), undecided.
    """
    known = list(outcomes)
    found = {outcome for outcome, _ in known}
    if FAILS in found:
        return IN_PART if HOLDS in found else CONTRADICTED
    if MISSING in found:
        return f"{MISSING}: {next(why for outcome, why in known if outcome == MISSING)}"
    return SUPPORTED if found == {HOLDS} else UNDECIDED


@dataclass(frozen=True)
class Prediction:
    """One number that a hypothesis predicts.

    Attributes:
        text: The prediction.
        quantity: What was measured, with the model where it is not the report's first.
        unit: points or similarity.
        measured: Value, lower and upper end of its 95 % interval; None where nothing is stored.
        judge: From the interval to an outcome.
        why: What is missing, and what to run.
    """

    text: str
    quantity: str
    unit: str
    measured: tuple[float, float, float] | None
    judge: Callable[[float, float], str]
    why: str = ""

    def outcome(self) -> str:
        """Return holds, fails, open, or not measured; an interval that no draw gave an end is open."""
        if self.measured is None:
            return MISSING
        low, high = self.measured[1:]
        return self.judge(low, high) if math.isfinite(low) and math.isfinite(high) else OPEN


def table(
    joins: list[Record], trials: list[Record], commands: dict[str, Record], selections: dict[str, Record]
) -> list[Record]:
    """Hold every hypothesis against what is stored, for the first CLIP on every test set with groups.

    Args:
        joins: The report's own joins (`joined.joins`).
        trials: What training on an equalised pool did (`causal.trials`); a study without one is not held against it.
        commands: Results of `clipgap join` by name (`found.joins`).
        selections: Results of `clipgap discover` by name; they name no test set, so they stand beside the first one.

    Returns:
        A record per prediction: `test, arm, hypothesis, meaning, prediction, quantity, unit, value, low, high, outcome,
        verdict`; numbers are None where nothing is stored.
    """
    records: list[Record] = []
    for test in dict.fromkeys(join["test"] for join in joins):
        own = [join for join in joins if join["test"] == test]
        base = next((join for join in own if not join["supervised"]), own[0])
        pair: list[str] = base["groups"]
        difference = "the background" if tuple(pair) == PAIR else "what the groups differ in"
        hypotheses = {
            "exposure": _exposure(base) + _trial(trials, test),
            "shortcut": _shortcut(base, commands),
            "caption": [_neighbours(commands, test, pair, WRONG)],
            "foreground": [_foreground(commands, test, pair)],
            "selection": _selection(selections if not records else {}),
        }
        for name, predictions in hypotheses.items():
            summed = verdict((p.outcome(), p.why) for p in predictions)
            if name in ("exposure", "shortcut") and base["drop"]["interval_pp"][0] <= 0:
                summed = NO_DROP
            meaning = MEANINGS[name].format(second=pair[1], difference=difference)
            about = {"test": test, "arm": base["arm"], "hypothesis": name, "meaning": meaning}
            records += [{**about, **_record(p), "verdict": summed} for p in predictions]
    return records


def _record(prediction: Prediction) -> Record:
    value, low, high = prediction.measured or (None, None, None)
    return {
        "prediction": prediction.text,
        "quantity": prediction.quantity,
        "unit": prediction.unit,
        "value": value,
        "low": low,
        "high": high,
        "outcome": prediction.outcome(),
    }


# --- exposure and shortcut: the report's own join ----------------------------------------------------------


def _exposure(base: Record) -> list[Prediction]:
    exposure = base["exposure"]
    return [
        Prediction(
            f"{base['groups'][1]} photos lie farther from the training images",
            "difference of the groups' similarity",
            "similarity",
            (exposure["difference"], *exposure["interval"]),
            above,
        ),
        _part(base, "residual", "nothing of the drop remains at equal similarity", about_zero),
    ]


def _trial(trials: list[Record], test: str) -> list[Prediction]:
    """The causal arm, where a study has one: training on an equalised pool lowers the drop, against its control."""
    found, control = causal.effect(trials, test), lookup(trials, test=test, role=causal.CONTROL)
    if found is None or control is None:
        return []
    quantity = f"by how much, of the control's drop of {control['drop_pp']:.1f}".replace("-", "−")
    return [Prediction("training on an equalised pool lowers the drop", quantity, "points", found, above)]


def _shortcut(base: Record, commands: dict[str, Record]) -> list[Prediction]:
    return [
        _part(base, "explained", "distance explains nothing of the drop", about_zero),
        _part(base, "residual", "a drop remains at equal similarity", above),
        _neighbours(commands, base["test"], base["groups"], OTHER),
    ]


def _part(base: Record, part: str, text: str, judge: Callable[..., str]) -> Prediction:
    """A part of the drop, with the drop as the whole effect."""
    found, drop = base["decomposition"], base["drop"]["drop_pp"]
    measured = None if found is None else (found[f"{part}_pp"], *found[f"{part}_interval_pp"])
    quantity = f"{part} part of a drop of {drop:.1f}".replace("-", "−")
    return Prediction(text, quantity, "points", measured, partial(judge, whole=drop), base["why_not"])


# --- neighbours and parts: `clipgap join` ------------------------------------------------------------------


def _models(commands: dict[str, Record], test: str, pair: list[str], key: str) -> list[tuple[str, Record]]:
    """Models of `clipgap join` on two groups of a test set that have a result."""
    return [
        (model, own[key])
        for result in commands.values()
        for model, own in result["models"].items()
        if result["test"] == test and own.get(key) and own.get("groups", pair) == pair
    ]


def _neighbours(commands: dict[str, Record], test: str, pair: list[str], regime: str) -> Prediction:
    """Are more photos of the second than of the first group of a kind, by what their neighbours are?"""
    more = f"more {pair[1]} than {pair[0]} photos"
    text = {
        WRONG: f"{more} are near to the pool, but no neighbour's caption names the class",
        OTHER: f"{more} have neighbours that name the class before another background only",
    }[regime]
    found = _models(commands, test, pair, "neighbours")
    if regime == OTHER:
        found = [(model, own) for model, own in found if own["groups"][0]["same_background"] is not None]
    quantity = f"difference of the groups' shares of \u201c{regime}\u201d"
    if not found:
        why = RUN_BACKGROUNDS if regime == OTHER else RUN_NEIGHBOURS
        return Prediction(text, quantity, "points", None, above, why)
    model, own = found[0]
    counts = []
    for group in reversed(own["groups"]):
        photos = next(r["num_images"] for r in group["regimes"] if r["regime"] == regime)
        counts.append((photos, group["num_images"]))
    shares = [photos / total for photos, total in counts]
    low, high = intervals.proportion_difference(counts[0], counts[1])
    return Prediction(
        text, f"{quantity} ({model})", "points", (100 * (shares[0] - shares[1]), 100 * low, 100 * high), above
    )


def _foreground(commands: dict[str, Record], test: str, pair: list[str]) -> Prediction:
    text = "the animals alone, cut out, lie unequally far from the training images"
    for model, own in _models(commands, test, pair, "similarity_parts"):
        parts = {part["part"]: part["exposure"] for part in own["parts"]}
        if "foreground" in parts:
            found, whole = parts["foreground"], parts["whole"]["difference"]
            quantity = f"difference of the foregrounds' similarity, of the whole photos' {whole:.3f} ({model})"
            measured = (found["difference"], *found["interval"])
            judge = partial(differs, whole=whole)
            return Prediction(text, quantity.replace("-", "−"), "similarity", measured, judge)
    return Prediction(text, "difference of the foregrounds' similarity", "similarity", None, above, RUN_PARTS)


# --- selection: `clipgap discover` -------------------------------------------------------------------------


def _selection(selections: dict[str, Record]) -> list[Prediction]:
    """The drop of groups that a model chose, on photos that did not choose; then of groups that another chose."""
    text = "on other photos than those that chose the groups, the drop halves"
    if not selections:
        return [Prediction(text, "drop on the held-out half", "points", None, above, RUN_DISCOVER)]
    result = next(iter(selections.values()))
    by, own = result["by"], result["models"][result["by"]]
    if own["held_out_drop_pp"] is None or own["same_photos_drop_pp"] is None:
        why = "too few photos of a class and background for two halves"
        return [Prediction(text, "drop on the held-out half", "points", None, above, why)]
    judge = partial(at_most, most=own["same_photos_drop_pp"] / 2)

    whole = f"{own['same_photos_drop_pp']:.1f} on the photos that chose".replace("-", "−")
    measured = (own["held_out_drop_pp"], *own["held_out_interval_pp"])
    predictions = [Prediction(text, f"drop of {by} on the held-out half, of {whole}", "points", measured, judge)]
    other: dict[str, Any] | None = next(
        (cell for cell in result["matrix"] if cell["evaluated"] == by != cell["discovered_by"]
         and cell["held_out_drop_pp"] is not None), None,
    )  # fmt: skip
    if other is not None:
        measured = tuple(other[f"held_out_{end}_pp"] for end in ("drop", "low", "high"))
        quantity = f"drop of {by} in groups that {other['discovered_by']} chose, of {whole}"
        predictions.append(Prediction("with groups that another model chose, it halves", quantity, "points",
                                      measured, judge))  # fmt: skip
    return predictions
