"""Where and how each set of the miniature world is photographed: the one place for constants of difficulty.

The numbers hold at difficulty 0.5 and are scaled by `at`. Reference and val are the same domain, as ImageNet's are;
the pool is wider than both; v2 is another camera; a is hard on purpose; objectnet turns things over and indoors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

HABITUAL, UNIFORM, UNUSUAL, HOUSEHOLD = "habitual", "uniform", "unusual", "household"


@dataclass(frozen=True)
class Domain:
    """The range of photos in one set.

    Attributes:
        backgrounds: HABITUAL follows the pool's class-background correlation, UNIFORM ignores the class,
            UNUSUAL never shows the habitual one, HOUSEHOLD is indoors half of the time whatever the class.
        scale: Smallest and largest extent of the object, as a fraction of the frame.
        tilt_deg: Largest rotation to either side.
        upside_down: Fraction of photos turned by a half turn, then tilted.
        squeeze: Largest foreshortening of one axis, as a fraction.
        offset: Largest distance of the object's centre from where it still fits, as a fraction of the frame.
        clutter: Mean number of objects that are not of any class, half of them in front.
        noise: Largest standard deviation of sensor noise, in grey levels.
        blur_px: Largest blur radius at 64 px.
        exposure: Range of the gain.
        warmth: Range of the red-blue imbalance; positive is warmer.
    """

    backgrounds: str = HABITUAL
    scale: tuple[float, float] = (0.55, 0.95)
    tilt_deg: float = 16.0
    upside_down: float = 0.0
    squeeze: float = 0.2
    offset: float = 0.03
    clutter: float = 0.5
    noise: float = 9.0
    blur_px: float = 0.7
    exposure: tuple[float, float] = (0.75, 1.2)
    warmth: tuple[float, float] = (-0.08, 0.08)

    def at(self, difficulty: float) -> Domain:
        """This domain at another difficulty: noise, clutter, blur and poses scaled, 0.4x at 0 to 1.6x at 1."""
        factor = 0.4 + 1.2 * difficulty
        low, high = self.scale
        return replace(
            self,
            scale=(high - (high - low) * min(factor, 1.15), high),
            tilt_deg=min(self.tilt_deg * factor, 180.0),
            squeeze=min(self.squeeze * factor, 0.7),
            clutter=self.clutter * factor,
            noise=self.noise * factor,
            blur_px=self.blur_px * factor,
        )


_CURATED = Domain()

DOMAINS = {
    "pool": Domain(scale=(0.5, 0.97), tilt_deg=20.0, offset=0.05, noise=10.0, exposure=(0.7, 1.25)),
    "reference": _CURATED,
    "val": _CURATED,
    "v2": replace(_CURATED, scale=(0.65, 1.1), offset=0.1, exposure=(0.5, 0.85), warmth=(0.04, 0.22)),
    "sketch": _CURATED,
    "r": _CURATED,
    "a": Domain(UNUSUAL, (0.45, 0.75), 40.0, 0.05, 0.3, 0.06, 1.6, 14.0, 0.9, (0.6, 1.25), (-0.12, 0.12)),
    "objectnet": Domain(HOUSEHOLD, (0.55, 0.95), 40.0, 0.25, 0.35, 0.05, 0.6, 10.0, 0.7, (0.7, 1.1), (0.0, 0.12)),
    "counteranimal": _CURATED,
}
