"""The causal arm (counteranimal.md 7.3, item 6): what becomes of a drop when the distance between the groups goes?

The join accounts for a drop; a study with an `equalise` split tries it. Where distance makes the drop, a CLIP trained
on the equalised pool has less of it than one trained on as many rows of the same classes, drawn at random (`random`
with `match`), which lost the same size and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipgap_ray.kernels import shift_change
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import groups
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.study import Run, Study, positions
from clipgap_ray.reporting.tables import Arm, Record, arms, base_arm, lookup, outcomes
from clipgap_ray.reporting.theme import ORANGE, Theme, grid

WHOLE, EQUALISED, CONTROL = "whole pool", "equalised", "control"


def trials(study: Study, shifts: list[Record], joins: list[Record], draws: int, seed: int) -> list[Record]:
    """Return what training on every equalised pool of a study did to the drop that it was made for.

    Args:
        study: The study.
        shifts: Records of `tables_groups.group_shift`.
        joins: Records of `joined.joins`.
        draws: Bootstrap samples.
        seed: Of the bootstraps.

    Returns:
        Per test set and equalised split a record for the whole pool, the equalised one and each control: `test, first,
        second, split` (the equalised), `role, arm, rows, num_seeds, num_images`, the balanced drop with its interval,
        `difference` (how much farther the second group lies from what the arm was trained on; None where it was not
        measured) with its interval, `explained_pp` (what the join says of the arm), and `change_*`: the equalised
        pool's drop minus this arm's, paired by photo and seed, with its interval (None for itself).
    """
    records = []
    for split, recipe in study.recipes().items():
        treated = next((arm for arm in _clips(study) if arm.split == split), None)
        if recipe.get("kind") != "equalise" or treated is None:
            continue
        pair = tuple(recipe["groups"])
        for test in recipe["tests"]:
            if test not in study.tests or groups.compared(study, test) != pair:
                continue
            whole, controls = base_arm(study, treated), _controls(study, treated)
            roles = [(WHOLE, arm) for arm in [whole] if arm] + [(EQUALISED, treated)]
            for role, arm in roles + [(CONTROL, arm) for arm in controls]:
                drop = next((s for s in shifts if s["compared"] and _is(s, arm, test)), None)
                if drop is None:
                    continue
                join = next((j for j in joins if j["arm"] == arm.label and j["test"] == test), None)
                about: Record = {"test": test, "first": pair[0], "second": pair[1], "split": split, "role": role}
                about |= {"arm": arm.label, "rows": study.recipes().get(arm.split, {}).get("counts", {}).get("kept")}
                about |= {"num_seeds": drop["num_seeds"], "num_images": sum(drop["num_images"].values())}
                records.append({**about, **_measured(drop, join), **_change(study, arm, treated, test, draws, seed)})
    return records


def _clips(study: Study) -> list[Arm]:
    return [arm for arm in arms(study) if not arm.supervised and arm.train_on != "reference"]


def _controls(study: Study, treated: Arm) -> list[Arm]:
    """CLIPs of random splits that match the treated one, trained alike."""
    found = []
    for arm in _clips(study):
        recipe = study.recipes().get(arm.split, {})
        matches = str(recipe.get("match") or "").rsplit("/", 1)[-1].removesuffix(".npy")
        if recipe.get("kind") == "random" and matches == treated.split and arm.train_on == treated.train_on:
            found.append(arm)
    return found


def _is(shifted: Record, arm: Arm, test: str) -> bool:
    own = (test, arm.label, arm.model, arm.num_samples_seen)
    return (shifted["test"], shifted["arm"], shifted["model"], shifted["num_samples_seen"]) == own


def _measured(drop: Record, join: Record | None) -> Record:
    exposure: Record = (join or {}).get("exposure") or {"difference": None, "interval": (None, None)}
    parts: Record = (join or {}).get("decomposition") or {}
    first, second = drop["groups"]
    return {
        "balanced_first": drop["balanced"][first],
        "balanced_second": drop["balanced"][second],
        "drop_pp": drop["drop"]["drop_pp"],
        "drop_low_pp": drop["intervals"]["drop_pp_classes"][0],
        "drop_high_pp": drop["intervals"]["drop_pp_classes"][1],
        "difference": exposure["difference"],
        "difference_low": exposure["interval"][0],
        "difference_high": exposure["interval"][1],
        "explained_pp": parts.get("explained_pp"),
    }


def _change(study: Study, arm: Arm, treated: Arm, test: str, draws: int, seed: int) -> Record:
    """The treated arm's drop minus another's, on the photos and the seeds that both have."""
    names = ("num_photos", "change_pp", "low_pp", "high_pp", "se_photos_pp", "se_seeds_pp")
    keys = {name: name if name.startswith("change") else f"change_{name}" for name in names}
    ours, theirs = ({run.seed for run in one.runs if study.predictions(run.name, test)} for one in (treated, arm))
    pairs = [replace(one, runs=tuple(_by_seed(one, ours & theirs))) for one in (arm, treated)]
    found = [outcomes(study, one, test) for one in pairs]
    if arm == treated or found[0] is None or found[1] is None:
        return dict.fromkeys(keys.values())
    (other, before), (own, after) = found[0], found[1]
    at = positions(own.uids, other.uids)
    kept = np.nonzero(at >= 0)[0]
    classes, names_of = ([values[i] for i in kept] for values in (own.classes, own.groups))
    pair = groups.compared(study, test)
    assert pair is not None  # `trials` compared it with the recipe's
    result = shift_change.change_over_trainings(
        classes, names_of, before[:, at[kept]], after[:, kept], np.random.default_rng(seed), pair, draws
    )
    return {key: result[name] for name, key in keys.items()}


def _by_seed(arm: Arm, seeds: set[int]) -> list[Run]:
    return sorted((run for run in arm.runs if run.seed in seeds), key=lambda run: run.seed)


def effect(records: list[Record], test: str) -> tuple[float, float, float] | None:
    """Return by how many points equalising lowers the drop on a test set, against its control, and its interval."""
    control = lookup(records, test=test, role=CONTROL)
    if control is None or control["change_pp"] is None:
        return None
    return -control["change_pp"], -control["change_high_pp"], -control["change_low_pp"]


def section(records: list[Record]) -> Section:
    """What does training on an equalised pool do to the drop?"""
    made = Section("causal", "Does the drop go when the distance goes?", sentence(records))
    caption = "Drop between the groups, and how much farther the second lies from what each model was trained on."
    made.plots.append(Plot("causal_arm", lambda theme: draw(records, theme), caption))
    for key in dict.fromkeys((r["test"], r["split"]) for r in records):
        own = [r for r in records if (r["test"], r["split"]) == key]
        first, second = own[0]["first"], own[0]["second"]
        headers = ["trained on", "pool images", first, second, "drop (points)", f"{second} farther by",
                   "drop explained by distance", "equalised − this"]  # fmt: skip
        about = f"{key[1]} on {key[0]}, n = {own[0]['num_images']:,}, {say.seeds(own)}"
        made.tables.append(Table(headers, [_row(r) for r in own], about))
    made.notes = [
        "The equalised pool lost its images that lie nearer to photos of one group than any image may lie to those of "
        "the other, class by class; the control lost as many at random, as many of every class. Drop: balanced over "
        "classes, 95 % over classes and photos. Equalised − this: paired by photo and seed, 95 % over classes, photos "
        "and seeds. Explained: the join's account of this model's drop.",
        "The images that go show what the nearer group shows, so with the distance goes a habit of the pool (a class "
        "before its usual background). A drop that shrinks says that these images make it, not whether by their "
        "nearness or by the habit that they teach.",
    ]
    return made


def _row(record: Record) -> list[object]:
    def with_interval(name: str, ends: str, style: str) -> object:
        if record[name] is None:
            return "–"
        low, high = (record[ends.format(end)] for end in ("low", "high"))
        return (say.signed(record[name], style), say.span(low, high, style), False)

    rows = "–" if record["rows"] is None else f"{record['rows']:,}"
    explained = "–" if record["explained_pp"] is None else say.signed(record["explained_pp"], ".1f")
    return [
        (record["role"], record["arm"], False), rows, say.percent(record["balanced_first"]),
        say.percent(record["balanced_second"]), with_interval("drop_pp", "drop_{}_pp", ".1f"),
        with_interval("difference", "difference_{}", ".3f"), explained,
        with_interval("change_pp", "change_{}_pp", "+.1f"),
    ]  # fmt: skip


def sentence(records: list[Record]) -> str:
    """Say what equalising did to the first test set's drop, and what the join had said before."""
    test, split = records[0]["test"], records[0]["split"]
    own = [r for r in records if (r["test"], r["split"]) == (test, split)]
    treated, control = lookup(own, role=EQUALISED), lookup(own, role=CONTROL)
    assert treated is not None  # `trials` begins with an arm of it
    text = f"Trained on {treated['rows'] or 0:,} images to which both groups lie about equally near"
    if treated["difference"] is not None and control is not None and control["difference"] is not None:
        farther = [say.signed(r["difference"], ".3f") for r in (treated, control)]
        text += f" ({treated['second']} {farther[0]} farther, {farther[1]} in the control)"
    text += f", CLIP drops {say.signed(treated['drop_pp'], '.1f')} points on {test}"
    changed = effect(own, test)
    if control is None or changed is None:
        return f"{text}; no control of the same size and classes was trained, so what pruning alone does is unknown."
    value, low, high = changed
    less = "less" if value >= 0 else "more"
    ends = (low, high) if value >= 0 else (-high, -low)
    nearer = "the images that lie nearer to one group"
    if low > 0:
        verdict = f"{nearer} make a part of the drop"
    elif high <= 0:
        verdict = f"removing {nearer} does not lower it"
    else:
        verdict = "that is within what photos and seeds do by chance"
    text += (
        f", {abs(value):.1f} {say.span(*ends)} {less} than on as many images of the same classes drawn at random "
        f"({say.signed(control['drop_pp'], '.1f')}): {verdict}."
    )
    if control["explained_pp"] is not None:
        explained = say.signed(control["explained_pp"], ".1f")
        text += f" The join's account of the control's drop gives {explained} points to distance."
    return text


