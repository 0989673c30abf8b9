"""What a command tells while it works: a line on stderr, and to Prometheus what that line says.

Ray prefixes the names with `ray_` and counters with `_total`; docs/cluster.md lists them, deploy/monitoring has charts.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import time

import ray
from ray.util.metrics import Counter, Gauge

from clipgap_ray.stages import limits

LOG_EVERY_S = 10.0

COUNTERS = {
    "clipgap_stage_units": "Units of work finished (parts, shards, steps), by stage.",
    "clipgap_stage_rows": "Rows in them, by stage.",
}
GAUGES = {"clipgap_stage_units_left": "Units of work to do, by stage."}

logger = logging.getLogger("clipgap")


@functools.cache
def _meters() -> tuple[Counter, Counter, Gauge]:
    units, rows = (Counter(name, text, tag_keys=("stage",)) for name, text in COUNTERS.items())
    (left,) = (Gauge(name, text, tag_keys=("stage",)) for name, text in GAUGES.items())
    return units, rows, left


class Progress:
    """Done/total, rate and ETA on stderr: a rewritten line on a terminal, a log line every 10 s elsewhere."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.first = done
        self.rows = 0
        self.shown_done = -1
        self.note = ""  # shown at the end of the line
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, units: int = 1, rows: int = 0) -> None:
        """Count finished units (parts, steps) and the rows in them.

        Raises:
            StoppedError: If the command has a limit and reached it.
        """
        self.done += units
        self.rows += rows
        if ray.is_initialized():
            self._measure(units, rows)
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.live else LOG_EVERY_S):
            self.shown = now
            self._show("\r" if self.live else "", "" if self.live else "\n")
        limits.check()

    def _measure(self, units: int, rows: int) -> None:
        tags = {"stage": self.stage}
        finished, counted, left = _meters()
        if units > 0:  # Ray refuses to add nothing
            finished.inc(units, tags)
        if rows > 0:
            counted.inc(rows, tags)
        left.set(self.total - self.done, tags)

    def close(self) -> None:
        """Show the final state."""
        if self.live or self.shown_done != self.done:
            self._show("\r" if self.live else "", "\n")

    def _show(self, start: str, end: str) -> None:
        self.shown_done = self.done
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        left = (self.total - self.done) / rate if rate else math.inf
        eta = f", ETA {left:.0f} s" if 0 < left < math.inf else ""
        rows = f", {self.rows / seconds:,.0f} rows/s" if self.rows else ""
        note = f", {self.note}" if self.note else ""
        line = f"{self.stage}: {self.done}/{self.total} {self.unit}{rows}, {seconds:.0f} s{eta}{note}"
        sys.stderr.write(f"{start}{line:<78}{end}")
        sys.stderr.flush()
