"""Settings of how long and how dear a run may become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

import pydantic
import tyro

from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError

#: Of every cluster's head Ray says that it has 1 of this, so that a price can name it.
HEAD = "node:__internal_head__"


class PricesFile(Settings):
    """What a cluster costs, as `--prices FILE.yaml` holds it."""

    currency: str = "USD"
    """Shown beside amounts."""
    per_hour: dict[str, pydantic.NonNegativeFloat]
    """Price of one unit of a resource for an hour: `{CPU: 0.04, GPU: 1.1}`; resources not named cost nothing. A head
    without CPUs has one unit of `node:__internal_head__`."""

    def hourly(self, resources: Mapping[str, float]) -> float:
        """Return what these amounts cost an hour."""
        return sum(amount * self.per_hour.get(name, 0.0) for name, amount in resources.items())


class LimitsSettings(Settings):
    """When to stop: after the commit during which a limit was passed. The same command continues."""

    max_hours: pydantic.PositiveFloat | None = None
    """Stop after so many hours by the clock, exit code 5."""
    max_cost: pydantic.PositiveFloat | None = None
    """Stop when the cluster's nodes have cost so much since the start of this command, exit code 5; needs --prices."""
    prices: str = ""
    """YAML file: `per_hour: {CPU: 0.04, GPU: 1.1}`, and `currency` if it is not USD."""

    @pydantic.model_validator(mode="after")
    def _priced(self) -> Self:
        if self.max_cost is not None and not self.prices:
            raise ConfigError(
                f"--max-cost {self.max_cost:g} without --prices", hint="a file with: per_hour: {CPU: 0.04, GPU: 1.1}"
            )
        return self


# Flags without a prefix (`--max-hours`), in a group of their own.
Limits = Annotated[LimitsSettings, Operational(), tyro.conf.arg(name="")]
