"""Effective robustness of a study's models, and how far it can be trusted: intervals, other lines, other axes.

The baselines are few and the line is short, so every residual stands beside what it becomes without one baseline and
on other axes. An interval holds the luck of the test images (the same resampled images for models and baselines, the
line refitted) and of the training seeds; which baselines somebody happened to train is what leaving one out shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from clipgap_ray.kernels import intervals, robustness
from clipgap_ray.reporting import tables
from clipgap_ray.reporting.study import Predictions, Run, Study, aligned
from clipgap_ray.reporting.tables import Record

MAX_DRAWS = 1000
SAME_ARM = ("split", "objective", "train_on", "model", "num_samples_seen")


@dataclass(frozen=True)
class RobustnessPanel:
    """One shifted test set against the main one.

    Attributes:
        test: The shifted test set.
        points: One record per arm: x, y and, with a line, predicted, residual_pp, extrapolates, ...
        line: Fitted on the supervised runs, on probit axes; None with fewer than two different ones.
        why_no_line: What is missing.
        without: Per baseline, all its seeds together, the line of the others, where they make one:
            `left_out, slope, intercept, residual_pp`.
        axes: Per choice of axes the line: `axes, slope, slope_low, slope_high, intercept, r2`.
        lines: The lines of `without`, for the figure.
    """

    test: str
    points: list[Record]
    line: robustness.Line | None
    why_no_line: str
    without: list[Record] = field(default_factory=list)
    axes: list[Record] = field(default_factory=list)
    lines: list[robustness.Line] = field(default_factory=list)


def panels(study: Study, records: list[Record], draws: int, seed: int) -> list[RobustnessPanel]:
    """Fit the baselines' line for every shifted test set and measure every arm's distance from it.

    Args:
        study: The study.
        records: Of `tables.accuracy`.
        draws: Bootstrap samples over test images.
        seed: Of the bootstrap.
    """
    found = []
    for test in study.tests:
        points = [] if test == study.main_test else _points(study, records, test)
        if not points:
            continue
        runs = [run for run in study.runs if run.objective == "supervised" and _both(study, run, test) is not None]
        baselines = np.array([_accuracies(study, run, test) for run in runs]).reshape(-1, 2)
        if len(np.unique(baselines[:, 0])) < 2:
            count = len(baselines)
            reason = f"{count or 'no'} supervised baseline{'' if count == 1 else 's'}: a line needs at least two"
            found.append(RobustnessPanel(test, [{**p, **NO_LINE} for p in points], None, reason))
            continue
        found.append(_fitted(study, test, points, runs, baselines, min(draws, MAX_DRAWS), seed))
    return found


NO_LINE: Record = dict.fromkeys(
    ("predicted", "predicted_low", "predicted_high", "residual_pp", "residual_low_pp", "residual_high_pp",
     "residual_se_images_pp", "residual_se_seeds_pp", "leave_one_out_low_pp", "leave_one_out_high_pp",
     "residual_logit_pp", "residual_linear_pp", "extrapolates", "beyond_pp")
)  # fmt: skip


def _fitted(
    study: Study, test: str, points: list[Record], runs: list[Run], baselines: np.ndarray, draws: int, seed: int
) -> RobustnessPanel:
    x, y = (np.array([p[side] for p in points]) for side in "xy")
    per_axes = {axes: robustness.fit(baselines[:, 0], baselines[:, 1], axes) for axes in robustness.AXES}
    line = per_axes["probit"]
    names = _arm_names(study, runs)
    # Without one seed its sisters would hold the line in place: a baseline goes with all its seeds.
    left_out = robustness.leave_one_out(baselines[:, 0], baselines[:, 1], names=names)
    lines = [other for other, _ in left_out if other is not None]
    ranges = robustness.residual_range_pp(lines, x, y) if lines else None
    band, predicted = line.band(x), line.predict(x)
    residual = {axes: robustness.residuals_pp(own, x, y) for axes, own in per_axes.items()}
    errors = _errors(study, test, points, runs, draws, seed)
    reach = stats.norm.ppf((1 + intervals.CONFIDENCE) / 2) * np.sqrt(np.nansum(errors**2, axis=0))
    low, high = line.x_range
    for i, point in enumerate(points):
        point |= {
            "predicted": float(predicted[i]),
            "predicted_low": None if band is None else float(band[0][i]),
            "predicted_high": None if band is None else float(band[1][i]),
            "residual_pp": float(residual["probit"][i]),
            "residual_low_pp": float(residual["probit"][i] - reach[i]),
            "residual_high_pp": float(residual["probit"][i] + reach[i]),
            "residual_se_images_pp": _number(errors[0, i]),
            "residual_se_seeds_pp": _number(errors[1, i]),
            "leave_one_out_low_pp": None if ranges is None else float(ranges[0][i]),
            "leave_one_out_high_pp": None if ranges is None else float(ranges[1][i]),
            "residual_logit_pp": float(residual["logit"][i]),
            "residual_linear_pp": float(residual["linear"][i]),
            "extrapolates": bool(line.extrapolates(x[[i]])[0]),
            "beyond_pp": 100 * float(max(low - x[i], x[i] - high, 0.0)),
        }
    without = [
        {"left_out": name, "slope": own and own.slope, "intercept": own and own.intercept,
         "residual_pp": _number(value)}
        for name, (own, value) in zip(dict.fromkeys(names), left_out, strict=True)
    ]  # fmt: skip
    axes = [
        {"axes": name, "slope": own.slope, "slope_low": _number(own.slope_interval[0]),
         "slope_high": _number(own.slope_interval[1]), "intercept": own.intercept, "r2": _number(own.r2)}
        for name, own in per_axes.items()
    ]  # fmt: skip
    return RobustnessPanel(test, points, line, "", without, axes, lines)


def _points(study: Study, records: list[Record], test: str) -> list[Record]:
    points = []
    for record in (r for r in records if r["test"] == test):
        main = tables.lookup(records, test=study.main_test, **{key: record[key] for key in SAME_ARM})
        if main is None or not _runs(study, record, test):
            continue
        points.append(
            {
                "test": test,
                "arm": record["arm"],
                **{key: record[key] for key in SAME_ARM},
                "kind": record["kind"],
                "supervised": record["objective"] == "supervised",
                "targeted": record["targeted"],
                "num_seeds": record["num_seeds"],
                "x": _inside(main["accuracy"], main["num_images"]),
                "y": _inside(record["accuracy"], record["num_images"]),
                "n_x": main["num_images"],
                "n_y": record["num_images"],
                "x_low": main["low"],
                "x_high": main["high"],
                "y_low": record["low"],
                "y_high": record["high"],
            }
        )
    return points


def _arm_names(study: Study, runs: list[Run]) -> list[str]:
    """Name the arm of every run: its label, or its first run where labels are not unique."""
    own = {run.name: arm for arm in tables.arms(study) for run in arm.runs}
    keyed = {run.name: (own[run.name].label, own[run.name].runs[0].name) for run in runs}
    shared = [label for label, _ in set(keyed.values())]
    return [label if shared.count(label) == 1 else first for label, first in (keyed[run.name] for run in runs)]


def _runs(study: Study, record: Record, test: str) -> list[Run]:
    """The runs of a record's arm that were evaluated on both sets. Arms go by their keys: labels need not be unique."""
    arm = next(a for a in tables.arms(study) if all(getattr(a, key) == record[key] for key in SAME_ARM))
    return [run for run in arm.runs if _both(study, run, test) is not None]


