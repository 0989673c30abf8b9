"""Effective robustness of the models of a CSV against the line of baseline models.

Every residual stands beside its interval (where the tables have counts of images), its range when one baseline is left
out, and its value on other axes.

Reads: two CSVs. Writes: OUT/robustness.json, OUT/residuals.csv, OUT/robustness.svg and .png, OUT/summary.json.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from clipgap_ray import rundir, store
from clipgap_ray.config.robustness import RobustnessSettings
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import intervals, robustness
from clipgap_ray.reporting import figures_models
from clipgap_ray.reporting.page import csv_bytes
from clipgap_ray.reporting.robust import RobustnessPanel
from clipgap_ray.reporting.theme import render


@dataclass(frozen=True)
class Models:
    """The models of one CSV.

    Attributes:
        names: n names.
        raw: (n, 2) float64 fractions, x and y.
        totals: Images behind x and y, (n,) each; None where the table does not say.
        unit: Of the table.
        x: (n,) float64 fractions inside the axes.
        y: (n,) likewise.
        moved: (n,) bool, whether one of them had to be moved.
    """

    names: list[str]
    raw: np.ndarray
    totals: tuple[np.ndarray | None, np.ndarray | None]
    unit: str
    x: np.ndarray
    y: np.ndarray
    moved: np.ndarray

    def on(self, axes: robustness.Axes) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y as other axes can show them."""
        return tuple(robustness.pull_inside(self.raw[:, i], self.totals[i], axes)[0] for i in (0, 1))  # type: ignore[return-value]


def run(settings: RobustnessSettings) -> rundir.Summary:
    """Write robustness.json.

    Raises:
        DataError: If a column is missing, a value is no accuracy, or the baselines make no line.
    """
    started = time.monotonic()
    baselines, models = _read(settings.baseline, settings), _read(settings.table, settings)
    try:
        line = robustness.fit(baselines.x, baselines.y, settings.axes)
    except ValueError as error:
        raise DataError(f"{settings.baseline}: {error}") from None
    lines = robustness.leave_one_out(baselines.x, baselines.y, settings.axes)
    records = _residuals(line, models)
    for more in (_ranges(lines, models), _intervals(settings, line, models, baselines), _other_axes(models, baselines)):
        records = [{**record, **own} for record, own in zip(records, more, strict=True)]
    result: dict[str, Any] = {
        "slope": line.slope,
        "intercept": line.intercept,
        "r2": _number(line.r2),
        "slope_interval": [_number(v) for v in line.slope_interval],
        "intercept_interval": [_number(v) for v in line.intercept_interval],
        "axes": settings.axes,
        "num_baselines": line.num_points,
        "x_range": list(line.x_range),
        "unit": {"table": models.unit, "baseline": baselines.unit},
        "residuals": records,
        "baseline_residuals": _residuals(line, baselines),
        "leave_one_out": _leave_one_out(baselines, lines),
        "lines": {axes: own and _line(own) for axes, own in _lines(baselines).items()},
        "warnings": _warnings(records, models, baselines, line),
        "inputs": {path: store.sha256(store.read_bytes(path)) for path in (settings.table, settings.baseline)},
        "settings": settings.fingerprint(),
    }
    store.write_json(store.join(settings.out, "robustness.json"), result)
    _write_rest(settings, line, [own for own, _ in lines if own is not None], records, result["baseline_residuals"])
    count = len(models.names)
    summary = rundir.Summary("robustness", read=count, kept=count, seconds=time.monotonic() - started)
    summary.extra.update({key: result[key] for key in ("slope", "intercept", "r2", "unit", "warnings")})
    store.write_json(store.join(settings.out, "summary.json"), summary.as_dict())
    return summary


def _read(path: str, settings: RobustnessSettings) -> Models:
    rows = list(csv.DictReader(io.StringIO(store.read_bytes(path).decode())))
    wanted = [c for c in (settings.name, settings.x, settings.y, settings.x_n, settings.y_n) if c]
    missing = [c for c in wanted if c not in (rows[0] if rows else {})]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {list(rows[0]) if rows else 'no rows'}")
    try:
        values = np.array([[float(row[c]) for c in (settings.x, settings.y)] for row in rows])
        fractions, unit = robustness.as_fractions(values)
    except ValueError as error:
        raise DataError(f"{path}, columns {settings.x} and {settings.y}: {error}") from None
    if settings.unit != "auto":
        fractions, unit = values / (100 if settings.unit == "percent" else 1), settings.unit  # type: ignore[assignment]
        if (fractions > 1).any():
            raise DataError(f"{path} holds {values.max():g}, which is no {settings.unit}", hint="use --unit percent")
    totals = [np.array([int(row[c]) for row in rows]) if c else None for c in (settings.x_n, settings.y_n)]
    sides = [robustness.pull_inside(fractions[:, i], totals[i], settings.axes) for i in (0, 1)]
    moved = sides[0][1] | sides[1][1]
    names = [row[settings.name] for row in rows]
    return Models(names, fractions, (totals[0], totals[1]), unit, sides[0][0], sides[1][0], moved)


def _residuals(line: robustness.Line, models: Models) -> list[dict[str, Any]]:
    predicted, outside = line.predict(models.x), line.extrapolates(models.x)
    residual = robustness.residuals_pp(line, models.x, models.y)
    return [
        {
            "name": name,
            "residual_pp": float(residual[i]),
            "x": float(models.x[i]),
            "y": float(models.y[i]),
            "predicted": float(predicted[i]),
            "extrapolated": bool(outside[i]),
            "moved_inside": bool(models.moved[i]),
        }
        for i, name in enumerate(models.names)
    ]


