"""Settings of `report`."""

from __future__ import annotations

import pydantic
import tyro

from clipgap_ray.config.base import Settings


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
    """File of uids that no gallery may show: .npy of dtype u8,u8, or one hex uid per line."""
    bin_width: pydantic.PositiveFloat = 0.05
    """Width of the similarity bins; the paper's is 0.05."""
    draws: pydantic.PositiveInt = 2000
    """Bootstrap samples."""
    seed: int = 0
    """Seed of the bootstraps."""
