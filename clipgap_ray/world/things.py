"""Twelve drawn things. Each takes `j`, (8,) numbers in [-1, 1] that stretch its proportions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipgap_ray.world.parts import BODY, DARK, GAP, LIGHT, SECOND, Part, arc, bow, dome, ellipse, line, polygon


def tree(j: np.ndarray) -> list[Part]:
    """Draw a tree with (n,) jitters j of its proportions."""
    trunk = polygon(SECOND, -0.12, 0.1, 0.12, 0.1, 0.16, 0.95, -0.16, 0.95)
    if j[1] > 0.3:  # a conifer
        wide = 0.58 + 0.1 * j[0]
        return [
            trunk,
            *(polygon(BODY, -wide * s, y, 0.0, y - 0.72 * s, wide * s, y)
              for s, y in ((1.0, 0.55), (0.82, 0.15), (0.62, -0.25))),
        ]  # fmt: skip
    r = 0.36 + 0.04 * j[0]
    return [
        trunk,
        ellipse(BODY, -0.36, 0.0, r),
        ellipse(BODY, 0.36, 0.0, r),
        ellipse(BODY, 0.0, -0.08, r),
        ellipse(BODY, -0.2, -0.46, r),
        ellipse(BODY, 0.2, -0.46, r),
        *(ellipse(LIGHT, x, y, 0.08) for x, y in ((-0.4, -0.05), (0.12, -0.5), (0.32, 0.05), (-0.15, -0.2))),
    ]


def mushroom(j: np.ndarray) -> list[Part]:
    """Draw a mushroom with (n,) jitters j of its proportions."""
    wide, stem = 0.78 + 0.1 * j[0], 0.17 + 0.05 * j[1]
    return [
        polygon(LIGHT, -stem, 0.0, stem, 0.0, 1.5 * stem, 0.9, -1.5 * stem, 0.9),
        dome(BODY, 0.0, 0.08, wide, 0.85 + 0.1 * j[2]),
        ellipse(SECOND, 0.0, 0.08, wide, 0.11),
        ellipse(LIGHT, -0.34, -0.2, 0.14),
        ellipse(LIGHT, 0.08, -0.5, 0.13),
        ellipse(LIGHT, 0.38, -0.16, 0.11),
    ]


def umbrella(j: np.ndarray) -> list[Part]:
    """Draw a umbrella with (n,) jitters j of its proportions."""
    wide, side = 0.88 + 0.06 * j[0], np.sign(j[1]) or 1.0
    top = 0.0 - 0.72 - 0.08 * j[2]
    scallops = [bow(wide * x, 0.0, wide / 4, 0.13, 0, -180, 6) for x in (0.75, 0.25, -0.25, -0.75)]
    canopy = np.concatenate([bow(0.0, 0.0, wide, -top, 180, 360), *scallops])
    return [
        line(DARK, 0.07, 0.0, -0.1, 0.0, 0.72),
        arc(DARK, 0.07, 0.13 * side, 0.72, 0.13 * side, 0.16, 180, 0),
        line(DARK, 0.06, 0.0, top, 0.0, top - 0.14),
        Part(canopy, BODY),
        Part(np.concatenate([[[0.0, top]], scallops[1], scallops[2][-1:]]), SECOND),
        line(DARK, 0.03, -wide / 2, -0.03, -wide / 4, 0.55 * top, 0.0, top),
        line(DARK, 0.03, wide / 2, -0.03, wide / 4, 0.55 * top, 0.0, top),
    ]


def flower(j: np.ndarray) -> list[Part]:
    """Draw a flower with (n,) jitters j of its proportions."""
    num, reach = 5 + int(2.99 * abs(j[0])), 0.33 + 0.03 * j[1]
    stem = 0.1 * j[2]
    petals = [
        ellipse(BODY, reach * np.cos(a), -0.34 + reach * np.sin(a), 0.25, 0.55 / num + 0.06, np.degrees(a))
        for a in np.arange(num) * 2 * np.pi / num
    ]
    return [
        line(SECOND, 0.09, 0.0, -0.3, stem, 0.4, 0.0, 0.96),
        ellipse(SECOND, 0.25, 0.56, 0.25, 0.1, -35),
        ellipse(SECOND, -0.24, 0.68, 0.25, 0.1, 35),
        *petals,
        ellipse(LIGHT, 0.0, -0.34, 0.19),
        ellipse(DARK, 0.0, -0.34, 0.08),
    ]


def house(j: np.ndarray) -> list[Part]:
    """Draw a house with (n,) jitters j of its proportions."""
    wide, eaves, peak = 0.62 + 0.1 * j[0], -0.1 + 0.1 * j[1], -0.82 + 0.1 * j[2]
    return [
        polygon(SECOND, 0.3, eaves, 0.3, peak + 0.02, 0.48, peak + 0.02, 0.48, eaves),
        polygon(BODY, -wide, eaves, wide, eaves, wide, 0.85, -wide, 0.85),
        polygon(SECOND, -wide - 0.16, eaves, 0.0, peak, wide + 0.16, eaves),
        polygon(DARK, -0.14, 0.85, -0.14, 0.34, 0.14, 0.34, 0.14, 0.85),
        polygon(GAP, -wide + 0.12, 0.1, -0.24, 0.1, -0.24, 0.38, -wide + 0.12, 0.38),
        polygon(GAP, wide - 0.12, 0.1, 0.24, 0.1, 0.24, 0.38, wide - 0.12, 0.38),
    ]


def car(j: np.ndarray) -> list[Part]:
    """Draw a car with (n,) jitters j of its proportions."""
    roof, nose = -0.5 + 0.08 * j[0], 0.55 + 0.12 * j[1]
    return [
        polygon(BODY, -0.62, 0.0, -0.4, roof, 0.25, roof, nose, 0.0),
        polygon(GAP, -0.46, -0.03, -0.32, roof + 0.1, -0.1, roof + 0.1, -0.1, -0.03),
        polygon(GAP, 0.0, -0.03, 0.0, roof + 0.1, 0.2, roof + 0.1, nose - 0.16, -0.03),
        polygon(BODY, -0.95, 0.05, -0.85, -0.05, 0.75, -0.05, 0.95, 0.1, 0.95, 0.4, -0.95, 0.4),
        ellipse(LIGHT, 0.88, 0.14, 0.08),
        line(SECOND, 0.08, -0.93, 0.22, 0.93, 0.22),
        *(ellipse(role, x, 0.42, r) for x in (-0.52, 0.52) for role, r in ((DARK, 0.24), (LIGHT, 0.1))),
    ]


def boat(j: np.ndarray) -> list[Part]:
    """Draw a boat with (n,) jitters j of its proportions."""
    mast, keel = -0.85 + 0.08 * j[0], 0.62 + 0.08 * j[1]
    return [
        line(DARK, 0.06, 0.0, 0.36, 0.0, mast - 0.08),
        polygon(LIGHT, 0.06, mast, 0.75 + 0.1 * j[2], 0.22, 0.06, 0.22),
        polygon(SECOND, -0.06, mast + 0.15, -0.06, 0.22, -0.56, 0.22),
        polygon(BODY, -0.92, 0.32, 0.98, 0.32, keel, 0.8, -keel, 0.8),
        line(DARK, 0.05, -0.84, 0.46, 0.84, 0.46),
    ]


def cup(j: np.ndarray) -> list[Part]:
    """Draw a cup with (n,) jitters j of its proportions."""
    wide, foot = 0.58 + 0.06 * j[0], 0.4 + 0.06 * j[1]
    return [
        arc(BODY, 0.13, 0.5, 0.06, 0.36, 0.3, -100, 100),
        polygon(BODY, -wide, -0.5, wide, -0.5, foot, 0.62, -foot, 0.62),
        ellipse(BODY, 0.0, 0.62, foot, 0.12),
        ellipse(SECOND, 0.0, -0.5, wide, 0.17),
        ellipse(DARK, 0.0, -0.48, wide - 0.09, 0.11),
        line(SECOND, 0.12, -0.9 * wide, 0.1, 0.9 * wide, 0.1),
    ]


def jug(j: np.ndarray) -> list[Part]:
    """Draw a jug with (n,) jitters j of its proportions."""
    belly, neck = 0.5 + 0.06 * j[0], 0.26 + 0.05 * j[1]
    return [
        arc(BODY, 0.12, 0.3, -0.2, 0.46, 0.42, -90, 80),
        polygon(BODY, -neck, 0.0, -neck, -0.74, -neck - 0.3, -0.86, neck + 0.06, -0.8, neck, 0.0),
        ellipse(BODY, 0.0, 0.36, belly, 0.52),
        ellipse(SECOND, 0.0, 0.86, 0.6 * belly, 0.09),
        line(SECOND, 0.12, -0.95 * belly, 0.3, 0.95 * belly, 0.3),
        line(DARK, 0.06, -neck - 0.2, -0.82, neck + 0.02, -0.78),
    ]


def moon(j: np.ndarray) -> list[Part]:
    """Draw a moon with (n,) jitters j of its proportions."""
    outer = bow(0.0, 0.0, 0.9, 0.9, 60, 300, 26)
    inner = bow(0.36 + 0.06 * j[0], 0.0, 0.79, 0.78, 285, 75, 22)
    return [
        Part(np.concatenate([outer, inner]), BODY),
        *(ellipse(LIGHT, x, y, r) for x, y, r in ((-0.66, -0.12, 0.1), (-0.56, 0.28, 0.08), (-0.4, -0.5, 0.07))),
    ]


def banana(j: np.ndarray) -> list[Part]:
    """Draw a banana with (n,) jitters j of its proportions."""
    fat = 0.62 + 0.08 * j[0]
    outer = bow(0.0, -0.55, 0.95, 1.1, 10, 170, 22)
    inner = bow(0.0, -0.5, 0.84, 1.1 - 0.7 * fat, 168, 12, 18)
    return [
        Part(np.concatenate([outer, inner]), BODY),
        Part(bow(0.0, -0.55, 0.88, 0.93, 25, 155), SECOND, 0.03),
        line(DARK, 0.14, 0.86, -0.32, 0.9, -0.55),
        line(DARK, 0.1, -0.88, -0.34, -0.94, -0.42),
    ]


def key(j: np.ndarray) -> list[Part]:
    """Draw a key with (n,) jitters j of its proportions."""
    ring, bit = 0.27 + 0.04 * j[0], 0.26 + 0.06 * j[1]
    return [
        Part(bow(-0.58, 0.0, ring, ring, 0, 360, 24), BODY, 0.17),
        line(BODY, 0.15, -0.58 + ring, 0.0, 0.96, 0.0),
        polygon(BODY, 0.58, 0.0, 0.72, 0.0, 0.72, bit + 0.06, 0.58, bit + 0.06),
        polygon(BODY, 0.82, 0.0, 0.96, 0.0, 0.96, bit + 0.14, 0.82, bit + 0.14),
        line(SECOND, 0.1, -0.2, -0.12, -0.2, 0.12),
    ]


SHAPES: dict[str, Callable[[np.ndarray], list[Part]]] = {
    shape.__name__: shape for shape in (tree, mushroom, umbrella, flower, house, car, boat, cup, jug, moon, banana, key)
}
