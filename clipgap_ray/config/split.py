"""Settings of `split` (one class per kind) and of `gaps`."""

from __future__ import annotations

from typing import Literal

import pydantic

from clipgap_ray.config.base import Settings
from clipgap_ray.errors import ConfigError


class SplitSettings(Settings):
    """What every kind of split needs."""

    scores: str
    """Output of `clipgap score`."""
    out: str
    """Split to write: NAME.npy (uids), beside it NAME.recipe.json and NAME.rows.npz (bitmap over rows)."""

    @pydantic.field_validator("out")
    @classmethod
    def _npy(cls, value: str) -> str:
        if not value.endswith(".npy"):
            raise ConfigError(f"--out {value!r} does not end in .npy", hint="for example splits/gap-sketch.npy")
        return value


class GapMatch(SplitSettings):
    """Remove every pool row that is closer to a test image than the reference is (strictly: margin > slack)."""

    kind: Literal["gap-match"] = "gap-match"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets to match; several are combined (their removals unite)."""
    slack: float = 0.0
    """Prune only rows closer than tau + slack."""


class Near(SplitSettings):
    """near-pruning: throw away the MOST similar rows, keep the --size LEAST similar to the test sets."""

    kind: Literal["near"] = "near"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets; similarity is the largest over all of them."""
    size: str
    """Rows kept: an integer is a count, a number with a point a fraction."""


class Far(SplitSettings):
    """far-pruning: throw away the LEAST similar rows, keep the --size MOST similar to the test sets."""

    kind: Literal["far"] = "far"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets; similarity is the largest over all of them."""
    size: str
    """Rows kept: an integer is a count, a number with a point a fraction."""


class Core(SplitSettings):
    """Core set: keep the --size rows most similar to several test sets at once."""

    kind: Literal["core"] = "core"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets."""
    size: str
    """Rows kept: an integer is a count, a number with a point a fraction."""
    policy: Literal["max", "rank", "zscore"] = "max"
    """How test sets merge: largest similarity, round-robin over ranks, or largest after standardising."""


class Random(SplitSettings):
    """Keep a uniform sample of the pool."""

    kind: Literal["random"] = "random"
    """Kind of the split."""
    size: str = ""
    """Rows kept: an integer is a count, a number with a point a fraction."""
    match: str = ""
    """Take the size of this other split instead."""
    seed: int = 0
    """Seed of the sample."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> Random:
        if bool(self.size) == bool(self.match):
            raise ConfigError(f"random needs one of --size ({self.size!r}) and --match ({self.match!r})")
        return self


class Threshold(SplitSettings):
    """Remove every pool row at least this similar to any test image (a duplicate audit)."""

    kind: Literal["threshold"] = "threshold"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets."""
    max_similarity: float
    """Rows with m >= this go."""


class Full(SplitSettings):
    """Keep every scored row."""

    kind: Literal["full"] = "full"
    """Kind of the split."""


AnySplit = GapMatch | Near | Far | Core | Random | Threshold | Full


class GapsSettings(Settings):
    """For every split and test image: the nearest row that is left, and the gap that training on it would see."""

    pool: str
    """Folder of embeddings of the pool."""
    scores: str
    """Output of `clipgap score`; its test sets and thresholds are used."""
    split: tuple[str, ...]
    """Splits NAME.npy."""
    out: str
    """Directory: OUT/<split>/<test>.parquet."""
