"""Twelve drawn animals. Each takes `j`, (8,) numbers in [-1, 1] that stretch its proportions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipgap_ray.world.parts import BODY, DARK, LIGHT, SECOND, Part, arc, dome, ellipse, eye, line, polygon


def fish(j: np.ndarray) -> list[Part]:
    """Draw a fish with (n,) jitters j of its proportions."""
    tall, tail = 0.4 + 0.08 * j[0], 0.4 + 0.1 * j[1]
    return [
        polygon(SECOND, -0.4, 0.0, -0.95, -tail, -0.8, 0.0, -0.95, tail),
        polygon(SECOND, -0.15, -0.8 * tall, 0.05, -tall - 0.25, 0.4, -0.7 * tall),
        polygon(SECOND, 0.0, 0.8 * tall, 0.0, tall + 0.2, 0.3, 0.7 * tall),
        ellipse(BODY, 0.15, 0.0, 0.7, tall),
        arc(DARK, 0.05, 0.2, 0.0, 0.22, 0.75 * tall, -60, 60),
        *eye(0.58, -0.1, 0.1),
        line(DARK, 0.04, 0.84, 0.06, 0.68, 0.12),
    ]


def whale(j: np.ndarray) -> list[Part]:
    """Draw a whale with (n,) jitters j of its proportions."""
    deep, lift = 0.46 + 0.06 * j[0], 0.5 + 0.15 * j[1]
    return [
        polygon(BODY, -0.1, -0.3, -0.6, -0.12, -0.78, -lift, -0.6, -lift, -0.4, 0.12, 0.0, 0.5),
        ellipse(SECOND, -0.9, -lift, 0.2, 0.09, 25),
        ellipse(SECOND, -0.52, -lift, 0.2, 0.09, -25),
        ellipse(BODY, 0.3, 0.12, 0.66, deep),
        ellipse(LIGHT, 0.34, 0.12 + 0.6 * deep, 0.5, 0.36 * deep),
        ellipse(SECOND, 0.1, 0.42, 0.22, 0.09, 50),
        *eye(0.64, 0.02, 0.07),
        arc(LIGHT, 0.06, 0.18, -0.5, 0.16, 0.2, 180, 350),
        arc(LIGHT, 0.06, 0.5, -0.5, 0.16, 0.2, 190, 360),
        line(LIGHT, 0.07, 0.34, -0.3, 0.34, -0.55),
    ]


def bird(j: np.ndarray) -> list[Part]:
    """Draw a bird with (n,) jitters j of its proportions."""
    plump, tail = 0.34 + 0.05 * j[0], 0.16 + 0.1 * j[1]
    return [
        polygon(SECOND, -0.35, 0.0, -0.98, 0.1 + tail, -0.95, 0.32 + tail, -0.25, 0.3),
        line(DARK, 0.06, -0.02, 0.45, -0.02, 0.88, 0.12, 0.92),
        line(DARK, 0.06, 0.18, 0.45, 0.18, 0.88, 0.32, 0.92),
        ellipse(BODY, 0.06, 0.18, 0.52, plump, -22),
        ellipse(BODY, 0.44, -0.3, 0.27),
        polygon(SECOND, 0.66, -0.4, 0.98, -0.28, 0.66, -0.18),
        ellipse(LIGHT, 0.26, 0.26, 0.24, 0.18, -30),
        ellipse(SECOND, -0.08, 0.16, 0.38, 0.17, 12 + 12 * j[2]),
        *eye(0.5, -0.36, 0.08),
    ]


def duck(j: np.ndarray) -> list[Part]:
    """Draw a duck with (n,) jitters j of its proportions."""
    neck, deep = 0.12 * j[0], 0.36 + 0.04 * j[1]
    return [
        polygon(BODY, -0.4, 0.1, -0.95, -0.18, -0.75, 0.4),
        line(BODY, 0.26, 0.36, 0.3, 0.42, -0.4 - neck),
        ellipse(BODY, -0.08, 0.38, 0.68, deep),
        ellipse(BODY, 0.46, -0.5 - neck, 0.25),
        polygon(SECOND, 0.62, -0.6 - neck, 0.98, -0.5 - neck, 0.98, -0.38 - neck, 0.62, -0.38 - neck),
        ellipse(SECOND, -0.18, 0.36, 0.4, 0.2, -8),
        line(LIGHT, 0.08, 0.27, -0.12, 0.53, -0.12),
        *eye(0.5, -0.58 - neck, 0.075),
    ]


def cat(j: np.ndarray) -> list[Part]:
    """Draw a cat with (n,) jitters j of its proportions."""
    ear, side = 0.12 * j[0], np.sign(j[1]) or 1.0
    return [
        arc(BODY, 0.13, 0.5 * side, 0.45, 0.36 * side, 0.42, 90, -70),
        ellipse(BODY, 0.0, 0.52, 0.42 + 0.05 * j[2], 0.45),
        ellipse(LIGHT, 0.0, 0.6, 0.22, 0.3),
        polygon(BODY, -0.46, -0.2, -0.5, -0.9 - ear, -0.06, -0.56),
        polygon(BODY, 0.46, -0.2, 0.5, -0.9 - ear, 0.06, -0.56),
        polygon(SECOND, -0.38, -0.42, -0.42, -0.76 - ear, -0.18, -0.56),
        polygon(SECOND, 0.38, -0.42, 0.42, -0.76 - ear, 0.18, -0.56),
        ellipse(BODY, 0.0, -0.24, 0.47, 0.4),
        *eye(-0.19, -0.3, 0.1),
        *eye(0.19, -0.3, 0.1),
        polygon(DARK, -0.07, -0.14, 0.07, -0.14, 0.0, -0.05),
        line(DARK, 0.03, 0.14, -0.08, 0.66, -0.18),
        line(DARK, 0.03, 0.14, -0.02, 0.66, 0.04),
        line(DARK, 0.03, -0.14, -0.08, -0.66, -0.18),
        line(DARK, 0.03, -0.14, -0.02, -0.66, 0.04),
    ]


def dog(j: np.ndarray) -> list[Part]:
    """Draw a dog with (n,) jitters j of its proportions."""
    drop, side = 0.1 * j[0], np.sign(j[1]) or 1.0
    return [
        line(BODY, 0.14, 0.3 * side, 0.7, 0.72 * side, 0.5, 0.84 * side, 0.22),
        ellipse(BODY, 0.0, 0.52, 0.42 + 0.05 * j[2], 0.45),
        line(SECOND, 0.1, -0.18, 0.5, -0.18, 0.94),
        line(SECOND, 0.1, 0.18, 0.5, 0.18, 0.94),
        ellipse(BODY, 0.0, -0.32, 0.42, 0.42),
        ellipse(SECOND, -0.48, -0.22 + drop, 0.17, 0.4, 14),
        ellipse(SECOND, 0.48, -0.22 + drop, 0.17, 0.4, -14),
        ellipse(LIGHT, 0.0, -0.14, 0.24, 0.2),
        ellipse(DARK, 0.0, -0.24, 0.11, 0.08),
        *eye(-0.18, -0.46, 0.085),
        *eye(0.18, -0.46, 0.085),
        line(DARK, 0.04, -0.14, -0.06, 0.0, 0.0, 0.14, -0.06),
        ellipse(SECOND, 0.02, 0.09, 0.07, 0.11),
    ]


def rabbit(j: np.ndarray) -> list[Part]:
    """Draw a rabbit with (n,) jitters j of its proportions."""
    long, splay = 0.4 + 0.06 * j[0], 10 + 8 * j[1]
    return [
        ellipse(LIGHT, 0.44, 0.66, 0.15),
        ellipse(BODY, 0.0, 0.54, 0.42 + 0.05 * j[2], 0.42),
        ellipse(LIGHT, -0.2, 0.9, 0.18, 0.08),
        ellipse(LIGHT, 0.2, 0.9, 0.18, 0.08),
        ellipse(BODY, -0.2, -0.58, 0.14, long, -splay),
        ellipse(BODY, 0.2, -0.58, 0.14, long, splay),
        ellipse(SECOND, -0.2, -0.58, 0.06, 0.75 * long, -splay),
        ellipse(SECOND, 0.2, -0.58, 0.06, 0.75 * long, splay),
        ellipse(BODY, 0.0, -0.06, 0.37, 0.33),
        *eye(-0.16, -0.12, 0.085),
        *eye(0.16, -0.12, 0.085),
        ellipse(SECOND, 0.0, 0.02, 0.06, 0.045),
        polygon(LIGHT, -0.06, 0.1, 0.06, 0.1, 0.05, 0.24, -0.05, 0.24),
    ]


def snail(j: np.ndarray) -> list[Part]:
    """Draw a snail with (n,) jitters j of its proportions."""
    size, rise = 0.48 + 0.06 * j[0], 0.1 * j[1]
    turn = np.linspace(0.0, 4.2 * np.pi, 40)
    radius = np.linspace(0.92, 0.1, 40) * size
    spiral = np.stack([-0.14 + radius * np.cos(turn), -0.02 + radius * np.sin(turn)], axis=1)
    return [
        line(BODY, 0.06, 0.7, 0.1, 0.62, -0.36 - rise),
        line(BODY, 0.06, 0.78, 0.1, 0.92, -0.32 - rise),
        ellipse(DARK, 0.62, -0.38 - rise, 0.06),
        ellipse(DARK, 0.92, -0.34 - rise, 0.06),
        polygon(BODY, -0.98, 0.64, -0.5, 0.34, 0.4, 0.34, 0.55, 0.05, 0.78, 0.0, 0.92, 0.14, 0.86, 0.4, 0.7, 0.64),
        ellipse(SECOND, -0.14, -0.02, size),
        Part(spiral, DARK, 0.06),
    ]


def snake(j: np.ndarray) -> list[Part]:
    """Draw a snake with (n,) jitters j of its proportions."""
    along = np.linspace(0.0, 1.0, 36)
    waves, height = 1.5 + 0.25 * j[0], 0.34 + 0.08 * j[1]
    body = np.stack([-0.92 + 1.55 * along, height * np.sin(2 * np.pi * waves * along) * (0.6 + 0.4 * along)], axis=1)
    x, y = body[-1]
    return [
        line(DARK, 0.04, x + 0.2, y, x + 0.36, y - 0.03, x + 0.44, y - 0.1),
        line(DARK, 0.04, x + 0.36, y - 0.03, x + 0.46, y + 0.03),
        Part(body, BODY, 0.21),
        *(Part(body[k : k + 2], SECOND, 0.21) for k in range(4, 34, 5)),
        ellipse(BODY, x + 0.06, y, 0.21, 0.15),
        *eye(x + 0.1, y - 0.05, 0.06),
    ]


def butterfly(j: np.ndarray) -> list[Part]:
    """Draw a butterfly with (n,) jitters j of its proportions."""
    up, low, tilt = 0.42 + 0.06 * j[0], 0.3 + 0.06 * j[1], 35 + 10 * j[2]
    halves = [
        [
            ellipse(BODY, 0.5 * s, -0.3, up, 0.3, -tilt * s),
            ellipse(BODY, 0.4 * s, 0.38, low, 0.26, tilt * s),
            ellipse(SECOND, 0.55 * s, -0.34, 0.2, 0.14, -tilt * s),
            ellipse(SECOND, 0.44 * s, 0.4, 0.13),
            line(DARK, 0.04, 0.0, -0.4, 0.14 * s, -0.7, 0.28 * s, -0.84),
        ]
        for s in (-1.0, 1.0)
    ]
    return [*halves[0], *halves[1], ellipse(DARK, 0.0, 0.05, 0.09, 0.52)]


def spider(j: np.ndarray) -> list[Part]:
    """Draw a spider with (n,) jitters j of its proportions."""
    knee, reach = 0.16 + 0.08 * j[0], 0.92 + 0.05 * j[1]
    legs = [
        line(DARK, 0.06, 0.14 * s, 0.1 * row, 0.5 * s, 0.28 * row - knee, reach * s, 0.46 * row + 0.08)
        for s in (-1.0, 1.0)
        for row in (-1.6, -0.5, 0.6, 1.6)
    ]
    return [
        *legs,
        ellipse(BODY, 0.0, 0.26, 0.33 + 0.05 * j[2], 0.38),
        ellipse(BODY, 0.0, -0.24, 0.22, 0.2),
        polygon(SECOND, 0.0, 0.06, 0.12, 0.28, 0.0, 0.5, -0.12, 0.28),
        *eye(-0.09, -0.32, 0.07),
        *eye(0.09, -0.32, 0.07),
    ]


def turtle(j: np.ndarray) -> list[Part]:
    """Draw a turtle with (n,) jitters j of its proportions."""
    high, neck = 0.62 + 0.1 * j[0], 0.08 * j[1]
    return [
        polygon(BODY, -0.6, 0.3, -0.95, 0.46, -0.6, 0.42),
        polygon(BODY, -0.5, 0.2, -0.24, 0.2, -0.28, 0.66, -0.54, 0.66),
        polygon(BODY, 0.2, 0.2, 0.46, 0.2, 0.5, 0.66, 0.24, 0.66),
        line(BODY, 0.2, 0.4, 0.24, 0.76, 0.02 - neck),
        ellipse(BODY, 0.8, -0.04 - neck, 0.19, 0.16),
        dome(SECOND, -0.06, 0.3, 0.66, high),
        line(DARK, 0.05, -0.7, 0.3, 0.58, 0.3),
        line(DARK, 0.04, -0.28, 0.3, -0.2, -0.04, -0.34, -0.26),
        line(DARK, 0.04, 0.16, 0.3, 0.08, -0.04, 0.22, -0.26),
        line(DARK, 0.04, -0.2, -0.04, 0.08, -0.04),
        *eye(0.85, -0.08 - neck, 0.06),
    ]


SHAPES: dict[str, Callable[[np.ndarray], list[Part]]] = {
    shape.__name__: shape
    for shape in (fish, whale, bird, duck, cat, dog, rabbit, snail, snake, butterfly, spider, turtle)
}
