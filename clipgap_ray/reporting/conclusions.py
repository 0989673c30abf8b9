"""One sentence above every figure, computed from the records that the figure draws. No adjective without a number."""

from __future__ import annotations

import numpy as np

from clipgap_ray.reporting.figures import names_in_order
from clipgap_ray.reporting.robust import RobustnessPanel
from clipgap_ray.reporting.tables import Record, lookup


def percent(value: float | None, digits: int = 1) -> str:
    """0.4478 -> 44.8 %, -0.01 -> −1.0 %."""
    return "–" if value is None or not np.isfinite(value) else signed(100 * value, f".{digits}f") + "\u00a0%"


def points(value: float | None) -> str:
    """-8.13 -> −8.1 points."""
    return "–" if value is None or not np.isfinite(value) else signed(value) + "\u00a0points"


def signed(value: float, style: str = "+.1f") -> str:
    """-8.13 -> −8.1; what rounds to nothing has no sign."""
    text = f"{value:{style}}"
    return text.lstrip("+-") if not text.strip("+-0.") else text.replace("-", "−")


def level(record: Record) -> str:
    """Accuracy with its spread over seeds, or with Wilson's interval when there is one seed."""
    if record["sd_seeds"] is not None:
        return f"{100 * record['accuracy']:.1f}\u00a0±\u00a0{100 * record['sd_seeds']:.1f}\u00a0%"
    return f"{percent(record['accuracy'])} {span(100 * record['low'], 100 * record['high'])}"


def span(low: float, high: float, style: str = ".1f") -> str:
    """An interval: [−1.0, 20.2]."""
    return f"[{signed(low, style)}, {signed(high, style)}]"


def change(record: Record) -> str:
    """Change against the full pool with its interval; negative = worse."""
    if record["drop_pp"] is None:
        return "–"
    return f"{points(-record['drop_pp'])} {span(-record['drop_high_pp'], -record['drop_low_pp'], '+.1f')}"


def seeds(records: list[Record]) -> str:
    """How many seeds stand behind these records."""
    counts = sorted({r["num_seeds"] for r in records})
    text = "–".join(str(c) for c in dict.fromkeys([counts[0], counts[-1]])) if counts else "0"
    return f"{text} seed" + ("" if counts == [1] else "s")


def on_closeness(records: list[Record]) -> str:
    """How close is the pool to each test set, against the reference?"""
    known = [r for r in records if r["share_closer_to_pool"] is not None]
    if not known:
        return "No reference was scored, so closeness has no yardstick here."
    ranked = sorted(known, key=lambda r: -r["share_closer_to_pool"])
    first, last = ranked[0], ranked[-1]

    def share(r: Record) -> str:
        ends = span(100 * r["share_low"], 100 * r["share_high"])
        return f"{percent(r['share_closer_to_pool'])} {ends} of {r['test']}"

    text = f"{share(first)} images have a nearer neighbour in the pool than in the reference"
    medians = f" (median similarity {first['median_pool']:.3f} against {first['median_reference']:.3f})"
    return text + medians + (f"; {share(last)}, the least." if last is not first else ".")


def on_gap_matching(records: list[Record], panels: list[RobustnessPanel], main_test: str) -> str:
    """Does cutting to the reference's gap explain the accuracy?"""
    cuts = [r for r in records if r["kind"] == "gap-match" and r["targeted"] and r["drop_pp"] is not None]
    if not cuts:
        return "No gap-matched model has been evaluated yet."
    sentences = []
    for cut in sorted(cuts, key=lambda r: (r["test"] == main_test, -r["drop_pp"]))[:2]:
        text = (
            f"{cut['split']} removes {cut['pool_rows_removed'] or 0:,} pool images and changes {cut['test']} by "
            f"{change(cut)} to {percent(cut['accuracy'])}"
        )
        main = lookup(records, split=cut["split"], test=main_test, objective="clip", train_on=cut["train_on"])
        if main is not None and main is not cut and main["drop_pp"] is not None:
            text += f", and {main_test} by {change(main)}"
        sentences.append(text + "." + _remaining(cut, panels))
    return " ".join(sentences)


def _remaining(cut: Record, panels: list[RobustnessPanel]) -> str:
    """What is left of the distance to the supervised line after the cut."""
    panel = next((p for p in panels if p.test == cut["test"]), None)
    point = lookup(panel.points, arm=cut["arm"]) if panel is not None else None
    if panel is None or point is None:
        return ""
    if point["residual_pp"] is None:
        baselines = [p for p in panel.points if p["supervised"]]
        best = max(baselines, key=lambda p: p["y"], default=None)
        return "" if best is None else f" The best supervised model reaches {percent(best['y'])} on {cut['test']}."
    how = " (extrapolated)" if point["extrapolates"] else ""
    predicted = f" Supervised models of its accuracy would reach {percent(point['predicted'])}{how}"
    if point["residual_pp"] <= 0:
        return f"{predicted}: the cut took the whole advantage ({points(point['residual_pp'])})."
    return f"{predicted}: {points(point['residual_pp'])} remain that closeness to the test set does not explain."


