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
USUAL_DELTA = "0.05"


def neighbour_curves(study: Study) -> list[Record]:
    """Return the median similarity of the k-th neighbour: pool before and after its gap-matched cut, and reference.

    Args:
        study: The study.

    Returns:
        Records `test, kind, split, num_images, k, median_similarity, delta, mean_rows_within` (the last is the mean
        number of rows within delta of the hull; None where it was not counted, as for the reference in older gaps);
        none without gaps/diagnostics.json. Delta is 0.05 or, where that was not asked for, the largest that was.
    """
    found = {(record["split"], record["test"]): record for record in study.diagnostics()}
    if not found:
        return []
    records = []
    deltas = {delta for own in found.values() for delta in own.get("mean_rows_within", {})}
    delta = max(deltas, key=lambda text: (text == USUAL_DELTA, float(text)), default=USUAL_DELTA)
    for test in study.tests:
        kinds = {BEFORE: BEFORE, "gap-match": study.gap_matched(test), REFERENCE: REFERENCE}
        for kind, split in kinds.items():
            own = found.get((split, test), {})
            within = own.get("mean_rows_within", {}).get(delta)
            about = {"test": test, "kind": kind, "split": split, "num_images": own.get("num_images")}
            for k, value in enumerate(own.get("median_kth_similarity", []), 1):
                record = {**about, "k": k, "median_similarity": value, "delta": float(delta)}
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
    within = _sentence_within(records)
    if not denser:
        return (
            f"After gap matching the median {last}-th neighbour is no closer than the reference's on any of "
            f"{len(tests)} test sets: the cut pool is not denser either.{within}"
        )
    return (
        f"Gap matching bounds the nearest neighbour only: on {', '.join(denser)} the median {last}-th neighbour in the "
        f"cut pool is still closer than the reference's (`clipgap split density-match` bounds it too).{within}"
    )


def _sentence_within(records: list[Record]) -> str:
    """Say where the cut pool has more rows just outside the hull than the reference; "" where that was not counted."""
    at = {(r["test"], r["kind"]): r["mean_rows_within"] for r in records}
    both = {test: (cut, at[test, REFERENCE]) for (test, kind), cut in at.items()
            if kind == "gap-match" and cut is not None and at.get((test, REFERENCE)) is not None}  # fmt: skip
    if not both:
        return ""
    more = [f"{test} ({cut:,.1f} against {own:,.1f})" for test, (cut, own) in both.items() if cut > own]
    delta = records[0]["delta"]
    said = f"on {', '.join(more)}" if more else f"on none of {len(both)} test sets"
    return f" Within {delta:g} of the hull it holds more images than the reference {said}."


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
        count = max((r["num_images"] or 0 for r in records if r["test"] == test), default=0)
        axis.set_title(f"{test}  (n = {count:,})" if count else test)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number + 3 >= len(tests):
            axis.set_xlabel("neighbour (k-th nearest)")
            axis.tick_params(labelbottom=True)
        if number % 3 == 0:
            axis.set_ylabel("median similarity")
    legend_above(figure, axes[0])
    return figure
