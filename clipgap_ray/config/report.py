"""Settings of `report`."""

from __future__ import annotations

import pydantic
import tyro

from clipgap_ray.config.base import Settings
from clipgap_ray.config.hide import parse_hide_rule
from clipgap_ray.errors import ConfigError
from clipgap_ray.schema import named


class ReportSettings(Settings):
    """Turn a study's directory into one self-contained page with the paper's figures, and its numbers as tables."""

    study: tyro.conf.Positional[str]
    """The study's directory: study.json with embed/, scores/, splits/, runs/ and eval/ beside it."""
    out: str = ""
    """Directory for the page, figures and tables; empty: STUDY/report."""
    gallery_rows: pydantic.PositiveInt = 5
    """Test images per gallery."""
    images: bool = True
    """Show pictures; `--no-images` makes a page that may be shared without the data's licence."""
    blocklist: str = ""
    """Takedown list as `embed` takes it: no gallery shows a sample whose uid, sha256 or url it names."""
    hide: tuple[str, ...] = ()
    """Further samples that no gallery shows, by any column of the pool's metadata: `caption~REGEX`, `clip_score<0.1`,
    `punsafe>0.5` where the pool has such a column."""
    bin_width: pydantic.PositiveFloat = 0.05
    """Width of the similarity bins; the paper's is 0.05. Narrower ones are taken where no test set fills four."""
    groups: tuple[str, ...] = ()
    """Groups of a test set in their order, TEST=BASE,OTHER: all are compared with the first, those that are not named
    come last. Default: as the study's file has it, else common before counter, else by number of photos."""
    draws: pydantic.PositiveInt = 2000
    """Bootstrap samples."""
    seed: int = 0
    """Seed of the bootstraps."""

    @pydantic.field_validator("hide")
    @classmethod
    def _rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for rule in value:
            parse_hide_rule(rule, None)
        return value

    @pydantic.field_validator("groups")
    @classmethod
    def _groups(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        group_orders(value)
        return value


def group_orders(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Read TEST=BASE,OTHER words into the order of groups by test set.

    Raises:
        ConfigError: If a word has no `=`, or names a test set or a group twice.
    """
    found = {test: tuple(name.strip() for name in names.split(",")) for test, names in named(words, "--groups").items()}
    for test, names in found.items():
        if len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"--groups {test}={','.join(names)} names a group twice or none", hint="TEST=BASE,OTHER")
    return found
