"""`--max-hours` and `--max-cost`: a run stops after a commit, and the same command continues.

The clock starts with the command. Costs are those of the cluster's nodes, whoever uses them: resources of the living
nodes times their price, added up from look to look. Stages look when they show progress, which is after each commit,
and while no node could run their work (`waits.waiting`); nothing is interrupted in the middle, so a limit is overshot
by at most one part (training looks all the time: it goes back to its last checkpoint).
"""

from __future__ import annotations

import os
import time

import ray

from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.limits import LimitsSettings, PricesFile
from clipgap_ray.errors import StoppedError


class Allowance:
    """What a command may still take.

    Args:
        settings: The limits.
        prices: Needed where a cost is limited.
    """

    def __init__(self, settings: LimitsSettings, prices: PricesFile | None = None) -> None:
        self.settings, self.prices = settings, prices
        self.started = self.looked = time.monotonic()
        self.cost = 0.0

    def check(self) -> None:
        """Look at clock and nodes.

        Raises:
            StoppedError: If a limit is passed.
        """
        now = time.monotonic()
        hours = (now - self.started) / 3600
        if self.prices is not None:
            self.cost += (now - self.looked) / 3600 * hourly_cost(self.prices)
        self.looked = now
        hint = "everything committed is kept: the same command continues"
        limit = self.settings.max_hours
        if limit is not None and hours >= limit:
            raise StoppedError(f"stopped after {hours:.2f} hours, --max-hours is {limit:g}", hint=hint)
        limit = self.settings.max_cost
        if limit is not None and self.prices is not None and self.cost >= limit:
            spent = f"{self.cost:.2f} {self.prices.currency}"
            raise StoppedError(f"stopped after {spent} in {hours:.2f} hours, --max-cost is {limit:g}", hint=hint)


def hourly_cost(prices: PricesFile) -> float:
    """Return what the living nodes cost an hour; without a cluster, the CPUs of this machine."""
    here = [{"CPU": float(os.cpu_count() or 1)}]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else here
    return sum(prices.hourly(node) for node in nodes)


_allowance: Allowance | None = None


def start(settings: LimitsSettings) -> None:
    """Limit what this process does from now on; settings without a limit lift it.

    Raises:
        ConfigError: If the prices cannot be read.
    """
    global _allowance
    limited = settings.max_hours is not None or settings.max_cost is not None
    prices = PricesFile.load(read_yaml(settings.prices), settings.prices) if settings.prices else None
    _allowance = Allowance(settings, prices) if limited else None


def check() -> None:
    """Look whether the command may go on.

    Raises:
        StoppedError: If it may not.
    """
    if _allowance is not None:
        _allowance.check()
