"""The table of faults: collected from the tests' properties, so that it works in any number of processes.

A plugin of tests/conftest.py and not a conftest beside its tests: with several processes the one that prints knows only
the conftest of what was named on the command line.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HEAD = """# Faults and what comes of them

Each stage runs on two simulated nodes of one CPU (object stores of 100 MB) and is struck once, at a moment drawn from
the seed in its cell. Its result is then compared, byte by byte, with that of a run that nobody disturbed. To write this
page: `CLIPGAP_FAULT_TABLE=docs/faults.md pytest tests/cluster/test_faults.py`; to repeat a cell, add
`-k "death and worker and score"`; for other moments, put `CLIPGAP_FAULT_SEED=7` before it.

* **healed**: Ray and the stage went on by themselves; the command ended with success.
* **rerun**: the command ended, and the same command given again finished the work.

A disk without space is always an error that names the file; after room was made, the same command finishes.

"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it where CLIPGAP_FAULT_TABLE says."""
    cells: dict[tuple[str, str], str] = {}
    for kind in ("passed", "failed"):
        for report in terminalreporter.getreports(kind):
            for name, value in report.user_properties:
                if name == "fault":
                    stage, fault, result = value
                    cells[stage, fault] = result if kind == "passed" else "FAILED"
    if not cells:
        return
    stages = list(dict.fromkeys(stage for stage, _ in cells))
    faults = list(dict.fromkeys(fault for _, fault in cells))
    lines = [f"| stage | {' | '.join(faults)} |", "|---|" + "---|" * len(faults)]
    lines += [f"| {stage} | {' | '.join(cells.get((stage, fault), '') for fault in faults)} |" for stage in stages]
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.line(line)
    if target := os.environ.get("CLIPGAP_FAULT_TABLE"):
        Path(target).write_text(HEAD + "\n".join(lines) + "\n")
