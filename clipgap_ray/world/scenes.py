"""From a row number to a posed, coloured scene: which class, where, how turned, in which colours.

The order of draws is part of a world's identity: a new draw goes to the end, or every world changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from clipgap_ray.world import animals, classes, things
from clipgap_ray.world.domains import DOMAINS, HABITUAL, HOUSEHOLD, UNIFORM, Domain
from clipgap_ray.world.parts import BODY, DARK, GAP, LIGHT, SECOND, ellipse, line, polygon
from clipgap_ray.world.pictures import Facts
from clipgap_ray.world.spec import RENDITIONS, WorldSpec
from clipgap_ray.world.streams import DISTANCE, SCENE, stream

ABSTRACT = "abstract"
_SHAPES = {**animals.SHAPES, **things.SHAPES}

PALETTE = {
    "red": (206, 44, 42), "orange": (236, 132, 36), "yellow": (242, 208, 62), "green": (62, 148, 66),
    "blue": (48, 92, 192), "purple": (124, 62, 164), "pink": (238, 146, 178), "brown": (124, 78, 44),
    "grey": (134, 134, 138), "white": (238, 236, 230), "black": (48, 46, 52),
}  # fmt: skip
_COLOURS = tuple(PALETTE)
_RGB = np.array(list(PALETTE.values()), dtype=np.float64)
_JITTER = 26.0  # grey levels around a palette colour
#: What is left of the extent of an object far away: 3 to 6 pixels of 64.
_FAR_AWAY = 0.09
_SMALL, _BIG = 0.5, 0.8  # extents below and above which a caption may call an object small or big

#: Styles that show no ground, and what stands in its place.
_NO_GROUND = {"sketch": "paper", "silhouette": "plain"}

RGB = tuple[int, int, int]


class Ink(NamedTuple):
    """One part, posed and coloured: (n, 2) points and width as fractions of the frame."""

    points: np.ndarray
    width: float
    role: str
    rgb: RGB


class Scene(NamedTuple):
    """All that a style needs to draw one picture; an abstract one has no inks.

    Attributes:
        facts: What is shown.
        inks: Everything drawn, back to front.
        domain: Of its set.
        subject: The inks of the object alone.
    """

    facts: Facts
    inks: list[Ink]
    domain: Domain
    subject: list[Ink]


def group_of(spec: WorldSpec, row: int) -> tuple[int, str]:
    """Label and group ("common" or "counter") of a CounterAnimal row."""
    animal, rest = divmod(row, 2 * spec.counter_rows)
    return classes.ANIMALS[animal], "common" if rest < spec.counter_rows else "counter"


def sample(spec: WorldSpec, set_name: str, row: int) -> tuple[Scene, np.random.Generator]:
    """Compose the scene of one row.

    Args:
        spec: The world.
        set_name: Any set of a miniature world.
        row: Row in the set.

    Returns:
        The scene, and the row's generator to go on drawing from when the scene is painted.
    """
    rng = stream(spec.seed, set_name, row, SCENE)
    domain = DOMAINS[set_name].at(spec.difficulty)
    if set_name == "pool" and rng.random() < spec.off_topic_rate:
        return Scene(Facts("", -1, ABSTRACT), [], domain, []), rng
    label = _label(spec, set_name, row, rng)
    style = _style(spec, set_name, rng)
    background = _background(spec, set_name, row, label, domain, rng)
    background = _NO_GROUND.get(style, background)
    colour = int(rng.integers(len(_COLOURS)))
    extent = rng.uniform(*domain.scale)
    distant = style == "photo" and _is_distant(spec, set_name, row)
    if distant:
        extent *= _FAR_AWAY
    size = "small" if extent < _SMALL else "big" if extent > _BIG else ""
    subject = _pose(classes.NAMES[label], extent, _tints(colour, rng), domain, rng)
    inks = _clutter(subject, domain, rng) if style in ("photo", "painting") else subject
    facts = Facts(classes.NAMES[label], label, style, background, _COLOURS[colour], size, distant)
    return Scene(facts, inks, domain, subject), rng


def _label(spec: WorldSpec, set_name: str, row: int, rng: np.random.Generator) -> int:
    if set_name == "pool":
        return int(np.searchsorted(_cumulative_pool_shares(), rng.random(), side="right"))
    if set_name == "counteranimal":
        return group_of(spec, row)[0]
    return row % len(classes.CLASSES)  # test sets and reference are balanced


@lru_cache(maxsize=1)
def _cumulative_pool_shares() -> np.ndarray:
    cumulative = np.cumsum(classes.pool_shares())
    cumulative[-1] = 1.0
    return cumulative


def _style(spec: WorldSpec, set_name: str, rng: np.random.Generator) -> str:
    if set_name == "pool":
        return spec.style_shares[_choice(np.array([share for _, share in spec.style_shares]), rng)][0]
    if set_name == "r":
        return RENDITIONS[int(rng.integers(len(RENDITIONS)))]
    return "sketch" if set_name == "sketch" else "photo"


def _background(spec: WorldSpec, set_name: str, row: int, label: int, domain: Domain, rng: np.random.Generator) -> str:
    if set_name == "counteranimal":
        info = classes.CLASSES[label]
        return info.habitual if group_of(spec, row)[1] == "common" else info.rare
    if domain.backgrounds == HABITUAL:
        shares = classes.background_shares(label, spec.correlation)
    elif domain.backgrounds in (UNIFORM, HOUSEHOLD):
        shares = np.ones(len(classes.BACKGROUNDS))
        if domain.backgrounds == HOUSEHOLD:
            shares[classes.BACKGROUNDS.index("indoor")] = len(shares) - 1.0
    else:
        shares = classes.unusual_shares(label)
    return classes.BACKGROUNDS[_choice(shares, rng)]


def _is_distant(spec: WorldSpec, set_name: str, row: int) -> bool:
    # A stream of its own: worlds that differ in distant_rate alone show the same scenes.
    return set_name != "pool" and bool(stream(spec.seed, set_name, row, DISTANCE).random() < spec.distant_rate)


def _choice(shares: np.ndarray, rng: np.random.Generator) -> int:
    """Index drawn in proportion to `shares`; 10x faster than Generator.choice."""
    cumulative = np.cumsum(shares)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _tints(colour: int, rng: np.random.Generator) -> dict[str, RGB]:
    """Colours of the roles: the second colour is half another palette colour, light and dark follow the body."""
    body = _RGB[colour] + rng.uniform(-_JITTER, _JITTER, size=3)
    other = 0.55 * _RGB[rng.integers(len(_RGB))] + 0.3 * body
    tints = {
        BODY: body,
        SECOND: other,
        LIGHT: 0.3 * body + 0.7 * np.array((250.0, 246.0, 236.0)),
        DARK: 0.12 * body + 16.0,
        GAP: np.array((188.0, 214.0, 232.0)) * rng.uniform(0.5, 1.05),
    }
    return {role: _rgb(values) for role, values in tints.items()}


def _rgb(values: np.ndarray) -> RGB:
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue


def _pose(name: str, extent: float, tints: dict[str, RGB], domain: Domain, rng: np.random.Generator) -> list[Ink]:
    """Stretch, flip, squeeze, turn and place the shape of a class."""
    parts = _SHAPES[name](rng.uniform(-1.0, 1.0, size=8))
    tilt_deg = rng.uniform(-domain.tilt_deg, domain.tilt_deg)
    angle = np.radians(tilt_deg + 180.0 * (rng.random() < domain.upside_down))
    squeeze = 1.0 - rng.uniform(0.0, domain.squeeze, size=2) * (rng.random() < 0.5, 1.0)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    slant = rng.uniform(-0.5, 0.5) * domain.squeeze
    cos, sin = np.cos(angle), np.sin(angle)
    stretch = np.array([[flip * squeeze[0], slant], [0.0, squeeze[1]]])
    matrix = 0.5 * extent * np.array([[cos, -sin], [sin, cos]]) @ stretch
    room = max(0.5 - 0.5 * extent, 0.0) + domain.offset
    centre = 0.5 + rng.uniform(-room, room, size=2)
    points = np.concatenate([part.points for part in parts]) @ matrix.T + centre
    ends = np.cumsum([len(part.points) for part in parts])[:-1]
    return [
        Ink(posed, 0.5 * extent * part.width, part.role, tints[part.role])
        for part, posed in zip(parts, np.split(points, ends), strict=True)
    ]


def _clutter(inks: list[Ink], domain: Domain, rng: np.random.Generator) -> list[Ink]:
    """Put pebbles, sticks and shards of random colours behind and in front of the object."""
    behind: list[Ink] = []
    front: list[Ink] = []
    for _ in range(rng.poisson(domain.clutter)):
        x, y = rng.uniform(0.05, 0.95, size=2)
        r, dx, dy = rng.uniform((0.04, -0.25, -0.25), (0.1, 0.25, 0.25))
        kind = rng.integers(3)
        if kind == 0:
            part = ellipse(BODY, x, y, r, 0.7 * r)
        elif kind == 1:
            part = line(BODY, 0.035, x, y, x + dx, y + dy)
        else:
            part = polygon(BODY, x, y, x + dx / 2, y + dy / 2, x + dy / 2, y - dx / 2)
        rgb = _rgb(_RGB[rng.integers(len(_RGB))] + rng.uniform(-_JITTER, _JITTER, size=3))
        (front if rng.random() < 0.5 else behind).append(Ink(part.points, part.width, BODY, rgb))
    return [*behind, *inks, *front]
