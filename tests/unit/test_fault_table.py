"""The page of faults: failures are cells, cells of tests that did not run stay, and so does the text around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fault_table

ROOT = Path(__file__).resolve().parents[2]
pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.fixture
def lab(stage):
    assert stage != "dedup"

@pytest.mark.fault
@pytest.mark.parametrize("victim", ["driver", "worker"])
@pytest.mark.parametrize("stage", ["embed", "score", "dedup"])
def test_death(stage, victim, lab, record_property):
    assert (stage, victim) != ("score", "worker")
    record_property("fault", (stage, victim, "healed"))

@pytest.mark.fault("full disk")
@pytest.mark.parametrize("stage", ["embed"])
def test_disk(stage):
    pytest.skip("none")
"""


def test_a_table_can_be_read_back() -> None:
    cells = {("embed", "driver"): "rerun (seed 1)", ("embed", "disk"): "FAILED", ("score", "disk"): "error, then rerun"}
    assert fault_table.cells_in("\n".join(fault_table.lines_of(cells))) == cells
    assert fault_table.cells_in("") == {}


def test_cells_of_one_run_change_no_others_and_no_text() -> None:
    page = (ROOT / "docs/faults.md").read_text()
    again = fault_table.with_cells(page, {})
    assert again == page, "the page is what the writer writes"
    changed = fault_table.with_cells(page, {("score", "worker"): "FAILED", ("score", "flood"): "healed"})
    before, table, after = changed.replace(fault_table.END, fault_table.BEGIN).split(fault_table.BEGIN)
    assert page.startswith(before)
    assert page.endswith(after)
    assert "comes back with its store" in after
    cells, old = fault_table.cells_in(table), fault_table.cells_in(page.split(fault_table.BEGIN)[1])
    assert {key for key in cells if cells[key] != old.get(key)} == {("score", "worker"), ("score", "flood")}


def test_a_page_without_a_table_gets_one() -> None:
    cells = {("embed", "driver"): "healed"}
    page = fault_table.with_cells("A page.\n", cells)
    assert page.startswith("A page.\n\n<!-- table")
    assert fault_table.with_cells(page, cells) == page
    assert fault_table.with_cells("", cells).startswith("<!-- table")


@pytest.mark.parametrize("words", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_what_fails_is_a_cell_and_what_is_skipped_is_not(
    pytester: pytest.Pytester, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGAP_FAULT_TABLE", str(pytester.path / "page.md"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_suite=SUITE)
    (pytester.path / "page.md").write_text(fault_table.with_cells("", {("embed", "full disk"): "clear error"}))
    pytester.runpytest_subprocess("-p", "tests.fault_table", *words).assert_outcomes(
        passed=3, failed=1, errors=2, skipped=1
    )
    assert fault_table.cells_in((pytester.path / "page.md").read_text()) == {
        ("embed", "full disk"): "clear error",
        ("embed", "driver"): "healed",
        ("embed", "worker"): "healed",
        ("score", "driver"): "healed",
        ("score", "worker"): "FAILED",
        ("dedup", "driver"): "FAILED",
        ("dedup", "worker"): "FAILED",
    }
