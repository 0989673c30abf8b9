"""Is the pool still denser than the reference where a cut made it no longer closer? From gaps/diagnostics.json.

The reviewers' question (train_test_similarity.md section 10): gap matching bounds the nearest neighbour only; behind it
the pool may hold many rows just outside the hull where the reference holds few.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import ORANGE, Theme, grid, legend_above

BEFORE, REFERENCE = "pool", "reference"


def neighbour_curves(study: Study) -> list[Record]:
    """Return the median similarity of the k-th neighbour: pool before and after its gap-matched cut, and reference.

    Args:
        study: The study.

    Returns:
        Records `test, kind, split, k, median_similarity, mean_rows_within` (the last is the mean number of rows within
        0.05 of the hull, None for the reference); none without gaps/diagnostics.json.
    """
    found = {(record["split"], record["test"]): record for record in study.diagnostics()}
    if not found:
        return []
    records = []
    for test in study.tests:
        kinds = {BEFORE: BEFORE, "gap-match": study.gap_matched(test), REFERENCE: REFERENCE}
        for kind, split in kinds.items():
            own = found.get((split, test), {})
            within = own.get("mean_rows_within", {}).get("0.05")
            for k, value in enumerate(own.get("median_kth_similarity", []), 1):
                record = {"test": test, "kind": kind, "split": split, "k": k, "median_similarity": value}
                records.append({**record, "mean_rows_within": within})
    return records


def sentence(records: list[Record]) -> str:
    """Say for how many test sets the cut pool is denser than the reference at the last neighbour."""
    last = max((record["k"] for record in records), default=0)
    at = {(record["test"], record["kind"]): record["median_similarity"] for record in records if record["k"] == last}
    tests = [test for test, kind in at if kind == "gap-match" and at.get((test, REFERENCE)) is not None]
    if not tests:
        return "No gap-matched split has neighbour curves beside the reference's yet."
    denser = [test for test in tests if (at[test, "gap-match"] or -1.0) > at[test, REFERENCE]]
    if not denser:
        return (
            f"After gap matching the median {last}-th neighbour is no closer than the reference's on any of "
            f"{len(tests)} test sets: the cut pool is not denser either."
        )
    return (
        f"Gap matching bounds the nearest neighbour only: on {', '.join(denser)} the median {last}-th neighbour in the "
        f"cut pool is still closer than the reference's (`clipgap split density-match` bounds it too)."
    )


def draw(records: list[Record], theme: Theme) -> Figure:
    """Draw the curves, one panel per test set.

    Args:
        records: Of `neighbour_curves`.
        theme: Colours.
    """
    tests = list(dict.fromkeys(record["test"] for record in records))
    figure, axes = grid(len(tests), sharex=True)
    styles = (
        (BEFORE, theme.ink, "o", "pool before the cut"),
        ("gap-match", theme.pool, "s", "pool cut to the reference's gap"),
        (REFERENCE, ORANGE, "^", "reference"),
    )
    for number, (axis, test) in enumerate(zip(axes, tests, strict=True)):
        for kind, colour, marker, label in styles:
            rows = [
                r for r in records if r["test"] == test and r["kind"] == kind and r["median_similarity"] is not None
            ]
            if rows:
                axis.plot([r["k"] for r in rows], [r["median_similarity"] for r in rows], marker=marker, ms=4.5,
                          color=colour, label=label)  # fmt: skip
        axis.set_title(test)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number + 3 >= len(tests):
            axis.set_xlabel("neighbour (k-th nearest)")
            axis.tick_params(labelbottom=True)
        if number % 3 == 0:
            axis.set_ylabel("median similarity")
    legend_above(figure, axes[0])
    return figure
