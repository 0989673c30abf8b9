"""Settings of `cutout`."""

from __future__ import annotations

import pydantic
import tyro

from clipgap_ray.config.base import Settings


class CutoutSettings(Settings):
    """Cut a test set's photos apart by masks: the animal alone, and the photo without it. Input of `join --parts`."""

    source: tyro.conf.Positional[str]
    """The test set: CounterAnimal's tree, or a folder per class."""
    masks: str
    """Folder of the masks, PNG of the photos' sizes: the photo CLASS/GROUP/x.jpg has CLASS/GROUP/x.jpg.png or
    CLASS/GROUP/x.png; pixels above 0 are the animal."""
    out: str
    """Directory for foreground/NAME and background/NAME, test sets of the same layout, name and uids as the source;
    running again continues it."""
    quality: pydantic.PositiveInt = 95
    """Of the JPEGs."""
