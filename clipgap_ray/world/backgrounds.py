"""Textured grounds and skies.

A ground is a random window of a texture made once per process (2 ms each), zoomed, tinted and often cut by a horizon:
procedural noise per picture would cost more than everything else together. Textures do not depend on the seed of a
world, as real grass does not depend on who downloads it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from clipgap_ray.world.classes import BACKGROUNDS

_EDGE = 224
#: Chance that a photo shows a horizon (outdoors) or the foot of a wall (indoors).
_HORIZON_CHANCE = 0.65

#: Flat colours for cartoons: ground and what is above it.
FLAT = {
    "grass": ((112, 178, 76), (166, 214, 240)),
    "snow": ((236, 242, 250), (176, 200, 226)),
    "sand": ((230, 204, 142), (160, 212, 244)),
    "water": ((70, 132, 204), (190, 224, 246)),
    "rock": ((142, 138, 134), (192, 202, 210)),
    "indoor": ((166, 112, 66), (236, 222, 196)),
}


def _clouds(rng: np.random.Generator, cells_x: int, cells_y: int) -> np.ndarray:
    """(_EDGE, _EDGE) float32 smooth noise in [0, 1] with that many cells across and down."""
    coarse = Image.fromarray(rng.random((cells_y, cells_x), dtype=np.float32))
    return np.clip(np.asarray(coarse.resize((_EDGE, _EDGE), Image.Resampling.BICUBIC)), 0.0, 1.0)


def _ramp(field: np.ndarray, *stops: tuple[int, int, int]) -> np.ndarray:
    """Map a field in [0, 1] to colours through equally spaced stops."""
    places = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(field, places, channel) for channel in zip(*stops, strict=True)], axis=-1)


def _grass(rng: np.random.Generator) -> np.ndarray:
    blades = 0.5 * _clouds(rng, 110, 30) + 0.25 * _clouds(rng, 60, 14) + 0.25 * _clouds(rng, 5, 5)
    return _ramp(blades, (28, 62, 18), (72, 130, 40), (140, 178, 70), (190, 200, 104))


def _snow(rng: np.random.Generator) -> np.ndarray:
    drifts = 0.7 * _clouds(rng, 5, 8) + 0.15 * _clouds(rng, 25, 25) + 0.15 * rng.random((_EDGE, _EDGE))
    return _ramp(drifts, (176, 196, 224), (222, 232, 244), (252, 253, 255))


def _sand(rng: np.random.Generator) -> np.ndarray:
    y = np.arange(_EDGE)[:, None] / _EDGE
    ripples = 0.5 + 0.5 * np.sin(90.0 * y + 7.0 * _clouds(rng, 6, 6))
    field = 0.35 * ripples + 0.3 * rng.random((_EDGE, _EDGE)) + 0.35 * _clouds(rng, 7, 7)
    return _ramp(field, (150, 112, 66), (214, 182, 122), (242, 222, 172))


def _water(rng: np.random.Generator) -> np.ndarray:
    y = np.arange(_EDGE)[:, None] / _EDGE
    swell = 0.5 + 0.5 * np.sin(60.0 * y + 9.0 * _clouds(rng, 4, 5))
    field = 0.45 * swell + 0.35 * _clouds(rng, 14, 70) + 0.2 * _clouds(rng, 4, 4)
    return _ramp(field, (14, 48, 96), (34, 92, 156), (84, 150, 200), (200, 228, 240))


def _rock(rng: np.random.Generator) -> np.ndarray:
    coarse = np.abs(_clouds(rng, 9, 9) - 0.5) * 2.0  # creases where the noise crosses one half
    field = 0.5 * np.sqrt(coarse) + 0.3 * _clouds(rng, 30, 30) + 0.2 * rng.random((_EDGE, _EDGE))
    return _ramp(field, (36, 34, 36), (104, 98, 94), (150, 144, 138), (190, 184, 176))


def _indoor(rng: np.random.Generator) -> np.ndarray:
    grain = 0.6 * _clouds(rng, 6, 120) + 0.4 * _clouds(rng, 4, 4)
    boards = _ramp(grain, (104, 62, 30), (164, 108, 60), (206, 154, 100))
    boards[:: _EDGE // 8] *= 0.45
    boards[1 :: _EDGE // 8] *= 0.7
    return boards


def _sky(rng: np.random.Generator) -> np.ndarray:
    field = 0.6 * _clouds(rng, 5, 7) + 0.4 * _clouds(rng, 12, 16)
    return _ramp(field, (96, 156, 220), (150, 196, 238), (236, 242, 248))


def _wall(rng: np.random.Generator) -> np.ndarray:
    stripes = 0.5 + 0.5 * np.sign(np.sin(np.arange(_EDGE)[None, :] * (2 * np.pi / 28)))
    return _ramp(0.6 * stripes + 0.4 * _clouds(rng, 5, 5), (206, 186, 150), (232, 220, 194), (246, 240, 226))


_MAKERS = {
    "grass": _grass, "snow": _snow, "sand": _sand, "water": _water, "rock": _rock, "indoor": _indoor,
    "sky": _sky, "wall": _wall,
}  # fmt: skip


@lru_cache(maxsize=len(_MAKERS))
def _texture(name: str) -> Image.Image:
    rng = np.random.Generator(np.random.Philox(key=list(_MAKERS).index(name)))
    return Image.fromarray(np.clip(_MAKERS[name](rng), 0, 255).astype(np.uint8))


def _window(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32 random window of a texture, zoomed by 1 to 2.3 and mirrored half of the time."""
    edge = rng.uniform(48.0, 112.0)
    left, top = rng.uniform(0.0, _EDGE - edge, size=2)
    box = (left, top, left + edge, top + edge)
    view = _texture(name).resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(view, dtype=np.float32)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _tint(rng: np.random.Generator) -> np.ndarray:
    """(3,) float32: darker or lighter by up to 15 %, with a slight cast; a strong one makes sand look like wood."""
    return (rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, size=3)).astype(np.float32)


