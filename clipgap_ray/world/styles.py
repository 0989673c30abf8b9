"""The styles: one scene as a photo, a pencil sketch, a cartoon, a painting, a silhouette, or no scene at all.

Every style draws the same inks at twice the size and halves the result, which is cheaper than antialiased drawing.
Nothing here knows a class: a new shape comes out in every style.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.spatial import cKDTree

from clipgap_ray.world import backgrounds
from clipgap_ray.world.parts import BODY, DARK, GAP, LIGHT, SECOND
from clipgap_ray.world.scenes import RGB, Ink, Scene

_OVERSAMPLE = 2
#: How dark a pencil shades each role.
_HATCH = {BODY: 70, SECOND: 130, LIGHT: 0, DARK: 255, GAP: 40}
_NUM_BRUSHES = 12


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, 1) and (1, size) float32 coordinates in [-1, 1], down and across."""
    axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    return axis[:, None], axis[None, :]


def _flat(points: np.ndarray, edge: int) -> list[float]:
    flat: list[float] = (points * edge).ravel().tolist()
    return flat


def _stroke(draw: ImageDraw.ImageDraw, xy: list[float], fill: int | tuple[int, ...], width: int) -> None:
    draw.line(xy, fill=fill, width=width, joint="curve" if width > 3 else None)