def _both(study: Study, run: Run, test: str) -> tuple[Predictions, Predictions] | None:
    main, other = study.predictions(run.name, study.main_test), study.predictions(run.name, test)
    return None if main is None or other is None else (main, other)


def _accuracies(study: Study, run: Run, test: str) -> list[float]:
    """Main and shifted accuracy of a run: seeds are separate models on the line."""
    return [_inside(float(p.correct.mean()), len(p.correct)) for p in _both(study, run, test) or ()]


def _errors(study: Study, test: str, points: list[Record], baselines: list[Run], draws: int, seed: int) -> np.ndarray:
    """(2, m) float64 standard errors of the residuals in points: from the images, and from the seeds (NaN for one)."""
    runs = [_runs(study, point, test) for point in points]
    names = list(dict.fromkeys(run.name for run in [*(r for own in runs for r in own), *baselines]))
    rng = np.random.default_rng(seed)
    sides = []
    for on in (study.main_test, test):
        own = [p for name in names if (p := study.predictions(name, on)) is not None]
        _, outcomes = aligned(own, f"{study.path('eval')}: the models on {on}")
        drawn = intervals.resampled_means(outcomes, draws, rng)
        sides.append(np.concatenate([outcomes.mean(axis=1)[None], drawn]))  # row 0: no resampling
    place = {name: i for i, name in enumerate(names)}
    base = [place[run.name] for run in baselines]
    count = [len(study.predictions(names[0], on).uids) for on in (study.main_test, test)]  # type: ignore[union-attr]

    def residuals(columns: list[list[int]]) -> np.ndarray:
        """(1 + draws, m) residuals of models that are means over runs."""
        x, y = (np.stack([side[:, own].mean(axis=1) for own in columns], axis=1) for side in sides)
        base_x, base_y = (_all_inside(side[:, base], n) for side, n in zip(sides, count, strict=True))
        return robustness.residual_samples_pp(_all_inside(x, count[0]), _all_inside(y, count[1]), base_x, base_y)

    per_arm = residuals([[place[run.name] for run in own] for own in runs])[1:]
    per_run = residuals([[place[run.name]] for own in runs for run in own])[0]
    at = np.split(per_run, np.cumsum([len(own) for own in runs])[:-1])
    seeds = [own.std(ddof=1) / np.sqrt(len(own)) if len(own) > 1 else np.nan for own in at]
    return np.stack([np.nanstd(per_arm, axis=0, ddof=1), seeds])


