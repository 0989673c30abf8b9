"""Settings of `join` (drop between groups beside similarity) and of `agreement` (two encoders)."""

from __future__ import annotations

from typing import Self

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Settings
from clipgap_ray.errors import ConfigError


class DropJoinSettings(Settings):
    """Split the drop between two groups of a test set: what distance from the training pool explains, and the rest."""

    predictions: tuple[str, ...]
    """Per-sample predictions of `clipgap evaluate`: FILE.parquet, or NAME=FILE.parquet for several models."""
    scores: tuple[str, ...]
    """Output of `clipgap score` with the pool that the model was trained on, or a parquet file with `uid` and the
    similarity (of `clipgap gaps`: after a cut); NAME=SCORES where models were trained on different pools."""
    test: str
    """The grouped test set, as `score` names it."""
    out: str
    """Directory for join.json, models.csv, per_class.csv, photos/ and figures/."""
    column: tuple[str, ...] = ("similarity",)
    """Column of the query table: similarity (nearest pool row), tau (nearest reference row, for a model trained on the
    reference alone) or gap (`clipgap gaps`: nearest of both after a cut); NAME=COLUMN where models differ."""
    groups: tuple[str, str] = ("common", "counter")
    """The group expected to be easy, then the hard one: drop = first - second."""
    draws: pydantic.PositiveInt = 300
    """Bootstrap samples (classes, then photos); each fits the regression once."""
    seed: int = 0
    """Seed of the bootstraps."""
    min_overlap: float = 0.5
    """Split no drop when a smaller share of a group's photos lies in the common support of both groups."""
    caliper: pydantic.PositiveFloat = 0.2
    """Pairs of the matched drop differ by at most this many standard deviations (within class) of similarity."""

    pool: str = ""
    """Embeddings of the pool behind the scores: adds what the photos' neighbours are, by their captions."""
    neighbours: pydantic.PositiveInt = 20
    """Nearest pool rows to look at per photo; at most `score --k` are there."""
    far: float | None = None
    """Similarity below which a photo counts as far from the pool; default the median over the photos."""
    attributes: str = ""
    """Backgrounds of the test photos: output of `clipgap attributes`, or csv or parquet with `uid, attribute`."""
    pool_attributes: str = ""
    """Output of `clipgap attributes` for --pool: adds how common the groups' backgrounds are there, against the
    drops."""
    parts: tuple[str, ...] = ()
    """The same photos cut apart and scored against the same pool, NAME=SCORES (or a query table): foreground=... (the
    animal alone), background=... (the animal removed), as `clipgap cutout` writes the sets. Adds how much the groups
    differ in each similarity, and how much of the drop it explains."""
    baseline: tuple[str, ...] = ()
    """Models of --predictions that make the robustness line; adds every model's distance from it, before and after
    matching on similarity."""

    @pydantic.model_validator(mode="after")
    def _with_pool(self) -> Self:
        if (self.attributes or self.pool_attributes) and not self.pool:
            raise ConfigError("--attributes and --pool-attributes are about neighbours in --pool, which is missing")
        if bool(self.pool_attributes) != bool(self.attributes):
            raise ConfigError(
                "--attributes (of the test photos) and --pool-attributes belong together: backgrounds are compared",
                hint="make both with `clipgap attributes`",
            )
        return self

    @pydantic.model_validator(mode="after")
    def _some(self) -> Self:
        for name in ("predictions", "scores", "column"):
            if not getattr(self, name):
                raise ConfigError(f"join needs --{name}", hint="see `clipgap join --help`")
        if "whole" in schema.named(self.parts, "--parts"):
            raise ConfigError(
                "--parts whole=...: the whole photos are --scores", hint="name it foreground or background"
            )
        if self.parts and len({word.rpartition("=")[2] for word in self.scores}) > 1:
            raise ConfigError(
                "--parts are scored against one pool, --scores names several", hint="run join once for every pool"
            )
        if not 0 <= self.min_overlap <= 1:
            raise ConfigError(f"--min-overlap {self.min_overlap:g} is no share: expected 0 to 1")
        return self


class AgreementSettings(Settings):
    """Do two encoders agree about a pool? Pruned sets (Jaccard), and ranks of m, margin and tau (Spearman)."""

    scores: tuple[str, str]
    """Two outputs of `clipgap score`: the same pool and test sets, embedded by different encoders."""
    out: str
    """Directory for agreement.json and agreement.csv."""
    test: tuple[str, ...] = ()
    """Test sets to compare; default all that both have."""
    sizes: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of the pool that near- and far-pruning remove."""

    @pydantic.field_validator("sizes")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ConfigError("--sizes names no share", hint="for example --sizes 0.5")
        wrong = [size for size in value if not 0 < size < 1]
        if wrong:
            raise ConfigError(f"--sizes {wrong[0]:g} is no share of the pool: expected more than 0 and less than 1")
        return value
