"""Skipped tests: a run of everything fails by them, unless they are allowed or need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest_plugins = ["pytester"]

SUITE = """
import pytest

def test_runs(): pass

def test_needs_something():
    pytest.skip("not here")

@pytest.mark.xfail
def test_known(): assert False
"""


@pytest.mark.parametrize(
    ("folder", "environment", "code"),
    [
        ("cluster", {}, 0),
        ("cluster", {"CLIPGAP_ALL": "1"}, 1),
        ("cluster", {"CLIPGAP_ALL": "1", "CLIPGAP_ALLOW_SKIPS": "1"}, 0),
        ("gpu", {"CLIPGAP_ALL": "1"}, 0),
    ],
)
def test_a_run_of_everything_skips_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, folder: str, environment: dict[str, str], code: int
) -> None:
    for name in ("CLIPGAP_ALL", "CLIPGAP_ALLOW_SKIPS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    (pytester.path / folder).mkdir()
    (pytester.path / folder / "test_suite.py").write_text(SUITE)
    result = pytester.runpytest_subprocess("-p", "tests.skips")
    result.assert_outcomes(passed=1, skipped=1, xfailed=1)
    assert result.ret == code
    assert ("test_needs_something; CLIPGAP_ALLOW_SKIPS=1 allows it" in result.stdout.str()) == bool(code)


def test_a_module_that_only_skips_fails_always(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGAP_ALLOW_SKIPS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("import pytest\n\ndef test_it():\n    pytest.skip()\n")
    result = pytester.runpytest_subprocess("-p", "tests.skips")
    assert result.ret == 1
    assert "all tests skipped in: test_a_module_that_only_skips" in result.stdout.str()
