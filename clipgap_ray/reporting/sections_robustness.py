"""The section about effective robustness: the line, every model's distance from it, and what would change it."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_models, prompts, robust
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.robust import RobustnessPanel
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record


def section(study: Study, numbers: Numbers) -> Section:
    """How far above the supervised models of its accuracy does every model lie? (paper 2310.09562, figure 6)"""
    built = Section("robustness", "Effective robustness", say.on_robustness(numbers.panels, study.main_test))
    if not numbers.panels:
        built.missing = "needs predictions on the main and on another test set: run `clipgap evaluate`"
        return built
    draw = partial(figures_models.robustness_scatter, numbers.panels, study.main_test)
    caption = (
        "Accuracy on shifted sets against the main one. Orange: supervised models and the line fitted to them; thin: "
        "the lines without one of them."
    )
    built.plots.append(Plot("effective_robustness", draw, caption))
    fitted = [panel for panel in numbers.panels if panel.line is not None]
    rows = [_row(panel, point) for panel in fitted for point in panel.points]
    headers = ["test set", "model", study.main_test, "shifted set", "line predicts", "effective robustness",
               "without one baseline", "logit axes", "linear axes"]  # fmt: skip
    if rows:
        built.tables.append(Table(headers, rows))
        headers = ["test set", "baselines", "probit: slope", "R²", "logit: slope", "R²", "linear: slope", "R²",
                   "moves the slope most"]  # fmt: skip
        built.tables.append(Table(headers, [_line_row(panel) for panel in fitted], "The baselines' line."))
    notes: dict[str, list[str]] = {}
    for panel in numbers.panels:
        notes.setdefault(_line(panel), []).append(panel.test)
    built.notes = [f"{', '.join(tests)}: {text}" for text, tests in notes.items()]
    tests = [study.main_test, *(panel.test for panel in numbers.panels)]
    built.notes += filter(None, [prompts.caution(numbers.prompts, tests)])
    if rows:
        built.notes += robust.warnings(numbers.panels, study.main_test)
        built.notes.append(
            "Effective robustness: accuracy less what the line predicts, in points; 95 % over test images (models and "
            "baselines on the same resampled images, line refitted) and training seeds. Line predicts: with the fit's "
            "95 % band. Without one baseline: smallest and largest value when each baseline is left out in turn. Logit "
            "and linear axes: the value with the line fitted there."
        )
    return built


def _row(panel: RobustnessPanel, p: Record) -> list[Any]:
    band = ""
    if p["predicted_low"] is not None:
        band = say.span(100 * p["predicted_low"], 100 * p["predicted_high"])
    small = say.span(p["residual_low_pp"], p["residual_high_pp"], "+.1f")
    others = "–"
    if p["leave_one_out_low_pp"] is not None:
        others = f"{say.signed(p['leave_one_out_low_pp'])} to {say.signed(p['leave_one_out_high_pp'])}"
    return [
        panel.test,
        ("◆ " if p["supervised"] else "") + p["arm"],
        (say.percent(p["x"]), "extrapolated" if p["extrapolates"] else "", False),
        say.percent(p["y"]),
        (say.percent(p["predicted"]), band, False),
        (say.signed(p["residual_pp"]), small, False),
        others,
        say.signed(p["residual_logit_pp"]),
        say.signed(p["residual_linear_pp"]),
    ]


def _line_row(panel: RobustnessPanel) -> list[Any]:
    assert panel.line is not None
    row: list[Any] = [panel.test, str(panel.line.num_points)]
    for axes in panel.axes:
        small = "" if axes["slope_low"] is None else say.span(axes["slope_low"], axes["slope_high"], ".2f")
        row += [(say.signed(axes["slope"], ".2f"), small, False), "–" if axes["r2"] is None else f"{axes['r2']:.2f}"]
    slope = panel.line.slope
    known = [record for record in panel.without if record["slope"] is not None]
    if not known:
        return [*row, "–"]
    most = max(known, key=lambda record: abs(record["slope"] - slope))
    return [*row, (most["left_out"], f"without it {say.signed(most['slope'], '.2f')}", False)]


def _line(panel: RobustnessPanel) -> str:
    if panel.line is None:
        return f"no line, {panel.why_no_line}."
    fitted = f"Φ⁻¹(y) = {panel.line.slope:.2f} Φ⁻¹(x) {panel.line.intercept:+.2f}".replace("-", "−")
    if panel.line.num_points < 3:
        return f"{fitted} through two baselines: no error can be estimated."
    ends = say.span(panel.line.slope_interval[0], panel.line.slope_interval[1], ".2f")
    return f"{fitted}, slope {ends}, R² = {panel.line.r2:.2f}, {panel.line.num_points} baselines."