def _all_inside(values: np.ndarray, total: int) -> np.ndarray:
    return robustness.pull_inside(values, np.array(total), "probit")[0]


def _inside(value: float, total: int) -> float:
    return float(_all_inside(np.array([value]), total)[0])


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def warnings(found: list[RobustnessPanel], main_test: str) -> list[str]:
    """Say where the line is not to be trusted: points beyond the baselines, or one baseline that carries it."""
    said: dict[str, list[str]] = {}
    for panel in found:
        if panel.line is None:
            continue
        low, high = panel.line.x_range
        outside = [p for p in panel.points if p["extrapolates"]]
        if outside:
            farthest = max(outside, key=lambda p: p["beyond_pp"])
            text = (
                f"{len(outside)} of {len(panel.points)} models lie outside the baselines' {100 * low:.1f} to "
                f"{100 * high:.1f} % of {main_test}, {farthest['arm']} by {farthest['beyond_pp']:.1f} points: their "
                "effective robustness is an extrapolation"
            )
            said.setdefault(text, []).append(panel.test)
        if not panel.lines:
            said.setdefault("no baseline can be left out: the others make no line", []).append(panel.test)
        flips = [p["arm"] for p in panel.points if not p["supervised"] and _flips(p)]
        if flips:
            text = f"the sign hangs on one baseline for {', '.join(flips[:4])}" + (" and more" * (len(flips) > 4))
            said.setdefault(text, []).append(panel.test)
    return [f"{', '.join(tests)}: {text}." for text, tests in said.items()]


def _flips(point: Record) -> bool:
    low, high = point["leave_one_out_low_pp"], point["leave_one_out_high_pp"]
    return low is not None and low < 0 < high
