"""Numbers about models: the Table-1-like table, pruning curves, training curves.

Every function reads a `Study` and returns records. Accuracies are fractions, `_pp` are percentage points; an interval
is Wilson's 95 % over test images, a drop's interval is over images and seeds (`kernels.intervals.paired_drop`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipgap_ray.kernels import intervals
from clipgap_ray.reporting.study import Predictions, Run, Study, aligned, positions

Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One row of the main table: runs that differ in the seed only."""

    split: str
    objective: str
    train_on: str
    model: str
    num_samples_seen: int
    runs: tuple[Run, ...]

    @property
    def supervised(self) -> bool:
        """Whether this is a baseline: a classifier trained with labels."""
        return self.objective == "supervised"

    @property
    def label(self) -> str:
        """Name for axes and rows."""
        if self.train_on == "reference":
            # Baselines differ in length only, so the length is their name.
            return f"supervised · {short(self.num_samples_seen)}" if self.supervised else "CLIP · reference only"
        where = " · without reference" if self.train_on == "pool" else ""
        return self.split + (" · supervised" if self.supervised else "") + where


def short(value: float) -> str:
    """12,500 -> 12.5k, 150,000,000 -> 150M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def arms(study: Study) -> list[Arm]:
    """Group the runs by everything but the seed, in the study's order."""
    grouped: dict[tuple[str, str, str, str, int], list[Run]] = {}
    for run in study.runs:
        key = (run.split, run.objective, run.train_on, run.model, run.num_samples_seen)
        grouped.setdefault(key, []).append(run)
    return [Arm(*key, tuple(runs)) for key, runs in grouped.items()]


def base_arm(study: Study, like: Arm | None = None) -> Arm | None:
    """Return the CLIP trained on the uncut pool; the one with the same `train_on` as `like` if there is one."""
    found = [arm for arm in arms(study) if arm.split == study.base_split and not arm.supervised]
    found = [arm for arm in found if arm.train_on != "reference"]
    if like is not None:
        found.sort(key=lambda arm: arm.train_on != like.train_on)
    return found[0] if found else None


def outcomes(study: Study, arm: Arm, test: str) -> tuple[Predictions, np.ndarray] | None:
    """Return an arm's predictions of its first seed on the n images that all seeds have, and (s, n) bool per seed and
    image; None when no run has predictions.

    Raises:
        DataError: If the seeds share no image.
    """
    found = [p for run in arm.runs if (p := study.predictions(run.name, test)) is not None]
    return aligned(found, f"{study.path('eval')}: the seeds of {arm.label} on {test}") if found else None


def correct(study: Study, arm: Arm, test: str) -> tuple[np.ndarray, list[str]] | None:
    """Return the (s, n) outcomes of an arm, and the n uids; see `outcomes`."""
    found = outcomes(study, arm, test)
    return None if found is None else (found[1], found[0].uids)


# --- the main table --------------------------------------------------------------------------------------


def accuracy(study: Study) -> list[Record]:
    """Return one record per arm and test set: accuracy, spread, interval, drop against the uncut pool."""
    records = []
    for arm in arms(study):
        recipe = study.recipes().get(arm.split, {}) if arm.train_on != "reference" else {}
        for test in study.tests:
            outcome = correct(study, arm, test)
            if outcome is None:
                continue
            records.append(
                {
                    "arm": arm.label,
                    "split": arm.split,
                    "objective": arm.objective,
                    "train_on": arm.train_on,
                    "model": arm.model,
                    "num_samples_seen": arm.num_samples_seen,
                    "kind": recipe.get("kind", ""),
                    "test": test,
                    "targeted": test in recipe.get("tests", []) and recipe.get("kind") != "full",
                    **_sizes(study, arm, recipe),
                    **_level(outcome[0]),
                    **_drop(study, arm, test, *outcome),
                }
            )
    return records


