"""Numbers about groups of test sets: accuracy per class and group, and the drop from the base to every other group.

Accuracies are fractions, `_pp` are percentage points; intervals of accuracies are Wilson's 95 % over photos, those of
drops are bootstraps (`kernels.shift`).
"""

from __future__ import annotations

import numpy as np

from clipgap_ray.kernels import intervals, shift
from clipgap_ray.reporting import groups
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record, arms


def group_shift(study: Study, draws: int, seed: int) -> list[Record]:
    """Return the drop of every arm from the base to every other group of every grouped test set; seeds are pooled.

    Returns:
        Records of `shift.summarise` with `test, arm, model, supervised, compared, num_seeds, num_samples_seen`, by test
        set and arm; `compared` marks the pair of `groups.compared`. A group without a class of the base has none.
    """
    records = []
    for test in study.tests:
        base, *others = groups.of_test(study, test) or ("",)
        for arm in arms(study):
            found = groups.counted(study, arm, test) if others else None
            if found is None:
                continue
            counts, num_seeds = found
            for other in others:
                if not groups.comparable(counts, (base, other)):
                    continue
                result = shift.summarise(counts, np.random.default_rng(seed), (base, other), draws)
                about = {"test": test, "arm": arm.label, "model": arm.model, "supervised": arm.supervised}
                records.append({**about, "compared": (base, other) == groups.compared(study, test), **result})
                records[-1]["num_seeds"] = num_seeds
                records[-1]["num_samples_seen"] = arm.num_samples_seen
    return records


def group_accuracy(study: Study) -> list[Record]:
    """Return the accuracy of every arm per class and group of every grouped test set.

    Returns:
        Records `test, arm, model, supervised, num_samples_seen, class_name, group, num_images, accuracy, low, high`
        (Wilson), groups in the order of the page; cells without a photo are left out. Seeds are pooled.
    """
    records = []
    for test in study.tests:
        names = groups.of_test(study, test)
        for arm in arms(study):
            found = groups.counted(study, arm, test) if names else None
            if found is None:
                continue
            counts = found[0]
            accuracy = counts.accuracy()
            low, high = intervals.wilson(counts.hits, counts.totals)
            about = {"test": test, "arm": arm.label, "model": arm.model, "supervised": arm.supervised,
                     "num_samples_seen": arm.num_samples_seen}  # fmt: skip
            for row, class_name in enumerate(counts.classes):
                for name in (name for name in names if name in counts.groups):
                    at = counts.groups.index(name)
                    if counts.totals[row, at]:
                        records.append(
                            {**about, "class_name": class_name, "group": name,
                             "num_images": int(counts.totals[row, at]), "accuracy": float(accuracy[row, at]),
                             "low": float(low[row, at]), "high": float(high[row, at])}
                        )  # fmt: skip
    return records


def flat_group(result: Record) -> Record:
    """Return one line per model: what `kernels.shift.summarise` nests, behind what is said about the model."""
    about = ("test", "model", "arm", "supervised", "num_seeds", "num_samples_seen")
    worst = result["worst_class_group"]
    line: Record = {key: result[key] for key in about if key in result}
    line |= {"first": result["groups"][0], "second": result["groups"][1]}
    line |= {f"{group}_n": result["num_images"][group] for group in result["groups"]}
    line |= {f"balanced_{name}": value for name, value in result["balanced"].items()}
    line |= {f"unbalanced_{name}": value for name, value in result["unbalanced"].items()}
    line |= result["drop"]
    for name, key in (("drop", "drop_pp"), ("unbalanced_drop", "unbalanced_drop_pp"), ("relative", "relative"),
                      ("log_odds", "log_odds")):  # fmt: skip
        for over in ("images", "classes"):
            if f"{key}_{over}" not in result["intervals"]:
                continue
            low, high = result["intervals"][f"{key}_{over}"] or (None, None)
            unit = "_pp" if key.endswith("_pp") else ""
            line |= {f"{name}_low{unit}_{over}": low, f"{name}_high{unit}_{over}": high}
    return line | {
        "worst_class_group": f"{worst['class_name']} / {worst['group']}",
        "worst_class_group_accuracy": worst["accuracy"],
        "num_classes": result["num_classes"],
        "num_negative_drops": result["num_negative_drops"],
        "num_insignificant_drops": result["num_insignificant_drops"],
    }
