"""The strokes and fills that every shape is made of.

A shape is a list of parts, back to front, in its own frame: x to the right and y down, both within about [-1, 1].
Everything is a list of points, curves too, so that one affine map poses the whole shape and every style can draw the
same geometry: photos fill it, sketches outline it, silhouettes blacken it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# What a part is, which decides its colour in each style.
BODY = "body"  # the colour that the caption names
SECOND = "second"  # a second colour
LIGHT = "light"  # a paler body colour
DARK = "dark"  # eyes, tyres, seams
GAP = "gap"  # something seen through: windows

_TURN = np.linspace(0.0, 2.0 * np.pi, 23)[:-1]
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


class Part(NamedTuple):
    """A filled polygon, or a line when `width` is positive.

    points is (n, 2) float64 in the shape's frame; width is in the same units.
    """

    points: np.ndarray
    role: str
    width: float = 0.0


def polygon(role: str, *xy: float) -> Part:
    """A filled polygon from x, y, x, y, ..."""
    return Part(np.array(xy).reshape(-1, 2), role)


def line(role: str, width: float, *xy: float) -> Part:
    """An open line through x, y, x, y, ..."""
    return Part(np.array(xy).reshape(-1, 2), role, width)


def ellipse(role: str, cx: float, cy: float, rx: float, ry: float | None = None, tilt: float = 0.0) -> Part:
    """A filled ellipse (a circle without `ry`), turned by `tilt` degrees."""
    points = _CIRCLE * (rx, rx if ry is None else ry)
    if tilt:
        cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        points = points @ np.array([[cos, sin], [-sin, cos]])
    return Part(points + (cx, cy), role)


def bow(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, num: int = 14) -> np.ndarray:
    """(num, 2) points along an ellipse from `start` to `stop` degrees (0 = right, 90 = down, 270 = up)."""
    turn = np.radians(np.linspace(start, stop, num))
    return np.stack([cx + rx * np.cos(turn), cy + ry * np.sin(turn)], axis=1)


def arc(role: str, width: float, cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> Part:
    """A line along part of an ellipse."""
    return Part(bow(cx, cy, rx, ry, start, stop), role, width)


def dome(role: str, cx: float, cy: float, rx: float, ry: float) -> Part:
    """The filled upper half of an ellipse; its flat side lies at `cy`."""
    return Part(bow(cx, cy, rx, ry, 180.0, 360.0), role)


def eye(cx: float, cy: float, radius: float) -> list[Part]:
    """A light ring around a dark pupil, visible on any body colour."""
    return [ellipse(LIGHT, cx, cy, radius), ellipse(DARK, cx, cy, 0.55 * radius)]
