"""Settings of `score`."""

from __future__ import annotations

from typing import Annotated

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError


class ScoreSettings(Settings):
    """One exact pass over a pool: every row's similarity to every test set, every test row's nearest pool rows."""

    pool: str
    """Folder of embeddings of the pool."""
    out: str
    """Directory for the score tables."""
    test: tuple[str, ...]
    """Test sets, NAME=EMB, separated by blanks."""
    keep: str = ""
    """Only rows that stay in this dedup output or split."""
    reference: tuple[str, ...] = ()
    """Reference whose gap gives the thresholds tau: EMB for all test sets, or NAME=EMB for one of them."""
    thresholds: tuple[str, ...] = ()
    """Thresholds files NAME=FILE instead of a reference's embeddings."""
    k: pydantic.PositiveInt = 100
    """Nearest pool rows to keep per test row."""
    add: bool = False
    """Add these test sets to scores that exist, without scoring the others again."""
    violations: bool = False
    """Also count, for every pool row, the test rows that it violates (similarity > tau)."""
    device: Annotated[str, Operational()] = "auto"
    """auto (a GPU where the cluster has one), cpu or cuda."""
    group_bytes: Annotated[int, Operational()] = 0
    """Bytes of neighbouring parts that one task reads; 0 = automatic, at most 256 MB."""
    query_share: Annotated[float, Operational()] = 0.0
    """Write the query side once it is at most this share of the embeddings read; 0 = automatic (0.8 %)."""
    limits: Limits = LimitsSettings()
    """When to stop."""

    @pydantic.field_validator("test")
    @classmethod
    def _tests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ConfigError("--test names no test set", hint="for example --test val=out/embed/val")
        schema.named(value, "--test")
        return value
