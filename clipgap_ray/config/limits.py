"""Settings of how long and how dear a run may become."""

from __future__ import annotations

from typing import Annotated, Self

import pydantic
import tyro

from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError


class PricesFile(Settings):
    """What a cluster costs, as `--prices FILE.yaml` holds it."""

    currency: str = "USD"
    """Shown beside amounts."""
    per_hour: dict[str, pydantic.NonNegativeFloat]
    """Price of one unit of a resource for an hour: `{CPU: 0.04, GPU: 1.1}`; resources not named cost nothing."""


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
