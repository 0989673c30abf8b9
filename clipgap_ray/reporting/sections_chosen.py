"""Sections of the pool side of a join and of chosen groups, where a study's directory holds them (`found`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.kernels.neighbours import FDR
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_groups, figures_join, figures_pool, found
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record


def _anchor(word: str, name: str) -> str:
    return "-".join(filter(None, (word, name)))


def _title(text: str, name: str) -> str:
    return f"{text} ({name})" if name else text


# --- neighbours and backgrounds --------------------------------------------------------------------------


def neighbours(study: Study, name: str, result: Record) -> Section:
    """What are the photos' nearest pool images, how common are their backgrounds? (counteranimal.md 7.3, 3, 5, 7)"""
    title = _title("Which neighbours, and which backgrounds?", name)
    models = result["models"]
    section = Section(_anchor("neighbours", name), title, _on_neighbours(result))
    near = {model: own["neighbours"] for model, own in models.items() if own.get("neighbours")}
    if near:
        caption = "Photos by what their nearest pool images are, and how often each kind is right."
        section.plots.append(Plot(_anchor("neighbours", name), partial(figures_pool.regimes, near), caption))
        section.tables.append(_neighbour_table(near))
        section.notes.append(_on_regimes(near))
    common = {model: own["prevalence"] for model, own in models.items() if own.get("prevalence")}
    if any(any(c["log_ratio"] is not None for c in own["classes"]) for own in common.values()):
        caption = "Drop of every class against how much more common its first background is among its pool images."
        section.plots.append(Plot(_anchor("prevalence", name), partial(figures_pool.prevalence, common), caption))
        section.tables.append(_prevalence_table(common, next(iter(models.values()))["groups"][0]))
    apart = {model: own["similarity_parts"] for model, own in models.items() if own.get("similarity_parts")}
    if apart:
        caption = (
            "Photos cut apart: how much farther the second group's animals and backgrounds lie, and what of the drop "
        )
        draw = partial(figures_join.similarity_parts, apart)
        section.plots.append(Plot(_anchor("similarity_parts", name), draw, caption + "each similarity explains."))
        section.notes += [_on_parts(model, own) for model, own in apart.items()]
    if "adjusted_robustness" in result:
        adjusted = result["adjusted_robustness"]
        caption = "Effective robustness before and after matching both groups on similarity; numbers are points."
        section.plots.append(
            Plot(_anchor("adjusted_robustness", name), partial(figures_pool.adjusted, adjusted), caption)
        )
        section.tables.append(_adjusted_table(adjusted))
    for model, own in models.items():
        doubt = found.not_this_study(study, own.get("inputs", {}))
        section.notes += [f"{model}: {doubt}."] if doubt else []
    return section


def _on_neighbours(result: Record) -> str:
    model, own = next(iter(result["models"].items()))
    sentences = []
    if own.get("neighbours"):
        shares = ", ".join(
            f"{say.percent(group['names_class'], 0)} for {group['group']}" for group in own["neighbours"]["groups"]
        )
        sentences.append(
            f"Of the {own['neighbours']['k']} nearest pool images of a photo, the caption names its class in {shares} "
            "photos."
        )
    common = own.get("prevalence")
    if common and common["first_more_common"]:
        more = common["first_more_common"]
        text = (
            f"In {more['count']} of {common['num_classes']} classes the pool has more images of the "
            f"{own['groups'][0]} background{_beyond_chance(common, own['groups'])}"
        )
        if common["spearman"] is not None:
            ends = say.span(common["interval"][0], common["interval"][1], ".2f") if common["interval"] else ""
            text += f"; how much more goes with the drop by Spearman {say.signed(common['spearman'], '.2f')} {ends}"
        sentences.append(f"{text.rstrip()}.")
    if "adjusted_robustness" in result:
        others = [
            m
            for m in result["adjusted_robustness"]["models"]
            if not m["baseline"] and m["matched_residual_pp"] is not None
        ]
        if others:
            most = max(others, key=lambda m: abs(m["all_residual_pp"] - m["matched_residual_pp"]))
            sentences.append(
                f"Matching on similarity moves {most['model']} from {say.points(most['all_residual_pp'])} to "
                f"{say.points(most['matched_residual_pp'])} off the baselines' line."
            )
    return " ".join(sentences) or f"{model}: the pool says nothing about these photos."


