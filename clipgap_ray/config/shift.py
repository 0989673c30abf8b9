"""Settings of `shift`."""

from __future__ import annotations

from typing import Self

import pydantic

from clipgap_ray.config.base import Settings
from clipgap_ray.config.predictions import prediction_files, variant_files
from clipgap_ray.errors import ConfigError


class ShiftSettings(Settings):
    """Accuracy per class and group, and the drop from the first group to every other, with intervals."""

    out: str
    """Directory for shift.json, models.csv, per_class.csv and shift.svg; with --variants also variants.csv and
    variants.svg."""
    predictions: tuple[str, ...] = ()
    """Per-sample predictions of `clipgap evaluate`: FILE.parquet, or NAME=FILE.parquet for several models."""
    table: str = ""
    """CSV with a row per class: `label`, `n_<first>`, `n_<second>` and, per model, `<MODEL>_c` and `<MODEL>_k`
    (accuracies of the first and second group, in percent or fractions)."""
    variants: tuple[str, ...] = ()
    """Further predictions of the same photos by the same models, asked with other prompts or candidates:
    MODEL:VARIANT=FILE.parquet, as `evaluate --candidates-k` and `--templates` leave them. They stand beside the model's
    --predictions, balanced and unbalanced, with the change of the drop paired by photo."""
    groups: tuple[str, ...] = ()
    """The base, then those that are compared with it: drop = base - group. None named: common, then counter, then
    whatever groups there are, the largest first. A --table has two."""
    draws: pydantic.PositiveInt = 2000
    """Bootstrap samples."""
    seed: int = 0
    """Seed of the bootstraps."""

    @pydantic.model_validator(mode="after")
    def _one_input(self) -> Self:
        if bool(self.predictions) == bool(self.table):
            raise ConfigError("shift needs --predictions or --table, and not both", hint="see `clipgap shift --help`")
        if self.variants and not self.predictions:
            raise ConfigError("--variants are compared with --predictions, photo by photo; a --table has no photos")
        if self.groups and len(set(self.groups)) < max(2, len(self.groups)):
            raise ConfigError(f"--groups is {list(self.groups)}: expected two different groups or more")
        if self.table and len(self.groups) > 2:
            raise ConfigError(f"--groups names {len(self.groups)} groups, but a --table has columns of two (_c and _k)")
        variant_files(self.variants, list(prediction_files(self.predictions)))
        return self
