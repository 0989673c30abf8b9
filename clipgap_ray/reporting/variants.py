"""One model asked in several ways: prompts, candidate labels and weighting side by side (counteranimal.md 3 and 8).

A drop between groups hangs on how the model was asked: 80 prompts against one, 20 candidates against all names,
classes weighted alike against photos weighted alike. `evaluate` leaves every way as a result of its own; here they
become rows beside the first, paired by photo.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from clipgap_ray import store
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import shift, shift_change
from clipgap_ray.reporting import groups, tables
from clipgap_ray.reporting.study import Predictions, Study, aligned, positions
from clipgap_ray.reporting.tables import Record

# What `evaluate` stores of the prompts is their digest; tests compare these with open_clip's lists.
PROMPTS = {
    "b0060e7dc3e5b1d88f6e2f8762bf3a36019b9cdbbe7af7bb22cf540396c9336d": "A photo of {c}.",
    "7533b9c5dfa109c25de08ba5da34f31c77d4f8cd284344f8c42e06a1786b7e3a": "a photo of a {c}.",
    "2232c7c5ea53d860f4ffcee7e4d768aa2c9b5f1980fca849eb6237f5ef33acf5": "OpenAI's 80",
    "c3a02c3f9ef4e95c84ce97571da6f2b90909d9f0da374a4afc9caef50deba994": "OpenAI's 7",
}
LISTS = re.compile(r"-1v(\d+)\Z")
FIRST = "as evaluated"


def describe(result: Record | None, first: Record | None) -> tuple[str, str]:
    """Say how a result was asked.

    Args:
        result: The JSON that `evaluate` wrote beside the predictions; None where it is not at hand.
        first: That of the way it is compared with.

    Returns:
        Prompts and candidates in words; "" where they are not known.
    """
    if result is None:
        return "", ""
    digest = str(result.get("templates_sha256") or "")
    prompts = PROMPTS.get(digest, f"set {digest[:8]}" if digest else "")
    names = "all names"
    if result.get("mask"):
        names = f"{result['mask']['classes']} names"
    if result.get("candidates_sha256"):
        lists = LISTS.search(str(result.get("dataset", "")))
        names = f"lists of {lists[1]}" if lists else "a list per class"
    if first is not None and result.get("class_names_sha256") != first.get("class_names_sha256"):
        names += ", other spellings"
    return prompts, names


def beside(path: str) -> Record | None:
    """Read the JSON that `evaluate` wrote beside a file of predictions; None where there is none."""
    facts = path.removesuffix(".parquet") + ".json"
    found: Record | None = store.read_json(facts) if store.exists(facts) else None
    return found


def compare(
    first: tuple[str, Predictions, np.ndarray],
    others: list[tuple[str, Predictions, np.ndarray]],
    facts: dict[str, Record | None],
    pair: tuple[str, str],
    draws: int,
    seed: int,
) -> list[Record]:
    """Put the ways of asking one model side by side.

    Args:
        first: Name, predictions and (n,) float64 share of seeds that are right: what the others are compared with.
        others: Likewise; photos are matched by uid, and those that only one way has are left out of the change.
        facts: What `evaluate` says of each, by name.
        pair: First and second group.
        draws: Bootstrap samples.
        seed: Of the bootstraps.

    Returns:
        A record per way: `variant, prompts, candidates, num_images`, balanced and unbalanced accuracies of both groups
        with drops and intervals (over classes; over images), and `change_*` of both drops against the first way.

    Raises:
        ValueError: If a way lacks a group, or shares no photo with the first.
    """
    records = []
    for name, found, rate in [first, *others]:
        counts = shift.count(found.classes, found.groups, rate)
        summary = shift.summarise(counts, np.random.default_rng(seed), pair, draws)
        prompts, candidates = describe(facts.get(name), facts.get(first[0]) if name != first[0] else None)
        spans = summary["intervals"]
        record: Record = {
            "variant": name,
            "prompts": prompts,
            "candidates": candidates,
            "num_images": sum(summary["num_images"].values()),
            **{f"balanced_{group}": summary["balanced"][group] for group in pair},
            "balanced_drop_pp": summary["drop"]["drop_pp"],
            "balanced_low_pp": spans["drop_pp_classes"][0],
            "balanced_high_pp": spans["drop_pp_classes"][1],
            **{f"unbalanced_{group}": summary["unbalanced"][group] for group in pair},
            "unbalanced_drop_pp": summary["drop"]["unbalanced_drop_pp"],
            "unbalanced_low_pp": spans["unbalanced_drop_pp_images"][0],
            "unbalanced_high_pp": spans["unbalanced_drop_pp_images"][1],
        }
        records.append(record | _change(first, (name, found, rate), pair, draws, seed))
    return records


def _change(
    first: tuple[str, Predictions, np.ndarray], other: tuple[str, Predictions, np.ndarray], pair: tuple[str, str],
    draws: int, seed: int,
) -> Record:  # fmt: skip
    keys = ("change_pp", "change_low_pp", "change_high_pp", "unbalanced_change_pp", "unbalanced_change_low_pp",
            "unbalanced_change_high_pp")  # fmt: skip
    if other[0] == first[0]:
        return dict.fromkeys(keys)
    at = positions(other[1].uids, first[1].uids)
    shared = at >= 0
    if not shared.any():
        raise ValueError(f"{other[0]} and {first[0]} share no photo: both must be of one test set, read the same way")
    classes = [name for name, kept in zip(other[1].classes, shared.tolist(), strict=True) if kept]
    names = [name for name, kept in zip(other[1].groups, shared.tolist(), strict=True) if kept]
    rng = np.random.default_rng(seed)
    found = shift_change.change(classes, names, first[2][at[shared]], other[2][shared], rng, pair, draws)
    values = [found["drop_change_pp"], *found["interval_pp"], found["unbalanced_change_pp"],
              *found["unbalanced_interval_pp"]]  # fmt: skip
    return dict(zip(keys, values, strict=True))


def of_study(study: Study, draws: int, seed: int) -> list[Record]:
    """Compare the ways every arm was asked, on every grouped test set (`groups.compared`).

    A further way is a result `eval/<run>/<test>-<way>.parquet`, as `evaluate --candidates-k` and `evaluate --test
    <test>-<way>=DIR --templates <test>-<way>=openai` write it; only ways that all seeds of an arm have are shown.

    Returns:
        Records of `compare` with `test`, `arm` and `supervised`; none for arms that were asked in one way.

    Raises:
        DataError: If a further way shares no photo with the first.
    """
    records = []
    for test in study.tests:
        pair = groups.compared(study, test)
        for arm in tables.arms(study):
            runs = [run.name for run in arm.runs if study.predictions(run.name, test) is not None]
            first = _mean(study, runs, test)
            if first is None or pair is None or not set(pair) <= set(first[0].groups):
                continue
            common = [way for way in study.ways(runs[0], test) if all(way in study.ways(run, test) for run in runs)]
            others = [(way.removeprefix(f"{test}-"), *found) for way in common if (found := _mean(study, runs, way))]
            if not others:
                continue
            facts = {name: study.result(runs[0], f"{test}-{name}") for name, *_ in others}
            facts[FIRST] = study.result(runs[0], test)
            about: dict[str, Any] = {"test": test, "arm": arm.label, "supervised": arm.supervised,
                                     "first": pair[0], "second": pair[1]}  # fmt: skip
            try:
                rows = compare((FIRST, *first), others, facts, pair, draws, seed)
            except ValueError as error:
                raise DataError(f"{study.path('eval', runs[0])}, {test}: {error}") from None
            records += [{**about, **row} for row in rows]
    return records


def _mean(study: Study, runs: list[str], name: str) -> tuple[Predictions, np.ndarray] | None:
    """Predictions of the first of several seeds on the photos of all, (n,) float64 share of seeds that are right."""
    found = [p for run in runs if (p := study.predictions(run, name)) is not None]
    if not found:
        return None
    first, outcomes = aligned(found, f"{study.path('eval')}: {', '.join(runs)} on {name}")
    return first, outcomes.mean(axis=0)


def sentence(records: list[Record]) -> str:
    """Say by how much the way of asking moves the drop of the first model."""
    own = [r for r in records if (r["test"], r["arm"]) == (records[0]["test"], records[0]["arm"])]
    drops = [r[key] for r in own for key in ("balanced_drop_pp", "unbalanced_drop_pp")]
    first, low, high = (f"{v:.1f}".replace("-", "−") for v in (own[0]["balanced_drop_pp"], min(drops), max(drops)))
    return (
        f"{own[0]['arm']}: the drop is {first} points as evaluated and lies between {low} and {high} over {len(own)} "
        "ways of asking and both weightings."
    )
