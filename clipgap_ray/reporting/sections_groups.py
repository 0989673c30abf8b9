"""The sections about test sets with groups: the drop, and the drop beside similarity."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.kernels.shift import PAIR
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_join, figures_models
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.tables import Record


def shift(numbers: Numbers) -> Section:
    """How large is the drop from common to counter? (paper 2403.11497, section 3)"""
    if not numbers.groups:
        missing = "no test set among the predictions has the groups common and counter"
        return Section("groups", "Common and counter backgrounds", "", missing=missing)
    section = Section("groups", "Common and counter backgrounds", say.on_groups(numbers.groups, numbers.exposure))
    caption = "Balanced accuracy of both groups and the drop between them."
    section.plots.append(Plot("group_shift", partial(figures_models.group_bars, numbers.groups, PAIR), caption))
    first = partial(figures_models.class_drop_bars, numbers.groups[0])
    section.plots.append(Plot("class_drops", first, f"Drop of every class, {numbers.groups[0]['arm']}."))
    rows = []
    for g in numbers.groups:
        worst = g["worst_class_group"]
        rows.append(
            [g["arm"], say.percent(g["balanced"]["common"]), say.percent(g["balanced"]["counter"]),
             (f"{g['drop']['drop_pp']:.1f}", say.span(*g["intervals"]["drop_pp_classes"]), False),
             say.percent(g["drop"]["relative"]), f"{g['drop']['log_odds']:.2f}",
             f"{worst['class_name']} / {worst['group']} {say.percent(worst['accuracy'], 0)}",
             f"{g['num_negative_drops']} / {g['num_insignificant_drops']} of {g['num_classes']}"]
        )  # fmt: skip
    headers = ["model", "common", "counter", "drop (points)", "relative", "log-odds", "worst class and group",
               "negative / insignificant class drops"]  # fmt: skip
    section.tables.append(Table(headers, rows))
    section.notes = ["Balanced: every class counts once. Small print: 95 % bootstrap over classes and images."]
    return section


def join(numbers: Numbers) -> Section:
    """How much of the drop is distance from the training data? (counteranimal.md 7.3)"""
    title = "Is the drop distance from the training data?"
    if not numbers.joins:
        missing = "needs predictions and query scores of a test set with the groups common and counter"
        return Section("drop-similarity", title, "", missing=missing)
    section = Section("drop-similarity", title, say.on_join(numbers.joins))
    caption = f"Accuracy of both groups against similarity, {numbers.joins[0]['arm']}, and the parts of the drop."
    draw = partial(figures_join.drop_at_equal_similarity, numbers.joins[0])
    section.plots.append(Plot("drop_at_equal_similarity", draw, caption))
    caption = "Every model against its own training set: explained and residual drop."
    section.plots.append(Plot("drop_parts", partial(figures_join.drop_parts, numbers.joins), caption))
    rows = [_joined_row(r) for r in numbers.joins]
    headers = ["model", "drop (points)", "explained by similarity", "residual", "share explained", "matched drop",
               "farther by", "overlap"]  # fmt: skip
    section.tables.append(Table(headers, rows))
    section.notes = [
        "Explained: what the groups' different distances from the training images make of the drop, by standardising a "
        "logistic regression with an effect per class and a spline in similarity. Residual: the groups' difference at "
        "equal similarity. Matched: photos of both groups paired on similarity within a class. Small print: 95 % "
        "bootstrap over classes and images. Overlap: share of photos in the common support of both groups, the smaller "
        "group's. This is accounting, not proof of cause: photos that lie farther may also differ otherwise.",
        *(f"{r['arm']}: {warning}." for r in numbers.joins for warning in r["warnings"]),
    ]
    return section


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
