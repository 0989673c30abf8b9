"""Settings of `dedup`."""

from __future__ import annotations

from typing import Literal

import pydantic

from clipgap_ray.config.base import Settings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError

POLICIES = ("first", "hard", "easy", "random")
COLUMNS = ("clip_score", "resolution", "width", "height", "image_bytes")  # of the metadata; resolution = width * height


class DedupSettings(Settings):
    """Find duplicates in a pool by image bytes and by similarity, and decide which rows stay."""

    pool: str
    """Folder of embeddings."""
    out: str
    """Directory for the keep table and the groups."""
    min_similarity: pydantic.PositiveFloat = 0.876
    """Two rows at least this alike are duplicates (the paper's 1 - 0.124). Exact copies (sha256) always are."""
    also: tuple[pydantic.PositiveFloat, ...] = ()
    """Further thresholds, decided from the same pass: each has its keep table in OUT/keep-VALUE, which --keep reads."""
    rule: Literal["greedy", "semdedup", "components"] = "greedy"
    """greedy: close to a kept row; semdedup: close to any earlier row (reproduces the papers, chain effect
    included); components: one row per connected component."""
    order: Literal["uid", "source"] = "uid"
    """Which of two duplicates comes first: by uid (independent of shards), or by source order as in the papers."""
    stays: str = "first"
    """Who stays among duplicates. first: the first in --order. hard: the row least alike to the centroid of its
    partition (SemDeDup's default), easy: the most alike; the centroids are those of --partitions and --seed in either
    mode. random: by a hash of (--seed, uid). Or the row with the largest clip_score, resolution, width, height or
    image_bytes; unknown values come last. Ties go by --order."""
    mode: Literal["auto", "exact", "partitioned"] = "auto"
    """exact: all pairs, O(n^2). partitioned: only pairs in the same or a probed partition of a k-means. auto: exact up
    to 200,000 rows (minutes on two cores at 512 dimensions), partitioned above."""
    partitions: pydantic.NonNegativeInt = 0
    """Partitions of the k-means; 0 = one per 8,192 rows (the paper: 50,000 for 400 million)."""
    probes: pydantic.PositiveInt = 2
    """Partitions that each row is compared with, the nearest first; 1 = its own only, as in the papers."""
    seed: pydantic.NonNegativeInt = 0
    """Of the k-means, of its sample and of --stays random."""
    check_rows: pydantic.NonNegativeInt = 1000
    """Rows whose exact neighbours are found to measure how many pairs a partitioned run did not compare; 0 = none."""
    limits: Limits = LimitsSettings()
    """When to stop."""

    @property
    def thresholds(self) -> tuple[float, ...]:
        """All thresholds: `min_similarity` first, then `also` in the order given."""
        return (self.min_similarity, *self.also)

    @property
    def needs_centroids(self) -> bool:
        """Whether the choice of who stays asks for partitions, whatever the mode."""
        return self.stays in ("hard", "easy")

    @pydantic.field_validator("stays")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (*POLICIES, *COLUMNS):
            raise ConfigError(
                f"--stays {value!r} is neither one of {', '.join(POLICIES)} nor a column with an order",
                hint=f"columns: {', '.join(COLUMNS)}",
            )
        return value

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> DedupSettings:
        if len(set(self.thresholds)) != len(self.thresholds):
            raise ConfigError(
                f"--min-similarity {self.min_similarity} and --also {' '.join(map(str, self.also))} repeat a threshold"
            )
        if self.seed >= 1 << 31:
            raise ConfigError(f"--seed {self.seed} is too large: expected less than 2**31")
        return self