def on_pruning(curves: list[Record]) -> str:
    """Near, random and far at one common size, on the test sets that the cuts aim at."""
    sized = [c for c in curves if c["kind"] in ("near", "random", "far")]
    sentences = []
    for target in dict.fromkeys(c["target"] for c in sized if c["kind"] == "near"):
        for test in target.split("+")[:2]:
            rows = {
                kind: {c["rows"]: c for c in sized if c["kind"] == kind and c["test"] == test
                       and c["target"] in (target, "")}
                for kind in ("near", "random", "far")
            }  # fmt: skip
            common = set(rows["near"]) & set(rows["random"]) & set(rows["far"])
            if common:
                size = min(common)
                words = ", ".join(f"{kind} {level(rows[kind][size])}" for kind in ("near", "random", "far"))
                sentences.append(f"At {size:,} images kept, {test} accuracy is {words} ({_order(rows, size)}).")
    return " ".join(sentences) or "Near, random and far splits of one common size have not all been evaluated yet."


def _order(rows: dict[str, dict[int, Record]], size: int) -> str:
    near, random, far = (rows[kind][size]["accuracy"] for kind in ("near", "random", "far"))
    if near < random < far:
        return "losing the nearest hurts most, losing the farthest least, as in the paper"
    if near < min(random, far):
        return "losing the nearest hurts most"
    return "not the paper's order"


def on_table(records: list[Record]) -> str:
    """The largest drop among the cuts."""
    cuts = [
        r for r in records if r["drop_pp"] is not None and r["objective"] == "clip" and r["train_on"] != "reference"
    ]
    if not cuts:
        return "Only one training set has been evaluated, so there is nothing to compare yet."
    worst = max(cuts, key=lambda r: r["drop_pp"])
    count = len({r["arm"] for r in cuts})
    among = f"among {count} cuts" if count > 1 else "of the only cut"
    relative = f"{percent(worst['drop_relative'])} relative, " if worst["drop_relative"] is not None else ""
    return (
        f"The largest change {among} is {worst['split']} on {worst['test']}: "
        f"{change(worst)} ({relative}{seeds([worst])})."
    )


def on_accuracy_by_similarity(bins: list[Record], correlations: list[Record]) -> str:
    """Does accuracy rise with similarity?"""
    if not correlations:
        return "Too few test images, or no variation, for a correlation."
    rising = [c for c in correlations if c["low"] > 0]
    top = max(correlations, key=lambda c: c["rho"])
    full = [b for b in bins if b["test"] == top["test"] and b["model"] == "full" and b["num_images"] >= 5]
    ends = ""
    if len(full) > 1:
        ends = (
            f", from {percent(full[0]['accuracy'], 0)} below {full[0]['high_similarity']:.2f} to "
            f"{percent(full[-1]['accuracy'], 0)} above {full[-1]['low_similarity']:.2f}"
        )
    return (
        f"Accuracy rises with similarity to the pool on {len(rising)} of {len(correlations)} test sets (95 % interval "
        f"above 0); most on {top['test']}: Spearman {top['rho']:.2f} {span(top['low'], top['high'], '.2f')}{ends}."
    )


def on_robustness(panels: list[RobustnessPanel], main_test: str) -> str:
    """How far above the baselines do the models lie?"""
    fitted = [p for p in panels if p.line is not None]
    if not fitted:
        return f"No line: {panels[0].why_no_line}." if panels else "No model was evaluated on two test sets."
    models = [point for panel in fitted for point in panel.points if not point["supervised"]]
    if not models:
        return "Only baselines have been evaluated."
    full = [point for point in models if point["kind"] == "full"] or models
    best = max(full, key=lambda point: point["residual_pp"])
    text = f"{best['arm']} lies {points(best['residual_pp'])} {_ends(best)} from the supervised line on {best['test']}"
    cuts = [p for p in models if p["test"] == best["test"] and p["kind"] == "gap-match" and p["targeted"]]
    if cuts:
        text += f", after {cuts[0]['arm']} {points(cuts[0]['residual_pp'])} {_ends(cuts[0])}"
    outside = sum(bool(point["extrapolates"]) for point in models)
    warning = f" {outside} of {len(models)} points lie outside the baselines' range of {main_test} (hollow)."
    return f"{text} ({seeds([best])})." + (warning if outside else "")


def _ends(point: Record) -> str:
    return span(point["residual_low_pp"], point["residual_high_pp"], "+.1f")