def _beyond_chance(common: Record, groups: list[str]) -> str:
    """How many classes are no accident; joins of earlier versions do not say."""
    if "first_beyond_chance" not in common:
        return ""
    first, second = common["first_beyond_chance"], common["second_beyond_chance"]
    if not first and not second:
        return ", in none beyond chance"
    other = f", of the {groups[1]} one in {second}" if second else ""
    return f", beyond chance in {first}{other}"


def _on_parts(model: str, own: Record) -> str:
    """Whether animals differ already, in which case the drop is not the background's alone."""
    differ = [
        r["part"] for r in own["parts"][1:] if not r["exposure"]["interval"][0] <= 0 <= r["exposure"]["interval"][1]
    ]
    said = f"the groups differ in {' and '.join(differ)}" if differ else "the groups differ in neither part"
    return (
        f"{model}: {said} (95 % interval), on {own['num_images']:,} photos that have all parts. Where the foregrounds "
        "differ already, the drop is not the background's alone."
    )


def _neighbour_table(near: dict[str, Record]) -> Table:
    rows: list[list[Any]] = []
    for model, own in near.items():
        for group in own["groups"]:
            regimes = [_regime(r) for r in group["regimes"]]
            shares = [say.percent(group[key], 0) for key in ("names_class", "same_background", "names_wrong")]
            rows.append([model, group["group"], f"{group['num_images']:,}", *shares, *regimes])
    names = [r["regime"] for r in next(iter(near.values()))["groups"][0]["regimes"]]
    headers = ["model", "group", "photos", "name the class", "same background", "name the wrong class", *names]
    caption = "Mean shares of a photo's nearest pool images; then photos and accuracy of each kind (Wilson's 95 %)."
    return Table(headers, rows, caption)


def _regime(regime: Record) -> Any:
    if not regime["num_images"]:
        return "–"
    text = f"{regime['num_images']:,} · {say.percent(regime['accuracy'], 0)}"
    return (text, say.span(100 * regime["low"], 100 * regime["high"], ".0f"), False)


def _on_regimes(near: dict[str, Record]) -> str:
    first = next(iter(near.values()))
    return (
        f"Never seen: farther than {first['far']:.3f} from the pool and no neighbour names the class. Wrong caption: "
        "near, but no neighbour names it. Other background: some do, none before this background. Well covered: the "
        "rest. The wrong class is the one that the model gave, over the photos that it got wrong."
    )


def _prevalence_table(common: dict[str, Record], first: str) -> Table:
    rows: list[list[Any]] = []
    for model, own in common.items():
        more = own["first_more_common"]
        cells: list[Any] = ["–", str(own.get("first_beyond_chance", "–")), "–", "–"]
        if more is not None:
            ends = say.span(100 * more["low"], 100 * more["high"], ".0f")
            cells[0] = (f"{more['count']} ({say.percent(more['rate'], 0)})", ends, False)
        if own["spearman"] is not None:
            ends = say.span(own["interval"][0], own["interval"][1], ".2f") if own["interval"] else ""
            cells[2:] = [(say.signed(own["spearman"], ".2f"), ends, False), f"{own['p']:.2g}"]
        rows.append([model, str(own["num_classes"]), *cells])
    headers = ["model", "classes", f"{first} background more common", "beyond chance", "Spearman with the drop", "p"]
    caption = (
        "Backgrounds among the pool images whose caption names the class. Beyond chance: exact binomial test, "
        f"false discovery rate {say.percent(FDR, 0)} over the classes."
    )
    return Table(headers, rows, caption)