def _cut_out(inks: list[Ink], size: int, see_through: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw inks on nothing.

    Args:
        inks: Back to front.
        size: Edge of the result in pixels.
        see_through: Leave gaps (windows) transparent instead of glazing them.

    Returns:
        (size, size, 3) float32 colours in 0..255 and (size, size, 1) float32 coverage in 0..1.
    """
    edge = _OVERSAMPLE * size
    canvas = Image.new("RGBA", (edge, edge))
    draw = ImageDraw.Draw(canvas)
    for ink in inks:
        fill = (0, 0, 0, 0) if see_through and ink.role == GAP else (*ink.rgb, 255)
        if ink.width:
            _stroke(draw, _flat(ink.points, edge), fill, max(1, round(ink.width * edge)))
        else:
            draw.polygon(_flat(ink.points, edge), fill=fill)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255.0


def mask(scene: Scene, size: int) -> Image.Image:
    """Where the object is: 255 on every pixel that it covers at all, 0 elsewhere; clutter is not the object."""
    _, cover = _cut_out(scene.subject, size)
    return Image.fromarray(np.where(cover[..., 0] > 0, 255, 0).astype(np.uint8)).convert("1")


def _finish(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _lit(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32: the object on its ground with light from one side, a coat and a shadow."""
    ground = backgrounds.photographed(scene.facts.background, rng, size)
    colour, cover = _cut_out(scene.inks, size)
    mask = Image.fromarray((cover[..., 0] * 255).astype(np.uint8))
    soft = np.asarray(mask.filter(ImageFilter.BoxBlur(size / 22)), dtype=np.float32)[..., None] / 255.0
    side, height = rng.uniform(-1.0, 1.0), rng.uniform(0.3, 1.0)
    reach = size // 16
    shadow = _shifted(soft, reach, round(-side * reach))
    # The blurred mask falls off towards the edges, so its slope is the slope of a rounded body.
    slope_x = np.roll(soft, 1, axis=1) - np.roll(soft, -1, axis=1)
    slope_y = np.roll(soft, 1, axis=0) - np.roll(soft, -1, axis=0)
    light = 0.72 + 0.3 * soft + rng.uniform(0.4, 1.1) * (height * slope_y - side * slope_x)
    light *= 1.0 + rng.uniform(0.0, 0.22) * _coat(rng, size)
    return ground * (1.0 - cover) * (1.0 - 0.5 * shadow) + colour * light * cover


def _shifted(field: np.ndarray, down: int, right: int) -> np.ndarray:
    """A (size, size, 1) field moved by up to `down` >= 0 and `right` pixels; nothing comes in at the edges."""
    moved = np.zeros_like(field)
    size = len(field)
    target = slice(max(right, 0), size + min(right, 0))
    source = slice(max(-right, 0), size - max(right, 0))
    moved[down:, target] = field[: size - down, source]
    return moved


def _coat(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 1) float32 in [-1, 1]: stripes or mottle, for fur, scales and bark."""
    y, x = _grid(size)
    a, b, c, d = rng.uniform(-26.0, 26.0, size=4).astype(np.float32)
    if rng.random() < 0.5:
        return np.sin(a * x + b * y + 2.0 * np.sin(0.3 * c * y))[..., None]
    return (np.sin(a * x + b * y) * np.sin(c * x + d * y))[..., None]


def photo(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """A lit scene through a camera: vignette, exposure, white balance, blur, noise."""
    domain = scene.domain
    pixels = _lit(scene, rng, size)
    y, x = _grid(size)
    warmth = rng.uniform(*domain.warmth)
    gain = rng.uniform(*domain.exposure) * np.array((1.0 + warmth, 1.0, 1.0 - warmth), dtype=np.float32)
    pixels *= gain * (1.0 - rng.uniform(0.0, 0.2) * (x * x + y * y))[..., None]
    contrast = rng.uniform(0.75, 1.15)
    pixels = 120.0 + contrast * (pixels - 120.0)
    blur = rng.uniform(0.0, domain.blur_px) * size / 64
    if blur > 0.3:
        pixels = np.asarray(_finish(pixels).filter(ImageFilter.BoxBlur(blur)), dtype=np.float32)
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * rng.uniform(0.0, domain.noise)
    return _finish(pixels + noise * np.array((1.0, 0.8, 1.2), dtype=np.float32))


def _pen(scene: Scene, rng: np.random.Generator) -> int:
    """Line width on the oversampled canvas: thin for small objects, whose details would drown otherwise."""
    return 2 if scene.facts.size == "small" else int(rng.integers(2, 5))


def sketch(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Wobbly pencil lines on paper, drawn over twice, with hatching where the object is dark."""
    edge = _OVERSAMPLE * size
    # Red is the paper left bare, green how densely to hatch; a later part hides the lines behind it.
    canvas = Image.new("RGB", (edge, edge), (255, 0, 0))
    draw = ImageDraw.Draw(canvas)
    pencil = int(rng.integers(20, 110))
    width = _pen(scene, rng)
    for ink in scene.inks:
        xy, tone = _flat(ink.points, edge), _HATCH[ink.role]
        line = (pencil, 0, 0)
        if ink.width:
            body = round(ink.width * edge)
            _stroke(draw, xy, line, body + width)
            if body > width:
                _stroke(draw, xy, (255, tone, 0), body - width // 2)
            continue
        draw.polygon(xy, fill=(255, tone, 0))
        for _ in range(2):
            wobbly = ink.points + rng.normal(0.0, 0.006, size=(len(ink.points), 2))
            wobbly = np.concatenate([wobbly, wobbly[:1]])
            draw.line(_flat(wobbly, edge), fill=line, width=max(1, width - 1))
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255.0
    y, x = _grid(size)
    turn = rng.uniform(0.0, np.pi)
    hatch = 0.5 + 0.5 * np.sin(rng.uniform(60.0, 100.0) * (np.cos(turn) * x + np.sin(turn) * y))
    grey = pixels[..., 0] * (1.0 - rng.uniform(0.5, 0.9) * pixels[..., 1] * hatch)
    paper = np.array((250.0, 248.0, 240.0)) - rng.uniform(0.0, 20.0) - rng.uniform(0.0, 9.0, size=3)
    grain = 1.0 + 0.03 * rng.standard_normal((size, size), dtype=np.float32)
    return _finish((grey * grain)[..., None] * paper)


def cartoon(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Flat colours inside dark outlines on a flat ground."""
    edge = _OVERSAMPLE * size
    canvas = Image.new("RGB", (edge, edge))
    draw = ImageDraw.Draw(canvas)
    backgrounds.draw_flat(draw, scene.facts.background, rng, edge)
    outline: RGB = (24, 20, 30)
    width = _pen(scene, rng)
    for ink in scene.inks:
        xy = _flat(ink.points, edge)
        if ink.width:
            body = max(1, round(ink.width * edge))
            if ink.role != DARK:
                _stroke(draw, xy, outline, body + width)
            _stroke(draw, xy, ink.rgb, body)
        else:
            draw.polygon(xy, fill=ink.rgb)
            _stroke(draw, [*xy, *xy[:4]], outline, width)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32)
    return _finish(_saturate(pixels, 1.3))


def _saturate(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = pixels.mean(axis=-1, keepdims=True)
    return grey + factor * (pixels - grey)


@lru_cache(maxsize=4)
def _brushes(size: int) -> np.ndarray:
    """(_NUM_BRUSHES, size, size) intp: the pixel that each pixel copies, so that dabs of one colour appear."""
    rng = np.random.Generator(np.random.Philox(key=size))
    pixels = np.indices((size, size)).reshape(2, -1).T
    brushes = []
    for _ in range(_NUM_BRUSHES):
        dabs = rng.integers(0, size, size=(size * size * 2 // 5, 2))
        turn = rng.uniform(0.0, np.pi)
        # Distances are longer across the brush than along it, so that dabs are.
        stretch = np.array([[np.cos(turn), -1.7 * np.sin(turn)], [np.sin(turn), 1.7 * np.cos(turn)]])
        nearest = dabs[cKDTree(dabs @ stretch).query(pixels @ stretch)[1]]
        brushes.append((nearest[:, 0] * size + nearest[:, 1]).reshape(size, size))
    return np.stack(brushes)


def painting(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """A lit scene in dabs of few, strong colours on canvas."""
    pixels = _saturate(_lit(scene, rng, size), rng.uniform(1.3, 1.9))
    pixels = pixels.reshape(-1, 3)[_brushes(size)[rng.integers(_NUM_BRUSHES)]]
    step = 255.0 / rng.integers(5, 9)
    pixels = np.round(pixels / step) * step + rng.uniform(-12.0, 12.0, size=3)
    weave = np.indices((size, size)).sum(axis=0) % 2
    return _finish(pixels + (6.0 * weave - 3.0)[..., None])


def silhouette(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """A black shape against a plain gradient."""
    _, cover = _cut_out(scene.inks, size, see_through=True)
    y, _ = _grid(size)
    top, bottom = rng.uniform(130.0, 255.0, size=(2, 3))
    blend = (0.5 + 0.5 * y)[..., None]
    ground = np.broadcast_to(top * (1.0 - blend) + bottom * blend, (size, size, 3))
    black = rng.uniform(0.0, 45.0, size=3)
    return _finish(ground * (1.0 - cover) + black * cover)


def abstract(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Waves, rings, checks or blots in two or three colours: nothing of any class."""
    y, x = _grid(size)
    a, b, c, d = rng.uniform(-14.0, 14.0, size=4).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        field = np.sin(a * x + b * y + 1.5 * np.sin(c * x - d * y))
    elif kind == 1:
        field = np.sin(2.0 * a * np.hypot(x - b / 14, y - c / 14))
    elif kind == 2:
        field = np.sign(np.sin(a * x + b * y) * np.sin(b * x - a * y))
    else:
        field = np.sin(a * x) + np.sin(b * y) + np.sin(c * (x + y)) * np.sin(d * (x - y))
        field = np.round(1.5 * field) / 3.0
    first, second = rng.uniform(0.0, 255.0, size=(2, 3))
    blend = (0.5 + 0.5 * field)[..., None]
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * rng.uniform(0.0, scene.domain.noise)
    return _finish(first * (1.0 - blend) + second * blend + noise)


PAINTERS: dict[str, Callable[[Scene, np.random.Generator, int], Image.Image]] = {
    style.__name__: style for style in (photo, sketch, cartoon, painting, silhouette, abstract)
}
