"""The sections about how much accuracy differs between the groups of a test set, one per grouped test set."""

from __future__ import annotations

from functools import partial
from typing import Any

from clipgap_ray.kernels.shift import PAIR
from clipgap_ray.reporting import conclusions as say
from clipgap_ray.reporting import figures_models, prompts
from clipgap_ray.reporting.layout import Plot, Section, Table
from clipgap_ray.reporting.numbers import Numbers
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Record

MAX_COLUMNS = 8  # groups side by side; more of them are columns of no page, but rows of the tables beside it


ALIKE = "Both groups of a test set are asked alike: the drop between them is not touched."


def sections(study: Study, numbers: Numbers) -> list[Section]:
    """Return a section per grouped test set, or one that says that there is none."""
    tests = list(dict.fromkeys(record["test"] for record in numbers.groups))
    if not tests:
        missing = "no test set among the predictions has photos of two groups that share a class"
        return [Section("groups", "Groups", "", missing=missing)]
    found = []
    for number, test in enumerate(tests):
        own = [record for record in numbers.groups if record["test"] == test]
        cells = [record for record in numbers.group_accuracy if record["test"] == test]
        found.append(section(test, own, cells, numbers.exposure, f"-{test}" if number else ""))
        doubt = prompts.caution(numbers.prompts, list(dict.fromkeys([study.main_test, test])))
        found[-1].notes += [f"{doubt} {ALIKE}"] if doubt else []
    return found


def section(test: str, results: list[Record], cells: list[Record], exposure: list[Record], suffix: str) -> Section:
    """How large is the drop from the base to the other groups? (paper 2403.11497, section 3)

    Args:
        test: The test set.
        results: Its records of `tables_groups.group_shift`, not empty.
        cells: Its records of `tables_groups.group_accuracy`.
        exposure: Records of `similarity.exposure`.
        suffix: Of anchors and file names.
    """
    others = list(dict.fromkeys(record["groups"][1] for record in results))
    base, arm = results[0]["groups"][0], results[0]["arm"]
    first = [record for record in results if _model(record) == _model(results[0])]
    worst = next((record for record in first if record["compared"]), first[0])
    usual = tuple(results[0]["groups"]) == PAIR and len(others) == 1
    title = "Common and counter backgrounds" if usual else f"Groups of {test}"
    if usual and suffix:
        title += f" ({test})"
    made = Section(f"groups{suffix}", title, say.on_groups(first, exposure))
    if len(others) == 1:
        caption = "Balanced accuracy of both groups and the drop between them."
    else:
        caption = f"Balanced accuracy of every group and the drop from {base}, {arm}."
    draw = partial(figures_models.group_bars, results if len(others) == 1 else first)
    made.plots.append(Plot(f"group_shift{suffix}", draw, caption))
    caption = f"Drop of every class, {arm}" + ("." if len(others) == 1 else f", from {base} to {worst['groups'][1]}.")
    made.plots.append(Plot(f"class_drops{suffix}", partial(figures_models.class_drop_bars, worst), caption))
    if len(others) > 1 and len(first) < len(results):
        made.tables.append(_models(first, others))  # all rows together are many, and folded
    made.tables.append(_models(results, others))
    made.tables += _cells([cell for cell in cells if _model(cell) == _model(results[0])])
    made.notes = [_note(results[0]["groups"], others)]
    return made


def _model(record: Record) -> tuple[str, str, int]:
    return record["arm"], record["model"], record["num_samples_seen"]


def _models(results: list[Record], others: list[str]) -> Table:
    """A row per model, or per model and group where there are several."""
    first, second = results[0]["groups"]
    several = len(others) > 1
    rows: list[list[Any]] = []
    for result in results:
        own_first, own_second = result["groups"]
        worst = result["worst_class_group"]
        rows.append(
            [result["arm"], *([own_second] if several else []), say.percent(result["balanced"][own_first]),
             say.percent(result["balanced"][own_second]),
             (say.signed(result["drop"]["drop_pp"], ".1f"), say.span(*result["intervals"]["drop_pp_classes"]), False),
             (say.signed(result["drop"]["unbalanced_drop_pp"], ".1f"),
              say.span(*result["intervals"]["unbalanced_drop_pp_images"]), False),
             _relative(result), _log_odds(result),
             f"{worst['class_name']} / {worst['group']} {say.percent(worst['accuracy'], 0)}",
             f"{result['num_negative_drops']} / {result['num_insignificant_drops']} of {result['num_classes']}"]
        )  # fmt: skip
    accuracies = ["group", first, "this group"] if several else [first, second]
    headers = ["model", *accuracies, "drop (points)", "unbalanced drop", "relative", "log-odds",
               "worst class and group", "negative / insignificant class drops"]  # fmt: skip
    return Table(headers, rows)


def _cells(cells: list[Record]) -> list[Table]:
    """Class x group accuracy of one model; none where there are too many groups for columns."""
    names = list(dict.fromkeys(cell["group"] for cell in cells))
    if not cells or len(names) > MAX_COLUMNS:
        return []
    at = {(cell["class_name"], cell["group"]): cell for cell in cells}
    rows: list[list[Any]] = []
    for class_name in sorted({cell["class_name"] for cell in cells}):
        row: list[Any] = [class_name]
        for name in names:
            cell = at.get((class_name, name))
            row.append("–" if cell is None else
                       (say.percent(cell["accuracy"], 0),
                        f"{say.span(100 * cell['low'], 100 * cell['high'], '.0f')}\nn = {cell['num_images']:,}",
                        False))  # fmt: skip
        rows.append(row)
    return [Table(["class", *names], rows, f"Accuracy per class and group, {cells[0]['arm']}, Wilson's 95 %.")]


def _note(pair: list[str], others: list[str]) -> str:
    first, second = pair
    names = f"{first.capitalize()}, {second}, drop" if len(others) == 1 else f"{first.capitalize()}, this group, drop"
    several = "" if len(others) == 1 else f" Every group is compared with {first}, on the classes that both have."
    return (
        f"{names}: balanced, every class counts once; small print: 95 % bootstrap over classes and images. Relative: "
        f"of the {first} accuracy. Log-odds: mean over classes of the difference of logits, half a photo added to hits "
        "and misses. Unbalanced: every photo counts once, which mixes in that the groups have different classes; 95 % "
        f"over images.{several}"
    )


def _relative(result: Record) -> Any:
    ends = result["intervals"]["relative_classes"]
    shown = "" if ends is None else say.span(100 * ends[0], 100 * ends[1])
    value = result["drop"]["relative"]
    return "–" if value is None else (say.percent(value), shown, False)


def _log_odds(result: Record) -> Any:
    low, high = result["intervals"]["log_odds_classes"]
    return (say.signed(result["drop"]["log_odds"], ".2f"), say.span(low, high, ".2f"), False)
