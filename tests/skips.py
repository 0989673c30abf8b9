"""What was skipped proves nothing: when a run that skips tests has failed.

Everywhere: when every test of a module was skipped. With CLIPGAP_ALL=1, which `make test-all` sets: when any test was,
unless CLIPGAP_ALLOW_SKIPS=1 says that the machine may lack something. Tests in tests/gpu may be skipped always.
"""

from __future__ import annotations

import os

import pytest

_outcomes: dict[str, set[str]] = {}
_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember for every module whether anything in it ran, and every test that was skipped."""
    if report.when == "call" or report.skipped:
        _outcomes.setdefault(report.nodeid.split("::")[0], set()).add("skipped" if report.skipped else "ran")
    if report.skipped and not hasattr(report, "wasxfail") and "gpu/" not in report.nodeid:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that skipped too much, and say what."""
    silent = [module for module, seen in _outcomes.items() if seen == {"skipped"} and "gpu/" not in module]
    complete = os.environ.get("CLIPGAP_ALL") == "1" and os.environ.get("CLIPGAP_ALLOW_SKIPS") != "1"
    if session.exitstatus != 0 or not (silent or (complete and _skipped)):
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    said = (
        f"all tests skipped in: {', '.join(silent)}"
        if silent
        else (f"skipped: {', '.join(_skipped)}; CLIPGAP_ALLOW_SKIPS=1 allows it")
    )
    print(f"\n{said}")  # noqa: T201  the runner's own output