def draw(records: list[Record], theme: Theme) -> Figure:
    """Two panels, a row per training set: the drop, and the groups' difference in similarity to that set."""
    several = len({(r["test"], r["split"]) for r in records}) > 1
    names = [f"{r['role']}\n{r['arm']}" + (f" · {r['test']}" if several else "") for r in records]
    figure, (left, right) = grid(2, columns=2, height=1.3 + 0.62 * len(records))
    _dots(left, records, "drop_pp", "drop_{}_pp", theme)
    _dots(right, records, "difference", "difference_{}", theme)
    left.set_yticks(-np.arange(len(records)), names)
    right.set_yticks(-np.arange(len(records)), [])
    left.set_xlabel("drop in points, 95 % over classes and photos")
    right.set_xlabel("difference of the groups' similarity, 95 %")
    left.set_title(f"drop from {records[0]['first']} to {records[0]['second']}", fontsize=11)
    right.set_title(f"how much farther {records[0]['second']} photos lie", fontsize=11)
    return figure


def _dots(axis: Axes, records: list[Record], name: str, ends: str, theme: Theme) -> None:
    for at, record in enumerate(records):
        if record[name] is None:
            continue
        colour = ORANGE if record["role"] == EQUALISED else theme.pool
        axis.hlines(-at, record[ends.format("low")], record[ends.format("high")], color=colour, lw=2.2)
        axis.plot(record[name], -at, "os"[record["role"] == EQUALISED], color=colour, ms=7.5)
    axis.axvline(0, color=theme.faint, lw=1)
    axis.set_ylim(-len(records) + 0.4, 0.6)
    axis.grid(axis="y", visible=False)
