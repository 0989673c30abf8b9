"""The artist of the digits world: real scans (scikit-learn's 1,797 digits) in place of drawings.

The second world has another content and another notion of style, so that a conclusion drawn from the miniature world
can be checked where nothing was drawn for the purpose. Scans are dealt into three disjoint parts (test sets 30 %,
reference 25 %, pool 45 %), hence a test image has no pixel in common with the pool unless a leak was planted. The
test sets share their scans: the same digits plain, inverted, outlined and rotated, as ImageNet-C repeats ImageNet.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from clipgap_ray.errors import ConfigError
from clipgap_ray.world import captions, formats, styles
from clipgap_ray.world.domains import Domain
from clipgap_ray.world.pictures import Facts, Picture
from clipgap_ray.world.scenes import ABSTRACT, Scene
from clipgap_ray.world.spec import WorldSpec
from clipgap_ray.world.streams import PLAN, SCENE, stream

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = formats.DIGIT_TEMPLATES

_TEST_SHARE, _REFERENCE_SHARE = 0.30, 0.25
_SCAN_EDGE, _MARGIN = 8, 2  # pixels of a scan, and blank ones around it, since digits touch its edges
_ROTATED_DEG = (40.0, 120.0)

_CAPTIONS = {
    "plain": ("a scan of the digit {name}", "handwritten {name}", "the number {name} on paper", "{name} by hand"),
    "inverted": ("a negative of the digit {name}", "a white {name} on black", "inverted scan of a {name}"),
    "outlined": ("the outline of the digit {name}", "an outlined {name}", "contour of the number {name}"),
    "rotated": ("a tilted {name}", "the digit {name} turned on its side", "a rotated scan of a {name}"),
}  # fmt: skip
_NO_CLASS = ("scan {number}", "a handwritten digit", "page {number} of the form", "sample no. {number}")
_OFF_TOPIC = ("envelope lining {number}", "background pattern", "paper texture {number}", "watermark {number}")


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 12, 12) uint8 ink in 0..255 with a blank margin, and (1797,) int64 labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "a digits world needs scikit-learn's scans, and scikit-learn is not installed",
            hint="pip install clipgap-ray[digits]",
        ) from None
    bunch = load_digits()
    around = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    return np.pad(np.minimum(bunch.images * 16, 255).astype(np.uint8), around), bunch.target


@lru_cache(maxsize=4)
def scan_parts(seed: int) -> dict[str, np.ndarray]:
    """Deal the scans.

    Args:
        seed: The world's seed.

    Returns:
        "test", "reference" and "pool" -> (n,) int64 scan numbers; disjoint, together all scans.

    Raises:
        ConfigError: If scikit-learn is missing.
    """
    num = len(_scans()[1])
    order = stream(seed, "scans", 0, PLAN).permutation(num)
    cuts = [round(_TEST_SHARE * num), round((_TEST_SHARE + _REFERENCE_SHARE) * num)]
    return dict(zip(("test", "reference", "pool"), np.split(order, cuts), strict=True))


def scan_of(spec: WorldSpec, set_name: str, row: int) -> int:
    """The scan that a row shows; -1 for an off-topic row of the pool."""
    return _sample(spec, set_name, row)[0]


def _sample(spec: WorldSpec, set_name: str, row: int) -> tuple[int, Facts, np.random.Generator]:
    """Scan number, facts and the generator to go on drawing from."""
    rng = stream(spec.seed, set_name, row, SCENE)
    scans = scan_parts(spec.seed)[set_name if set_name in ("pool", "reference") else "test"]
    style = "plain" if set_name in ("val", "reference") else set_name
    if set_name == "pool":
        if rng.random() < spec.off_topic_rate:
            return -1, Facts("", -1, ABSTRACT), rng
        shares = np.cumsum([share for _, share in spec.style_shares])
        style = spec.style_shares[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))][0]
        scan = int(scans[rng.integers(len(scans))])
    else:
        scan = int(scans[row % len(scans)])  # every scan once, then again with another augmentation
    label = int(_scans()[1][scan])
    return scan, Facts(NAMES[label], label, style), rng


def draw(spec: WorldSpec, set_name: str, row: int) -> Picture:
    """Draw the picture of one row: a pure function of its arguments.

    Args:
        spec: The world.
        set_name: Any set of a digits world.
        row: Row in the set. For the pool this is the picture of a row that copies nothing.

    Raises:
        ConfigError: If scikit-learn is missing.
    """
    scan, facts, rng = _sample(spec, set_name, row)
    size = spec.image_size
    if scan < 0:
        return Picture(facts, styles.abstract(Scene(facts, [], Domain(), []), rng, size), 85)
    ink = _placed(_scans()[0][scan], facts.style, spec.difficulty, rng, size)
    if facts.style == "outlined":
        edges = ImageChops.difference(ink.filter(ImageFilter.MaxFilter(5)), ink)
        ink = edges.point(lambda level: 2 * level)
    grey = np.asarray(ink, dtype=np.float32) * rng.uniform(0.6, 1.0)
    if facts.style != "inverted":
        grey = rng.uniform(225.0, 255.0) - grey
    noise = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0.0, 16.0 * spec.difficulty)
    tint = rng.uniform(0.94, 1.0, size=3)
    pixels = np.clip((grey + noise)[..., None] * tint, 0, 255).astype(np.uint8)
    return Picture(facts, Image.fromarray(pixels), int(rng.integers(80, 96)))


def _placed(scan: np.ndarray, style: str, difficulty: float, rng: np.random.Generator, size: int) -> Image.Image:
    """The 8x8 scan, bicubic, turned, scaled and shifted on a dark (size, size) canvas."""
    turn = rng.uniform(-16.0, 16.0) * difficulty
    if style == "rotated":
        turn += rng.uniform(*_ROTATED_DEG) * (1.0 if rng.random() < 0.5 else -1.0)
    scale = _SCAN_EDGE / size / (0.85 + rng.uniform(-0.2, 0.2) * difficulty)
    cos, sin = scale * np.cos(np.radians(turn)), scale * np.sin(np.radians(turn))
    x, y = size / 2 + rng.uniform(-0.16, 0.16, size=2) * difficulty * size
    middle = _SCAN_EDGE / 2 + _MARGIN
    inverse_map = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    return Image.fromarray(scan).transform((size, size), Image.Transform.AFFINE, inverse_map, Image.Resampling.BICUBIC)


def caption(facts: Facts, kind: str, rng: np.random.Generator) -> str:
    """Write a caption of a kind in `captions.py`."""
    options = _CAPTIONS.get(facts.style, _OFF_TOPIC)
    if kind == captions.NO_CLASS:
        options = _NO_CLASS
    name = captions.wrong_name(facts.class_name, NAMES, rng) if kind == captions.WRONG else facts.class_name
    return options[int(rng.integers(len(options)))].format(name=name, number=rng.integers(10, 10_000))