def _adjusted_table(result: Record) -> Table:
    first, second = result["groups"]
    rows = []
    for m in result["models"]:
        row: list[Any] = [("◆ " if m["baseline"] else "") + m["model"]]
        for kind in ("all", "matched"):
            row += [say.percent(m[f"{kind}_{group}"]) for group in (first, second)]
            value = m[f"{kind}_residual_pp"]
            row.append("–" if value is None else
                       (say.signed(value), "extrapolated" if m[f"{kind}_extrapolates"] else "", False))  # fmt: skip
        rows.append(row)
    headers = [
        "model",
        f"all: {first}",
        second,
        "robustness (points)",
        f"matched: {first}",
        second,
        "robustness (points)",
    ]
    return Table(headers, rows, "Points above the line of the baselines (◆), all photos and pairs of equal similarity.")


# --- chosen groups ---------------------------------------------------------------------------------------


def selection(study: Study, name: str, result: Record) -> Section:
    """What does choosing the groups add to their drop? (counteranimal.md 7.3, item 8)"""
    title = _title("How much of a drop is choosing the groups?", name)
    section = Section(_anchor("selection", name), title, _on_selection(result))
    models = list(result["models"])
    caption = (
        "Drop from the best to the worst background, who chose them against who is evaluated: on the photos that "
        "chose, and on the other half."
    )
    draw = partial(figures_groups.matrix, result["matrix"], models)
    section.plots.append(Plot(_anchor("selection", name), draw, caption))
    rows: list[list[Any]] = [
        [model, _points(own["same_photos_drop_pp"]),
         "–" if own["held_out_drop_pp"] is None else
         (_points(own["held_out_drop_pp"]), say.span(*own["held_out_interval_pp"]), False),
         _points(own["inflation_pp"])]
        for model, own in result["models"].items()
    ]  # fmt: skip
    headers = ["chosen by and evaluated with", "same photos", "held-out half", "inflation"]
    section.tables.append(Table(headers, rows, "Points; 95 % over classes."))
    rows = [
        [c["class_name"], c["common"], c["counter"], _points(c["gap_pp"]), _points(c["held_out_drop_pp"]),
         *("–" if c[key] is None else f"{c[key]:.3f}" for key in "pq"), "yes" if c["kept"] else "no"]
        for c in result["classes"] if c["common"] is not None
    ]  # fmt: skip
    headers = ["class", "best", "worst", "gap (points)", "held out", "p", "q", "kept"]
    section.tables.append(
        Table(headers, rows, f"Backgrounds that {result['by']} is best and worst at, class by class.")
    )
    section.notes = [
        "Inflation: what choosing and evaluating on the same photos adds. p: share of random deals of the class's "
        "photos with so large a gap; q: the false discovery rate (Benjamini and Hochberg) at which the class survives."
    ]
    doubt = found.not_this_study(study, result["inputs"])
    section.notes += [f"This was {doubt}."] if doubt else []
    return section


def _on_selection(result: Record) -> str:
    by, own = result["by"], result["models"][result["by"]]
    kept = f"{result['num_classes_kept']} of {result['num_classes_with_groups']} classes"
    if own["held_out_drop_pp"] is None or own["inflation_pp"] is None:
        return f"{kept} have a difference that is more than chance; too few photos to evaluate on a held-out half."
    others = [cell["held_out_drop_pp"] for cell in result["matrix"]
              if cell["discovered_by"] == by != cell["evaluated"] and cell["held_out_drop_pp"] is not None]  # fmt: skip
    text = (
        f"Between backgrounds that {by} chose it drops {_points(own['same_photos_drop_pp'])} points on those photos "
        f"and {_points(own['held_out_drop_pp'])} {say.span(*own['held_out_interval_pp'])} on others: "
        f"{_points(own['inflation_pp'])} points are selection"
    )
    if others:
        text += f"; other models drop {_points(min(others))} to {_points(max(others))} there" if len(others) > 1 else (
            f"; the other model drops {_points(others[0])} there"
        )  # fmt: skip
    return f"{text}. {kept} have a difference that is more than chance."


def _points(value: float | None) -> str:
    return "–" if value is None else say.signed(value, ".1f")
