"""What a study must have found: checked from its tables, written to report/findings.json, asserted on request.

* `gap`: after gap-matching, the gap max(tau, nearest kept) equals tau for every matched test point. Always asserted:
  it is arithmetic, not statistics (train_test_similarity.md 1.4).
* `near < random < far` on the test sets they were cut for, at equal size.
* `gap-<test>` lowers that test set and leaves the main one within two standard errors over seeds and images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipgap_ray import store
from clipgap_ray.errors import DataError


def run(study: str, assert_effects: bool) -> list[dict[str, Any]]:
    """Check a study's findings.

    Args:
        study: The study's directory, with study.json, splits/, gaps/ and eval/.
        assert_effects: Fail on a statistical finding, too.

    Returns:
        Records {finding, holds, asserted, numbers}; `check` raises for those that are asserted and do not hold.
    """
    info = store.read_json(f"{study}/study.json")
    recipes = {name: store.read_json(f"{study}/splits/{name}.recipe.json") for name in info["splits"]}
    records = [_gap(study, name, recipe) for name, recipe in recipes.items() if recipe["kind"] == "gap-match"]
    records += _orders(study, info, recipes, assert_effects)
    with_base = bool(_accuracies(study, info, "full", "", "pool+reference"))
    records += [
        _lowers(study, info, recipe, assert_effects)
        for recipe in recipes.values()
        if recipe["kind"] == "gap-match"
        and len(recipe["tests"]) == 1
        and with_base
        and _accuracies(study, info, recipe["name"], "", "pool+reference")
    ]
    store.write_json(f"{study}/report/findings.json", records)
    return records


def check(study: str, records: list[dict[str, Any]]) -> None:
    """Fail on the first asserted finding that does not hold; a study does so after its report is written.

    Raises:
        DataError: With the finding and its numbers.
    """
    failed = [record for record in records if record["asserted"] and not record["holds"]]
    if failed:
        raise DataError(
            f"{study}: {len(failed)} findings do not hold, first: {failed[0]['finding']}: {failed[0]['numbers']}",
            hint=f"see {study}/report/findings.json",
        )


def _gap(study: str, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    points, over = 0, 0
    for test in recipe["tests"]:
        table = store.read_table(f"{study}/gaps/{name}/{test}.parquet", ["tau", "gap"])
        excess = table.column("gap").to_numpy() - table.column("tau").to_numpy()
        points += len(excess)
        over += int((excess > recipe["slack"]).sum())
    return {
        "finding": f"{name}: the gap equals the reference's for every test point",
        "holds": over == 0,
        "asserted": True,
        "numbers": {"test_points": points, "above_tau": over},
    }


def _accuracies(study: str, info: dict[str, Any], split: str, test: str, train_on: str = "") -> list[float]:
    """acc1 of a split's CLIP on a test set, one per seed; with an empty test only whether runs exist."""
    runs = [
        run
        for run in info["runs"]
        if run["split"] == split and run["objective"] == "clip" and run["train_on"] == (train_on or run["train_on"])
        and run["train_on"] != "reference"
    ]  # fmt: skip
    if not test:
        return [0.0] * len(runs)
    return [store.read_json(f"{study}/eval/{run['name']}/{test}.json")["metrics"]["acc1"] for run in runs]


def _orders(
    study: str, info: dict[str, Any], recipes: dict[str, dict[str, Any]], asserted: bool
) -> list[dict[str, Any]]:
    """near < random < far for every triple of equal size that was trained."""
    records = []
    for near in recipes.values():
        if near["kind"] != "near":
            continue
        kept = near["counts"]["kept"]
        far = _find(recipes, "far", kept, near["tests"])
        rand = _find(recipes, "random", kept, [])
        if far is None or rand is None:
            continue
        test = near["tests"][0]
        means = [_mean(_accuracies(study, info, recipe["name"], test)) for recipe in (near, rand, far)]
        if any(math.isnan(mean) for mean in means):
            continue
        records.append(
            {
                "finding": f"{near['name']} < {rand['name']} < {far['name']} on {test}",
                "holds": means[0] < means[1] < means[2],
                "asserted": asserted,
                "numbers": dict(zip(("near", "random", "far"), means, strict=True)) | {"kept": kept},
            }
        )
    return records


def _find(recipes: dict[str, dict[str, Any]], kind: str, kept: int, tests: list[str]) -> dict[str, Any] | None:
    return next(
        (r for r in recipes.values() if r["kind"] == kind and r["counts"]["kept"] == kept and r["tests"] == tests), None
    )


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _lowers(study: str, info: dict[str, Any], recipe: dict[str, Any], asserted: bool) -> dict[str, Any]:
    """The matched test set drops by more than two standard errors; the main one stays within two."""
    test, main = recipe["tests"][0], info["main_test"]
    drops = {}
    for name in (test, main):
        before = _accuracies(study, info, "full", name, "pool+reference")
        after = _accuracies(study, info, recipe["name"], name, "pool+reference")
        drops[name] = _drop(before, after, _num_images(study, info, name))
    lowered = test == main or drops[test]["drop"] > 2 * drops[test]["standard_error"]
    main_stays = test == main or abs(drops[main]["drop"]) <= 2 * drops[main]["standard_error"]
    return {
        "finding": f"{recipe['name']} lowers {test} and leaves {main} within two standard errors",
        "holds": bool(lowered and main_stays),
        "asserted": asserted and test in ("sketch", "r"),
        "numbers": drops,
    }


def _num_images(study: str, info: dict[str, Any], test: str) -> int:
    return int(store.read_json(f"{study}/eval/{info['runs'][0]['name']}/{test}.json")["num_samples"])


def _drop(before: list[float], after: list[float], images: int) -> dict[str, float]:
    """Return the mean drop and its standard error over seeds and images (binomial variance within each seed)."""
    if not before or not after:
        return {"drop": math.nan, "standard_error": math.nan}

    def variance(values: list[float]) -> float:
        mean = _mean(values)
        seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
        return seeds + mean * (1 - mean) / images

    return {"drop": _mean(before) - _mean(after), "standard_error": math.sqrt(variance(before) + variance(after))}