def photographed(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A ground as a camera sees it.

    Args:
        name: One of classes.BACKGROUNDS.
        rng: Decides window, tint and horizon.
        size: Edge in pixels.

    Returns:
        (size, size, 3) float32, 0 to 255 and a little beyond.
    """
    ground = _window(name, rng, size) * _tint(rng)
    if rng.random() < _HORIZON_CHANCE:
        rows = int(size * rng.uniform(0.1, 0.45))
        above = _window("wall" if name == "indoor" else "sky", rng, size) * rng.uniform(0.8, 1.1)
        ground[:rows] = above[:rows]
    return ground


def draw_flat(draw: ImageDraw.ImageDraw, name: str, rng: np.random.Generator, edge: int) -> None:
    """Draw a cartoon's ground onto a square canvas: two flat colours and a few marks that name the ground."""
    ground, above = FLAT[name]
    horizon = int(edge * rng.uniform(0.15, 0.5))
    draw.rectangle((0, 0, edge, horizon), fill=above)
    draw.rectangle((0, horizon, edge, edge), fill=ground)
    shade = tuple(int(0.78 * channel) for channel in ground)
    unit = edge / 32
    if name == "indoor":
        for y in np.arange(horizon, edge, 3 * unit):
            draw.line((0, y, edge, y), fill=shade, width=2)
        return
    for x, y in rng.uniform((0, horizon), edge, size=(14, 2)).tolist():
        if name == "grass":
            draw.line((x - unit, y - 2 * unit, x, y, x + unit, y - 2 * unit), fill=shade, width=2)
        elif name == "water":
            draw.arc((x - 2 * unit, y, x + 2 * unit, y + 2 * unit), 200, 340, fill=(214, 234, 248), width=2)
        elif name == "rock":
            draw.polygon((x, y, x + 3 * unit, y, x + 1.5 * unit, y - 2 * unit), fill=shade)
        else:
            draw.ellipse((x, y, x + unit, y + unit), fill=shade)


assert set(BACKGROUNDS) == set(FLAT)
