"""Settings of `attributes` (label backgrounds by zero-shot) and of `discover` (groups by a model's accuracy)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
import tyro

from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError


class AttributesSettings(Settings):
    """Label every image with one of several attributes (backgrounds, by default) by zero-shot, or abstain."""

    embeddings: tyro.conf.Positional[str]
    """Folder of embeddings of a test set or of a pool."""
    out: str
    """Directory for labels/, attributes.json, confusion.csv and to_check.csv; running again continues it."""
    prompts: str = "backgrounds"
    """YAML file with a mapping of attribute: prompt or list of prompts; or `backgrounds`, the 14 of CounterAnimal
    (`backgrounds-miniature`: the 6 of the miniature world)."""
    margin: pydantic.NonNegativeFloat = 0.005
    """Abstain where the best and the second attribute differ by less in similarity."""
    pretrained: str = ""
    """Weights of the embeddings' encoder, where their tag does not name them: a checkpoint file or run directory."""
    given: str = ""
    """Labels to compare with: `folder` (CounterAnimal's common-BACKGROUND), `group`, `class_name`, or a csv or parquet
    file with `uid, attribute`."""
    corrections: str = ""
    """csv or parquet with `uid, attribute`, by somebody who looked: these win."""
    check: pydantic.NonNegativeInt = 200
    """Least certain images to list in to_check.csv, a form for --corrections."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """Where the prompts are embedded: auto is a GPU of this machine if there is one."""


class DiscoverSettings(Settings):
    """Find every class's best and worst attribute for a model, and say how much of the drop is selection."""

    predictions: tuple[str, ...]
    """Per-sample predictions of `clipgap evaluate`: FILE.parquet or NAME=FILE.parquet, one per model."""
    attributes: str
    """Attributes of the same images: output of `clipgap attributes`, or a csv or parquet file with `uid, attribute`."""
    out: str
    """Directory for discover.json, groups.csv, matrix.csv, photos.parquet, predictions/ and figures/."""
    by: str = ""
    """Model that chooses the groups that are written; default the first."""
    min_photos: pydantic.PositiveInt = 20
    """Attributes of a class with fewer images (in the half that chooses: half of it) take no part."""
    min_gap_pp: pydantic.NonNegativeFloat = 5.0
    """Keep a class if its best and worst attribute differ by more; the paper's 5 points are below noise by
    themselves."""
    fdr: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.1
    """Keep a class if its permutation p-value survives this false discovery rate (Benjamini and Hochberg)."""
    evaluate_on: Literal["held-out", "all"] = "held-out"
    """Which images the written groups hold: the half that did not choose them, or all (as the paper has it: the drop is
    then too large)."""
    splits: pydantic.PositiveInt = 100
    """Random halvings behind the matrix and the held-out drops."""
    permutations: pydantic.PositiveInt = 2000
    """Draws behind every p-value."""
    seed: int = 0
    """Seed of halvings, permutations and bootstraps."""

    @pydantic.model_validator(mode="after")
    def _some(self) -> Self:
        if not self.predictions:
            raise ConfigError("--predictions names no file", hint="for example --predictions b32=eval/b32/val.parquet")
        return self
