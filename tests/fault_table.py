"""The table of faults: collected from the tests' properties, so that it works in any number of processes.

A plugin of tests/conftest.py and not a conftest beside its tests: with several processes the one that prints knows only
the conftest of what was named on the command line.

A cell is FAILED from before its test's fixtures are made until the test itself says what came of the fault. In the
page, only what is between the two marks is written, and of that only the cells of tests that ran.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

FAILED = "FAILED"
BEGIN, END = "<!-- table of faults: written by tests/fault_table.py -->", "<!-- end of the table -->"

Cells = dict[tuple[str, str], str]  # by stage and fault


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin the cell of a test that is marked `fault(column, stage=row)`; either may be a parameter of the test."""
    mark = item.get_closest_marker("fault")
    if mark is not None:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        fault = mark.args[0] if mark.args else params["victim"]
        item.user_properties.append(("fault", (mark.kwargs.get("stage") or params["stage"], fault, FAILED)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the cells of this run, and put them into the page that CLIPGAP_FAULT_TABLE names."""
    cells: Cells = {}
    for kind in ("passed", "failed", "error"):
        cells |= cells_of(terminalreporter.getreports(kind), passed=kind == "passed")
    if not cells:
        return
    terminalreporter.section("faults")
    for line in lines_of(cells):
        terminalreporter.line(line)
    if target := os.environ.get("CLIPGAP_FAULT_TABLE"):
        page = Path(target)
        page.write_text(with_cells(page.read_text() if page.exists() else "", cells))


def cells_of(reports: Iterable[pytest.TestReport], *, passed: bool) -> Cells:
    """Return the cells of reports; of a test that did not pass, FAILED whatever it said."""
    found = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "fault":
                stage, fault, result = value  # type: ignore[misc]
                found[stage, fault] = result if passed else FAILED
    return found


def lines_of(cells: Cells) -> list[str]:
    """Return a table in Markdown: stages and faults in the order in which they come."""
    stages = list(dict.fromkeys(stage for stage, _ in cells))
    faults = list(dict.fromkeys(fault for _, fault in cells))
    lines = [f"| stage | {' | '.join(faults)} |", "|---|" + "---|" * len(faults)]
    return lines + [
        f"| {stage} | {' | '.join(cells.get((stage, fault), '') for fault in faults)} |" for stage in stages
    ]


def cells_in(table: str) -> Cells:
    """Read what `lines_of` wrote."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines() if "|" in line]
    if not rows:
        return {}
    _, *faults = rows[0]
    return {(stage, fault): cell for stage, *row in rows[2:] for fault, cell in zip(faults, row, strict=True) if cell}


def with_cells(page: str, cells: Cells) -> str:
    """Return a page with these cells in its table: others stay, and so does all text outside the marks.

    A page without a table gets one at its end.
    """
    before, begin, rest = page.partition(f"{BEGIN}\n")
    table, _, after = rest.partition(END)
    if not begin:
        before, after = page + ("\n" if page else ""), "\n"
    lines = lines_of({**cells_in(table), **cells})
    return f"{before}{BEGIN}\n" + "\n".join(["", *lines, "", ""]) + f"{END}{after}"
