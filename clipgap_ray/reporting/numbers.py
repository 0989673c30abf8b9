"""Everything a report prints, computed once: one field per exported table."""

from __future__ import annotations

from dataclasses import dataclass

from clipgap_ray.reporting import (
    causal,
    core_sets,
    density,
    fewshot,
    found,
    hypotheses,
    joined,
    planted,
    prompts,
    robust,
    similarity,
    tables,
    tables_groups,
    variants,
)  # fmt: skip
from clipgap_ray.reporting.robust import RobustnessPanel
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record


@dataclass(frozen=True)
class Numbers:
    """Records by subject; see the functions of `tables`, `similarity` and `planted` that make them."""

    accuracy: list[Record]
    closeness: list[Record]
    histograms: list[Record]
    pool_histograms: list[Record]
    bins: list[Record]
    correlations: list[Record]
    curves: list[Record]
    core_sets: list[Record]
    panels: list[RobustnessPanel]
    checks: list[Record]
    density: list[Record]
    removed_per_image: list[Record]
    removed_per_class: list[Record]
    groups: list[Record]
    group_accuracy: list[Record]
    variants: list[Record]
    prompts: list[Record]
    exposure: list[Record]
    joins: list[Record]
    trials: list[Record]
    hypotheses: list[Record]
    fewshot: list[Record]
    training: list[Record]
    planted: list[Record]
    duplicates: list[Record]
    removed_duplicates: list[Record]
    agreements: list[Record]
    chosen: dict[str, list[Record]]
    digests: list[Record]

    def exports(self) -> dict[str, list[Record]]:
        """Return the tables that are written as CSV and parquet, by file name."""
        robustness = [point for panel in self.panels for point in panel.points]
        per_class = [
            {**{key: g[key] for key in ("test", "arm", "model", "num_samples_seen")},
             "first": g["groups"][0], "second": g["groups"][1], **row}
            for g in self.groups
            for row in g["classes"]
        ]  # fmt: skip
        return {
            "accuracy": self.accuracy,
            "closeness": self.closeness,
            "similarity_histograms": self.histograms,
            "pool_similarity_histograms": self.pool_histograms,
            "accuracy_by_similarity": self.bins,
            "similarity_correlations": self.correlations,
            "pruning_curves": self.curves,
            "core_sets": self.core_sets,
            "effective_robustness": robustness,
            "effective_robustness_lines": [{"test": p.test, **line} for p in self.panels for line in p.axes],
            "effective_robustness_leave_one_out": [{"test": p.test, **line} for p in self.panels for line in p.without],
            "gap_check": self.checks,
            "neighbour_curves": self.density,
            "removed_per_image": self.removed_per_image,
            "removed_per_class": self.removed_per_class,
            "group_accuracy": self.group_accuracy,
            "group_shift": [tables_groups.flat_group(g) for g in self.groups],
            "group_shift_per_class": per_class,
            "group_shift_variants": self.variants,
            "prompts": self.prompts,
            "group_exposure": self.exposure,
            "group_drop_and_similarity": [joined.flat(r) for r in self.joins],
            "group_drop_and_similarity_per_class": [
                {"test": r["test"], "arm": r["arm"], **row} for r in self.joins for row in r["classes"]
            ],
            "equalised_pool": self.trials,
            "hypotheses": self.hypotheses,
            "fewshot_curves": self.fewshot,
            "training_curves": self.training,
            "planted_truth": self.planted,
            "duplicate_rates": self.duplicates,
            "deduplication": self.removed_duplicates,
            "encoder_agreement": self.agreements,
            **self.chosen,
            "digests": self.digests,
        }


def compute(study: Study, bin_width: float, draws: int, seed: int) -> Numbers:
    """Compute all tables of a study.

    Args:
        study: The study.
        bin_width: Largest width of the similarity bins.
        draws: Bootstrap samples.
        seed: Seed of the bootstraps.
    """
    accuracy = tables.accuracy(study)
    per_image, per_class = similarity.removed(study)
    drops = joined.joins(study, draws, seed)
    shifts = tables_groups.group_shift(study, draws, seed)
    trials = causal.trials(study, shifts, drops, draws, seed)
    return Numbers(
        accuracy=accuracy,
        closeness=similarity.closeness(study),
        histograms=similarity.histograms(study),
        pool_histograms=similarity.pool_histograms(study),
        bins=similarity.accuracy_by_similarity(study, similarity.bin_width(study, bin_width)),
        correlations=similarity.rank_correlations(study, draws, seed),
        curves=tables.pruning_curves(study, accuracy),
        core_sets=core_sets.changes(study),
        panels=robust.panels(study, accuracy, draws, seed),
        checks=similarity.gap_check(study),
        density=density.neighbour_curves(study),
        removed_per_image=per_image,
        removed_per_class=per_class,
        groups=shifts,
        group_accuracy=tables_groups.group_accuracy(study),
        variants=variants.of_study(study, draws, seed),
        prompts=prompts.asked_with(study),
        exposure=similarity.exposure(study),
        joins=drops,
        trials=trials,
        hypotheses=hypotheses.table(drops, trials, found.joins(study), found.selections(study)),
        fewshot=fewshot.curves(study),
        training=tables.training_curves(study),
        planted=planted.planted(study),
        duplicates=found.duplicates(study),
        removed_duplicates=found.removed_duplicates(study),
        agreements=found.agreements(study),
        chosen=found.chosen(study),
        digests=list(study.digests()),
    )