def _line(line: robustness.Line) -> dict[str, Any]:
    return {"slope": line.slope, "intercept": line.intercept, "r2": _number(line.r2),
            "slope_interval": [_number(v) for v in line.slope_interval]}  # fmt: skip


def _ranges(lines: list[tuple[robustness.Line | None, float]], models: Models) -> list[dict[str, Any]]:
    """What every residual becomes when one baseline is left out."""
    known = [line for line, _ in lines if line is not None]
    if not known:
        return [{"leave_one_out_pp": None} for _ in models.names]
    low, high = robustness.residual_range_pp(known, models.x, models.y)
    return [{"leave_one_out_pp": [float(a), float(b)]} for a, b in zip(low, high, strict=True)]


def _other_axes(models: Models, baselines: Models) -> list[dict[str, Any]]:
    """Every residual on each choice of axes; None on axes where the baselines make no line."""
    found = {
        axes: None if line is None else robustness.residuals_pp(line, *models.on(axes))
        for axes, line in _lines(baselines).items()
    }
    return [{f"residual_{axes}_pp": None if values is None else float(values[i]) for axes, values in found.items()}
            for i in range(len(models.names))]  # fmt: skip


def _lines(baselines: Models) -> dict[robustness.Axes, robustness.Line | None]:
    """The baselines' line on each choice of axes; None where they coincide once 0 and 100 % are moved inside."""
    found: dict[robustness.Axes, robustness.Line | None] = {}
    for axes in robustness.AXES:
        x, y = baselines.on(axes)
        found[axes] = robustness.fit(x, y, axes) if len(np.unique(x)) > 1 else None
    return found


def _intervals(
    settings: RobustnessSettings, line: robustness.Line, models: Models, baselines: Models
) -> list[dict[str, Any]]:
    """95 % by drawing every accuracy anew from its count of images; None where a table has no counts."""
    counts = [*models.totals, *baselines.totals]
    if any(total is None for total in counts):
        return [{"interval_pp": None} for _ in models.names]
    rng = np.random.default_rng(settings.seed)
    drawn = []
    for raw, total in zip((*models.raw.T, *baselines.raw.T), counts, strict=True):
        assert total is not None
        samples = rng.binomial(total, raw, (settings.draws, len(raw))) / total
        drawn.append(robustness.pull_inside(samples, total, settings.axes)[0])
    x, y, base_x, base_y = drawn
    samples = robustness.residual_samples_pp(x, y, base_x, base_y, settings.axes)
    spread = np.nanstd(samples, axis=0, ddof=1)
    residual = robustness.residuals_pp(line, models.x, models.y)
    reach = stats.norm.ppf((1 + intervals.CONFIDENCE) / 2) * spread
    return [{"interval_pp": [_number(a), _number(b)]} for a, b in zip(residual - reach, residual + reach, strict=True)]


def _leave_one_out(baselines: Models, lines: list[tuple[robustness.Line | None, float]]) -> list[dict[str, Any]]:
    return [
        {
            "left_out": name,
            "slope": None if line is None else line.slope,
            "intercept": None if line is None else line.intercept,
            "residual_pp": _number(residual),
        }
        for name, (line, residual) in zip(baselines.names, lines, strict=True)
    ]


def _warnings(records: list[dict[str, Any]], models: Models, baselines: Models, line: robustness.Line) -> list[str]:
    low, high = (100 * value for value in line.x_range)
    warnings = [
        f"{r['name']}: x = {100 * r['x']:.2f} % lies outside the baselines' {low:.2f} to {high:.2f} %: extrapolated"
        for r in records
        if r["extrapolated"]
    ]
    for side in (models, baselines):
        warnings += [
            f"{name}: 0 or 100 % was moved inside the axes"
            for name, moved in zip(side.names, side.moved, strict=True)
            if moved
        ]
    if line.num_points < 3:
        warnings.append(f"{line.num_points} baselines: no error of the line can be estimated")
    return warnings


def _write_rest(
    settings: RobustnessSettings, line: robustness.Line, others: list[robustness.Line], records: list[Any],
    baselines: list[Any],
) -> None:  # fmt: skip
    flat = [_flat(record) for record in records]
    store.write_bytes(store.join(settings.out, "residuals.csv"), csv_bytes(flat))
    points = [_point(r, False) for r in records] + [_point(r, True) for r in baselines]
    panel = RobustnessPanel(settings.y, points, line, "", lines=others)
    files = render(partial(figures_models.robustness_scatter, [panel], settings.x, scale=settings.axes))
    store.write_bytes(store.join(settings.out, "robustness.svg"), files["light.svg"])
    store.write_bytes(store.join(settings.out, "robustness.png"), files["light.png"])


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """One line of residuals.csv: pairs become two columns."""
    line: dict[str, Any] = {}
    for key, value in record.items():
        if key in ("interval_pp", "leave_one_out_pp"):
            low, high = value or (None, None)
            line |= {key.replace("_pp", "_low_pp"): low, key.replace("_pp", "_high_pp"): high}
        else:
            line[key] = value
    return line


def _point(record: dict[str, Any], supervised: bool) -> dict[str, Any]:
    ends = {f"{axis}_{end}": record[axis] for axis in "xy" for end in ("low", "high")}  # no counts: no error bars
    return {"arm": record["name"], "kind": "gap-match", "supervised": supervised, "x": record["x"], "y": record["y"],
            "extrapolates": record["extrapolated"], **ends}  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