def _sizes(study: Study, arm: Arm, recipe: Record) -> Record:
    reference = study.embeddings(study.reference)
    with_reference = "reference" in arm.train_on
    counts = recipe.get("counts", {})
    return {
        "pool_rows_kept": counts.get("kept") if arm.train_on != "reference" else 0,
        "pool_rows_removed": counts.get("removed") if arm.train_on != "reference" else None,
        "reference_rows": reference.num_rows if reference is not None and with_reference else 0,
    }


def _level(right: np.ndarray) -> Record:
    """Accuracy of (s, n) outcomes: mean and spread over seeds, Wilson's interval over images."""
    spread = intervals.over_seeds(right.mean(axis=1))
    low, high = intervals.wilson(right.mean(axis=0).sum(), right.shape[1])
    return {
        "num_images": right.shape[1],
        "num_seeds": spread.num_seeds,
        "accuracy": spread.mean,
        "sd_seeds": _number(spread.sd),
        "low": float(low),
        "high": float(high),
    }


def _drop(study: Study, arm: Arm, test: str, right: np.ndarray, uids: list[str]) -> Record:
    """Drop against the uncut pool on the images that both were evaluated on."""
    names = ("drop_pp", "drop_low_pp", "drop_high_pp", "drop_se_images_pp", "drop_se_seeds_pp", "drop_relative")
    base = base_arm(study, arm)
    outcome = correct(study, base, test) if base is not None and base != arm else None
    if outcome is None:
        return dict.fromkeys(names)
    at = positions(uids, outcome[1])
    if not (at >= 0).any():
        return dict.fromkeys(names)
    before = outcome[0][:, at[at >= 0]]
    drop = intervals.paired_drop(before, right[:, at >= 0])
    values = [100 * value for value in (drop.value, drop.low, drop.high, drop.se_images, drop.se_seeds)]
    relative = drop.value / before.mean() if before.any() else float("nan")
    return dict(zip(names, map(_number, [*values, relative]), strict=True))


def lookup(records: list[Record], **wanted: Any) -> Record | None:
    """Return the first record with these values."""
    return next((r for r in records if all(r.get(key) == value for key, value in wanted.items())), None)


# --- near, far, random -----------------------------------------------------------------------------------

PRUNING_KINDS = ("near", "random", "far", "core")


def pruning_curves(study: Study, records: list[Record]) -> list[Record]:
    """Return accuracy over the rows kept for near, far, random and core splits, with the uncut pool as last point.

    Core sets with a cap per partition are a kind of their own, "capped". Where there are models of the uncut pool
    with the reference and without, those count that were trained as the models of the cuts.
    """
    recipes = study.recipes()
    full = recipes.get(study.base_split, {}).get("counts", {}).get("kept")
    clips = [record for record in records if record["objective"] == "clip" and record["train_on"] != "reference"]
    as_cut = {r["train_on"] for r in clips if recipes.get(r["split"], {}).get("kind") in PRUNING_KINDS}
    whole = [record for record in clips if record["split"] == study.base_split]
    ends = [record for record in whole if record["train_on"] in as_cut] or whole
    curves = []
    for record in clips:
        recipe = recipes.get(record["split"], {})
        kind = recipe.get("kind")
        if kind in PRUNING_KINDS:
            target = "" if kind == "random" else "+".join(recipe.get("tests", []))
            shown = "capped" if recipe.get("cap") else kind
            curves.append({**record, "kind": shown, "target": target, "rows": record["pool_rows_kept"]})
        elif record in ends and full:
            curves.append({**record, "kind": "full", "target": "", "rows": full})
    return curves


# --- training --------------------------------------------------------------------------------------------


def training_curves(study: Study) -> list[Record]:
    """Return loss over samples seen for every run that has a log."""
    return [
        {
            "run": run.name,
            "split": run.split,
            "supervised": run.objective == "supervised",
            "seed": run.seed,
            "samples": line["samples"],
            "loss": line["loss"],
            "lr": line.get("lr"),
        }
        for run in study.runs
        for line in study.metrics(run.name)
        if "samples" in line and "loss" in line
    ]


def _number(value: float) -> float | None:
    """Records have no NaN: None is empty in CSV and null in parquet."""
    return float(value) if np.isfinite(value) else None
