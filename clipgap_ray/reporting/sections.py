"""The sections of the page in their order: each a sentence, then figures, tables and pictures, or why there is none."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.reporting import (
    causal,
    core_sets,
    density,
    fewshot,
    figures,
    figures_models,
    galleries,
    prompts,
    sections_found,
    sections_groups,
    sections_robustness,
    sections_shift,
)
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record, short


def build(study: Study, numbers: Numbers, pictures: galleries.Thumbnails, gallery_rows: int) -> list[Section]:
    """Return all sections in the order of the page; those with a condition are extras, which no study lacks."""
    return [
        _headline(study, numbers),
        _main_table(study, numbers),
        _histograms(numbers),
        _accuracy_by_similarity(numbers),
        _pruning(numbers),
        *([core_sets.section(numbers.core_sets)] if numbers.core_sets else []),
        *([_fewshot(study, numbers)] if numbers.fewshot else []),
        sections_robustness.section(study, numbers),
        _galleries(study, pictures, gallery_rows),
        _gap_check(numbers),
        _density(numbers),
        _removed(study, numbers),
        *sections_shift.sections(study, numbers),
        *([sections_groups.asked(numbers)] if numbers.variants else []),
        sections_groups.join(numbers),
        *([causal.section(numbers.trials)] if numbers.trials else []),
        *([sections_groups.hypotheses(numbers)] if numbers.hypotheses else []),
        *sections_found.build(study, numbers),
        _training(numbers),
    ]


def _headline(study: Study, numbers: Numbers) -> Section:
    answers = [
        ("How close is the pool to the test sets?", say.on_closeness(numbers.closeness)),
        ("Does closeness explain the accuracy?",
         say.on_gap_matching(numbers.accuracy, numbers.panels, study.main_test)),
        ("Which images matter at equal size?", say.on_pruning(numbers.curves)),
    ]  # fmt: skip
    return Section("answers", "Answers", "", answers=answers)


def _main_table(study: Study, numbers: Numbers) -> Section:
    section = Section("table", "Training sets and test sets", say.on_table(numbers.accuracy))
    if not numbers.accuracy:
        section.missing = "no model has been evaluated: run `clipgap evaluate`"
        return section
    tests = [test for test in study.tests if any(r["test"] == test for r in numbers.accuracy)]
    keys = ("arm", "model", "num_samples_seen", "objective", "train_on", "split")
    rows = []
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in numbers.accuracy):
        own = {r["test"]: r for r in numbers.accuracy if tuple(r[k] for k in keys) == key}
        rows.append(_arm_row(next(iter(own.values())), [own.get(test) for test in tests]))
    headers = ["training set", "pool images", "samples", *tests]
    section.tables.append(Table(headers, rows, "Top-1 accuracy in percent: " + _how(numbers.accuracy)))
    section.notes = [
        "Δ: change against the full pool in points with its 95 % interval over images and seeds (paired by "
        "image), and relative to the full pool's accuracy. Framed: the test set that a cut is aimed at. ◆ marks "
        "supervised baselines.",
        *filter(None, [prompts.caution(numbers.prompts, tests)]),
    ]
    return section


def _how(records: list[Record]) -> str:
    if all(r["sd_seeds"] is not None for r in records):
        return f"mean ± standard deviation over {say.seeds(records)}."
    if any(r["sd_seeds"] is not None for r in records):
        return "mean ± standard deviation where there are several seeds, else the value with Wilson's 95 % interval."
    return "one seed each; brackets are Wilson's 95 % interval over test images."


def _arm_row(first: Record, cells: list[Record | None]) -> list[Any]:
    mark = "◆ " if first["objective"] == "supervised" else ""
    reference = f"+ {first['reference_rows']:,} reference" if first["reference_rows"] else ""
    kept, removed = first["pool_rows_kept"], first["pool_rows_removed"]
    gone = f"−{removed:,} removed" if removed else ""
    row: list[Any] = [
        (mark + first["arm"], f"{first['model']}, {say.seeds([first])}".strip(", "), False),
        ("–" if kept is None else f"{kept:,}", "\n".join(filter(None, (gone, reference))), False),
        short(first["num_samples_seen"]),
    ]
    for cell in cells:
        if cell is None:
            row.append("–")
            continue
        row.append((*_cell_text(cell), cell["targeted"]))
    return row


def _cell_text(cell: Record) -> tuple[str, str]:
    """Accuracy in percent, and below it interval, change and relative change, a line each."""
    main, small = f"{100 * cell['accuracy']:.1f}", []
    if cell["sd_seeds"] is not None:
        main += f" ± {100 * cell['sd_seeds']:.1f}"
    else:
        small.append(say.span(100 * cell["low"], 100 * cell["high"]))
    if cell["drop_pp"] is not None:
        small.append("Δ " + say.change(cell).replace("\u00a0points ", "\n"))
        if cell["drop_relative"] is not None:
            small.append(f"{say.signed(-100 * cell['drop_relative'])} % rel.")
    return main, "\n".join(small)


def _histograms(numbers: Numbers) -> Section:
    section = Section("similarity", "Similarity to pool and reference", say.on_closeness(numbers.closeness))
    if not numbers.histograms:
        section.missing = "no query scores: run `clipgap score`"
        return section
    draw = partial(figures.similarity_histograms, numbers.histograms, numbers.closeness)
    caption = "Similarity of every test image to its nearest image in the pool and in the reference."
    section.plots.append(Plot("similarity_histograms", draw, caption))
    if numbers.pool_histograms:
        draw = partial(figures.pool_histograms, numbers.pool_histograms)
        caption = "The other way round: similarity m of every pool image to its nearest test image. Near-pruning cuts "
        section.plots.append(
            Plot("pool_similarity_histograms", draw, caption + "from the right, far-pruning from the left.")
        )
    rows: list[list[Any]] = [
        [r["test"], f"{r['num_images']:,}", f"{r['median_pool']:.3f}",
         "–" if r["median_reference"] is None else f"{r['median_reference']:.3f}",
         "–" if r["share_closer_to_pool"] is None else
         f"{say.percent(r['share_closer_to_pool'])} {say.span(100 * r['share_low'], 100 * r['share_high'])}"]
        for r in numbers.closeness
    ]  # fmt: skip
    headers = ["test set", "n", "median to pool", "median to reference", "closer to pool (Wilson 95 %)"]
    section.tables.append(Table(headers, rows))
    return section


def _accuracy_by_similarity(numbers: Numbers) -> Section:
    sentence = say.on_accuracy_by_similarity(numbers.bins, numbers.correlations)
    section = Section("accuracy-similarity", "Accuracy against similarity", sentence)
    if not numbers.bins:
        section.missing = "needs query scores and predictions of the full pool's model: run `clipgap evaluate`"
        return section
    caption = "Accuracy per bin of similarity to the full pool; bars and small numbers are test images per bin."
    section.plots.append(Plot("accuracy_by_similarity", partial(figures.accuracy_curves, numbers.bins), caption))
    width = numbers.bins[0]["high_similarity"] - numbers.bins[0]["low_similarity"]
    section.notes = [
        f"Bins of {width:.3g}, intervals: Wilson 95 % over images. Similarity goes with what a class looks like and "
        "how often it occurs, so a rising curve alone shows no cause."
    ]
    return section


def _pruning(numbers: Numbers) -> Section:
    section = Section("pruning", "Near, random and far pruning", say.on_pruning(numbers.curves))
    if not any(c["kind"] in ("near", "far", "random") for c in numbers.curves):
        section.missing = "no near, far or random split has been evaluated: run `clipgap split near`, then train"
        return section
    caption = "Accuracy after keeping a part of the pool. Near-pruned keeps the least similar images."
    section.plots.append(Plot("pruning_curves", partial(figures_models.pruning_curves, numbers.curves), caption))
    bars = "standard deviation over seeds" if all(c["num_seeds"] > 1 for c in numbers.curves) else "Wilson 95 %"
    section.notes = [f"Error bars: {bars}, {say.seeds(numbers.curves)}."]
    return section


def _fewshot(study: Study, numbers: Numbers) -> Section:
    records = numbers.fewshot
    section = Section("few-shot", "Few shots and linear probes", fewshot.sentence(records, study.main_test,
                                                                                 study.base_split))  # fmt: skip
    caption = "Accuracy of a classifier on frozen features over labelled images per class, drawn from the reference."
    if any(r["k"] for r in records):
        section.plots.append(Plot("fewshot_curves", partial(fewshot.draw, records), caption))
    headers, rows = fewshot.table(records, numbers.accuracy, study.base_split)
    section.tables.append(
        Table(headers, rows, "Accuracy in percent beside zero-shot; Δ: points against the full pool.")
    )
    several = all(r["num_draws"] > 1 for r in records)
    bars = "standard deviation over draws and training seeds" + ("" if several else ", Wilson 95 % where there is one")
    section.notes = [f"Error bars: {bars}. The same seeds draw the same images for every model."]
    return section


def _galleries(study: Study, pictures: galleries.Thumbnails, count: int) -> Section:
    section = Section("galleries", "What the similarities look like", "")
    for test in study.tests:
        strips = galleries.neighbours(study, pictures, test, count)
        if strips:
            section.strips[test] = strips
    if not section.strips:
        section.missing = "no query scores: run `clipgap score`"
        return section
    # The best example is a shifted set that the cut is aimed at.
    for test in sorted(section.strips, key=lambda t: (study.gap_matched(t) is None, t == study.main_test))[:1]:
        rungs = galleries.ladder(study, pictures, test)
        if rungs is not None:
            section.strips[f"Similarity ladder: one {test} image, pool images from its nearest to the median"] = [rungs]
    shown = sum(bool(tile.image) for strips in section.strips.values() for s in strips for tile in s.tiles)
    section.conclusion = (
        f"{shown} pictures: test images from the most affected by the cut (top) to the median, with their nearest "
        "images and similarities."
    )
    return section


def _gap_check(numbers: Numbers) -> Section:
    section = Section("gap-check", "Is the gap matched?", say.on_gap_check(numbers.checks))
    if not numbers.checks:
        section.missing = "no gaps/<split>/<test>.parquet for a gap-matched split"
        return section
    rows = [[c["split"], c["test"], f"{c['num_points']:,}", f"{c['num_equal']:,}", f"{c['max_deviation']:.3g}",
             f"{c['num_violations']:,}"] for c in numbers.checks]  # fmt: skip
    headers = ["split", "test set", "test points", "gap equals reference's", "largest deviation", "above"]
    section.tables.append(Table([*headers], rows, "Gap after the cut = max(tau, nearest kept pool image)."))
    return section


def _density(numbers: Numbers) -> Section:
    section = Section("density", "Is it denser where it is no closer?", density.sentence(numbers.density))
    if not numbers.density:
        section.missing = "no gaps/diagnostics.json: run `clipgap gaps`"
        return section
    caption = "Median similarity of the k-th nearest image, over test images."
    section.plots.append(Plot("neighbour_curves", partial(density.draw, numbers.density), caption))
    within = {(r["test"], r["kind"]): r["mean_rows_within"] for r in numbers.density}
    rows = [
        [
            test,
            *(
                "–" if within.get((test, kind)) is None else f"{within[test, kind]:,.1f}"
                for kind in ("pool", "gap-match", "reference")
            ),
        ]
        for test in dict.fromkeys(r["test"] for r in numbers.density)
    ]
    delta = f"{numbers.density[0]['delta']:g}"
    caption = f"Images within {delta} of a test image's hull (similarity > tau - {delta}), mean over test images."
    section.tables.append(Table(["test set", "pool before the cut", "after", "reference"], rows, caption))
    return section


def _removed(study: Study, numbers: Numbers) -> Section:
    sentence = say.on_removed(numbers.removed_per_class, study.recipes())
    section = Section("removed", "What gap matching removes", sentence)
    if not any(r["num_removed"] for r in numbers.removed_per_class):
        section.missing = "no pool scores with thresholds for a gap-matched split, or nothing was removed"
        return section
    draw = partial(figures.removed_rows, numbers.removed_per_class)
    section.plots.append(Plot("removed_per_class", draw, "Pool images removed per test image, by class."))
    draw = partial(figures.removed_per_image, numbers.removed_per_image, numbers.removed_per_class)
    section.plots.append(Plot("removed_per_image", draw, "How many pool images single test images remove."))
    section.notes = ["A removed pool image counts for the test image whose threshold it exceeds most, from the stored "
                     "float32 scores; the sizes in the table above are exact."]  # fmt: skip
    return section


def _training(numbers: Numbers) -> Section:
    if not numbers.training:
        return Section("training", "Training", "", missing="no runs/<run>/metrics.jsonl")
    section = Section("training", "Training", say.on_training(numbers.training))
    draw = partial(figures.training_curves, numbers.training)
    section.plots.append(Plot("training_curves", draw, "Training loss over samples seen."))
    return section
