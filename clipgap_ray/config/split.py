"""Settings of `split` (one class per kind) and of `gaps`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray.config.base import Later, Settings
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
    cap: Annotated[str, Later()] = ""
    """Keep at most so many rows of one partition of the pool: an integer is a count, a number with a point times an
    even share (2.0: twice size / partitions). Empty: no cap. With --policy max."""
    partitions: Annotated[pydantic.PositiveInt, Later()] = 100
    """With --cap: k-means partitions of the pool; they are kept beside the split, for the next one."""
    partition_seed: Annotated[int, pydantic.Field(ge=0, lt=2**31), Later()] = 0
    """Seed of the k-means."""

    @pydantic.model_validator(mode="after")
    def _capped_by_similarity(self) -> Core:
        if self.cap and self.policy != "max":
            raise ConfigError(f"core --cap {self.cap} with --policy {self.policy}: a cap is for --policy max")
        return self


class Random(SplitSettings):
    """Keep a uniform sample of the pool."""

    kind: Literal["random"] = "random"
    """Kind of the split."""
    size: str = ""
    """Rows kept: an integer is a count, a number with a point a fraction."""
    match: str = ""
    """Take the size of this other split instead."""
    same_classes: tuple[str, ...] = ()
    """With --match: keep as many rows of every class as the other split does, by the names in the captions. Names
    (synonyms separated by commas), `@FILE` with a name per line, or `test:NAME`: the classes of a scored test set."""
    seed: int = 0
    """Seed of the sample."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> Random:
        if bool(self.size) == bool(self.match):
            raise ConfigError(f"random needs one of --size ({self.size!r}) and --match ({self.match!r})")
        if self.same_classes and not self.match:
            raise ConfigError("random --same-classes needs --match OTHER.npy: the split whose class counts it takes")
        return self


class Threshold(SplitSettings):
    """Remove every pool row at least this similar to any test image (a duplicate audit)."""

    kind: Literal["threshold"] = "threshold"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets."""
    max_similarity: float
    """Rows with m >= this go."""


class Score(SplitSettings):
    """Keep rows by a column of the pool's metadata (CLIP score, resolution, caption length), alone or by a preset."""

    kind: Literal["score"] = "score"
    """Kind of the split."""
    column: str = ""
    """A numeric column of the metadata, or caption_words, caption_chars, min_side, aspect_ratio. null fails."""
    size: str = ""
    """Keep the rows with the highest values: an integer is a count, a number with a point a fraction."""
    min: float | None = None
    """Keep rows with at least this value."""
    max: float | None = None
    """Keep rows with at most this value."""
    preset: Literal["", "clip-score-30", "basic"] = ""
    """clip-score-30: DataComp's best 30 % by CLIP score; basic: DataComp's basic rules (more than 2 words, more than
    5 characters, shorter side over 200 px, aspect ratio under 3) without its language rule, which needs a model."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> Score:
        if bool(self.preset) == bool(self.column):
            raise ConfigError(f"score needs one of --column ({self.column!r}) and --preset ({self.preset!r})")
        by_value = self.min is not None or self.max is not None
        if self.column and bool(self.size) == by_value:
            raise ConfigError(
                f"score --column {self.column} needs either --size or --min/--max", hint="for example --size 0.3"
            )
        return self


class DensityMatch(SplitSettings):
    """Remove pool rows until, for every test image, the j-th nearest row left is no closer than the j-th nearest
    reference row, for every j up to --neighbours: the pool is neither closer nor denser than the reference."""

    kind: Literal["density-match"] = "density-match"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets to match; scored with --reference."""
    neighbours: pydantic.PositiveInt = 10
    """How many neighbours of each test image are matched; 1 is gap-match."""
    seed: int = 0
    """Rows compete for the places in the order of a shuffle by this seed."""


class Equalise(SplitSettings):
    """Remove pool rows until, in every class of a test set, two groups of its photos see the same similarity to the
    pool: their quantiles differ by at most --slack. The causal arm of `clipgap join`."""

    kind: Literal["equalise"] = "equalise"
    """Kind of the split."""
    test: tuple[str, ...]
    """Test sets with groups; classes of different sets are different classes."""
    groups: tuple[str, str] = ("common", "counter")
    """The two groups; photos of other groups, and classes that lack one, are not looked at."""
    slack: float = 0.01
    """Largest difference of the groups' similarities that may remain, at any quantile of any class."""

    @pydantic.model_validator(mode="after")
    def _positive(self) -> Equalise:
        if not self.test:
            raise ConfigError("equalise needs at least one --test", hint="for example --test counteranimal")
        if not 0 < self.slack < 1:
            raise ConfigError(
                f"--slack {self.slack:g} is no difference of similarities: expected more than 0 and less than 1",
                hint="0.01; at 0 no two photos agree before the pool is empty",
            )
        return self


class Full(SplitSettings):
    """Keep every scored row."""

    kind: Literal["full"] = "full"
    """Kind of the split."""


AnySplit = GapMatch | Near | Far | Core | Random | Threshold | Score | DensityMatch | Equalise | Full


class PreviewSettings(Settings):
    """What a cut would keep, before anything is cut: size against slack, threshold and rank."""

    scores: str
    """Output of `clipgap score`."""
    test: tuple[str, ...]
    """Test sets; several are combined."""
    out: str = ""
    """Directory for preview.png and preview.csv; without it the table alone is printed."""


class GapsSettings(Settings):
    """For every split and test image: the nearest row that is left, and the gap that training on it would see."""

    pool: str
    """Folder of embeddings of the pool."""
    scores: str
    """Output of `clipgap score`; its test sets and thresholds are used."""
    split: tuple[str, ...]
    """Splits NAME.npy."""
    out: str
    """Directory: OUT/<split>/<test>.parquet and OUT/diagnostics.json."""
    neighbours: pydantic.PositiveInt = 10
    """k of the k-th-neighbour curves."""
    deltas: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1)
    """Count the rows left within these distances of every test image's hull (similarity > tau - delta)."""
    duplicates: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Similarities at which a test image counts as duplicated."""
