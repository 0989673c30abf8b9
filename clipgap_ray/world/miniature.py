"""The artist of the miniature world: drawn animals and things in several styles.

An artist is a module with NAMES, TEMPLATES, `draw` and `caption`; `render.py` needs no more of a kind of world.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from clipgap_ray.world import captions, formats, scenes, styles
from clipgap_ray.world.classes import NAMES
from clipgap_ray.world.pictures import Facts, Picture
from clipgap_ray.world.spec import WorldSpec

TEMPLATES = formats.TEMPLATES
__all__ = ["NAMES", "TEMPLATES", "caption", "draw", "mask"]

_LOWEST_QUALITY, _HIGHEST_QUALITY = 75, 95


def draw(spec: WorldSpec, set_name: str, row: int) -> Picture:
    """Draw the picture of one row: a pure function of its arguments.

    Args:
        spec: The world.
        set_name: Any set of a miniature world.
        row: Row in the set. For the pool this is the picture of a row that copies nothing.
    """
    scene, rng = scenes.sample(spec, set_name, row)
    image = styles.PAINTERS[scene.facts.style](scene, rng, spec.image_size)
    quality = int(rng.integers(_LOWEST_QUALITY, _HIGHEST_QUALITY + 1))
    return Picture(scene.facts, image, quality)


def mask(spec: WorldSpec, set_name: str, row: int) -> Image.Image:
    """Return where the object is in the picture of a row, as `styles.mask`."""
    return styles.mask(scenes.sample(spec, set_name, row)[0], spec.image_size)


def caption(facts: Facts, kind: str, rng: np.random.Generator) -> str:
    """Write a caption of a kind in `captions.py`."""
    return captions.write(facts, kind, NAMES, rng)