def on_gap_check(checks: list[Record]) -> str:
    """Is the gap after the cut the reference's?"""
    if not checks:
        return "No gap-matched split has a gap table yet."
    count, equal = sum(c["num_points"] for c in checks), sum(c["num_equal"] for c in checks)
    worst, broken = max(c["max_deviation"] for c in checks), sum(c["num_violations"] for c in checks)
    verdict = "holds at every point" if equal == count else f"is broken at {broken:,} points"
    if equal != count and not broken:
        verdict = "holds within the slack"
    return (
        f"After the cuts the reported gap equals the reference's at {equal:,} of {count:,} test points "
        f"(largest deviation {worst:.2g}): gap matching {verdict}."
    )


def on_removed(per_class: list[Record], recipes: dict[str, Record]) -> str:
    """Where do the removed rows come from?"""
    parts = []
    for test in names_in_order(per_class):
        rows = [r for r in per_class if r["test"] == test]
        total, images = sum(r["num_removed"] for r in rows), sum(r["num_images"] for r in rows)
        parts.append((total / images, f"{test} {total / images:.1f}"))
    if not any(rate for rate, _ in parts):
        return "No pool row exceeds the reference's gap on any test set."
    return "Pool images removed per test image: " + ", ".join(text for _, text in sorted(parts, reverse=True)) + "."


def on_groups(results: list[Record], exposure: list[Record]) -> str:
    """How large is one model's drop from the base to the group compared with it, and does that group lie farther away?

    Args:
        results: The model's records of `tables_groups.group_shift` on one test set, one per group beside the base.
        exposure: Records of `similarity.exposure`.
    """
    base = next((result for result in results if result["compared"]), results[0])
    first, second = base["groups"]
    low, high = base["intervals"]["drop_pp_classes"]
    text = (
        f"{base['arm']} drops {signed(base['drop']['drop_pp'], '.1f')} points {span(low, high)} from "
        f"{percent(base['balanced'][first])} {first} to {percent(base['balanced'][second])} {second}, balanced "
        f"over {base['num_classes']} classes"
    )
    text += f" ({len(results)} groups are compared with {first})" if len(results) > 1 else ""
    pair = (base["test"], first, second)
    near = next((e for e in exposure if (e["test"], e["first"], e["second"]) == pair), None)
    if near is None:
        return text + "."
    away = near["difference"] >= 0
    low, high = (near["low"], near["high"]) if away else (-near["high"], -near["low"])
    return (
        f"{text}; {second} photos lie {abs(near['difference']):.3f} {span(low, high, '.3f')} "
        f"{'farther from' if away else 'nearer to'} the pool (P({first} nearer) = {near['auc']:.2f})."
    )


def on_join(results: list[Record]) -> str:
    """How much of the drop is distance from the training data?"""
    base = results[0]
    first, second = base["groups"]
    drop, parts, exposure = base["drop"], base["decomposition"], base["exposure"]
    text = f"{base['arm']}: drop {drop['drop_pp']:.1f} points {span(*drop['interval_pp'])}"
    if parts is None:
        return f"{text}. How much of it is distance is not identified: {base['why_not']}."
    share = "" if parts["share"] is None else f", {percent(parts['share'], 0)} of the drop"
    where = "farther from" if exposure["difference"] >= 0 else "nearer to"
    residual = f"{'−' if parts['residual_pp'] < 0 else '+'}\u00a0{abs(parts['residual_pp']):.1f}"
    return (
        f"{text} = {parts['explained_pp']:.1f} {span(*parts['explained_interval_pp'])} because {second} photos lie "
        f"{abs(exposure['difference']):.3f} {where} the training images than {first} ones{share}, {residual} "
        f"{span(*parts['residual_interval_pp'])} at equal similarity."
    ).replace("= -", "= −")


def on_training(curves: list[Record]) -> str:
    """What did training end at, and did all see the same?"""
    runs = names_in_order(curves, "run")
    last = [[c for c in curves if c["run"] == run][-1] for run in runs]
    seen = sorted({c["samples"] for c in last if not c["supervised"]})
    same = f"the same {seen[0]:,} samples" if len(seen) == 1 else f"{seen[0]:,} to {seen[-1]:,} samples" if seen else ""
    clip = [c["loss"] for c in last if not c["supervised"]]
    if not clip:
        return f"{len(runs)} supervised runs."
    return f"{len(clip)} CLIP runs saw {same} and end at a loss of {min(clip):.2f} to {max(clip):.2f} nats."


def on_planted(records: list[Record]) -> str:
    """Was the planted truth recovered?"""
    if not records:
        return "Real data: nothing was planted."
    return "Planted and found again: " + "; ".join(map(_recovered, records)) + "."


def _recovered(record: Record) -> str:
    text = f"{record['what']}{' in ' + record['test'] if record['test'] else ''}"
    found, planted, others = record["found"], record["planted"], record["not_planted"]
    if not planted and others is not None:
        return f"{text}: none planted, {f'{others:,} found' if others else 'none found'}"
    return f"{text} {found:,} of {planted:,}" + (f" (and {others:,} that were not planted)" if others else "")
