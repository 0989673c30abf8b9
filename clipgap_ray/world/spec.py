"""The knobs of a world, and its two presets.

A world is a value: two equal specs render the same bytes, in any process and in any order. So the spec is frozen and
hashable (plans are cached by it), and an experiment is `dataclasses.replace(preset("small"), leak_rate=0.0)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipgap_ray.errors import ConfigError

MINIATURE = "miniature"
DIGITS = "digits"

#: Sub-styles of the rendition family (ImageNet-R's part in this world).
RENDITIONS = ("cartoon", "painting", "silhouette")

_STYLE_SHARES = {
    # As in LAION, drawings are a small part: cutting them out must not change much how often photos are seen.
    MINIATURE: (("photo", 0.85), ("sketch", 0.06), *((style, 0.03) for style in RENDITIONS)),
    DIGITS: (("plain", 0.70), ("inverted", 0.10), ("outlined", 0.10), ("rotated", 0.10)),
}
_TEST_SETS = {
    MINIATURE: ("val", "v2", "sketch", "r", "a", "objectnet"),
    DIGITS: ("val", "inverted", "outlined", "rotated"),
}
#: img2dataset keys have four digits for the row inside a shard.
_MAX_SAMPLES_PER_SHARD = 10_000


@dataclass(frozen=True)
class WorldSpec:
    """Everything that decides the bytes of a world.

    Attributes:
        kind: "miniature" (drawn animals and things) or "digits" (scikit-learn's scanned digits).
        seed: Non-negative integer below 2**64.
        rows: Rows of the pool, duplicates and leaks included.
        reference_rows: Images in the reference set (the ImageNet-Train of this world).
        test_rows: Images in each test set.
        counter_rows: CounterAnimal photos per class and group; 0 for no CounterAnimal.
        image_size: Edge of the square images in pixels.
        samples_per_shard: Samples per tar, in the pool, the reference and the test sets alike.
        style_shares: (style, share) pairs of the pool's on-topic images; shares sum to 1.
        leak_rate: Fraction of each test set that is also in the pool, exactly or nearly.
        exact_rate: Fraction of pool rows that repeat another row's image bytes.
        near_rate: Fraction of pool rows that are re-encoded, resized or cropped copies of another row.
        no_class_rate: Fraction of on-topic rows whose caption does not name the class.
        wrong_rate: Fraction of on-topic rows whose caption names another class.
        off_topic_rate: Fraction of rows showing an abstract pattern with an unrelated caption.
        distant_rate: Fraction of photos, in every set but the pool, whose object is a few pixels far away. They are
            this world's hopeless images: a model that has learned all there is still misses most of them. The pool
            has none of its own, so that what the sets share with it are pictures to learn from.
        correlation: P(background = habitual one of the class) = 1/B + correlation * (1 - 1/B).
        difficulty: 0 to 1; scales noise, clutter and range of poses. 0.05 is the tuned default: the demo's model
            reads about three quarters of Val after 50,000 samples.
        faults: Plant the defects listed in `plan.py`.

    Raises:
        ConfigError: If a value is out of range.
    """

    kind: str = MINIATURE
    seed: int = 0
    # Sizes.
    rows: int = 2_000
    reference_rows: int = 320
    test_rows: int = 120
    counter_rows: int = 10
    image_size: int = 64
    samples_per_shard: int = 100
    # The pool's make-up.
    style_shares: tuple[tuple[str, float], ...] = _STYLE_SHARES[MINIATURE]
    leak_rate: float = 0.02
    exact_rate: float = 0.03
    near_rate: float = 0.04
    no_class_rate: float = 0.06
    wrong_rate: float = 0.03
    off_topic_rate: float = 0.04
    # The pictures.
    distant_rate: float = 0.12
    correlation: float = 0.3
    difficulty: float = 0.05
    faults: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _TEST_SETS:
            raise ConfigError(f"unknown world kind {self.kind!r}; expected one of {', '.join(_TEST_SETS)}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; expected 0 <= seed < 2**64")
        for name in ("rows", "reference_rows", "test_rows", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.samples_per_shard > _MAX_SAMPLES_PER_SHARD:
            raise ConfigError(
                f"samples_per_shard is {self.samples_per_shard}; expected at most {_MAX_SAMPLES_PER_SHARD}, "
                "because a key has four digits for the row"
            )
        if self.image_size < 16:
            raise ConfigError(f"image_size is {self.image_size}; expected at least 16 pixels")
        if self.counter_rows < 0:
            raise ConfigError(f"counter_rows is {self.counter_rows}; expected 0 (no CounterAnimal) or more")
        self._check_fractions()

    def _check_fractions(self) -> None:
        rates = (
            "leak_rate",
            "exact_rate",
            "near_rate",
            "no_class_rate",
            "wrong_rate",
            "off_topic_rate",
            "distant_rate",
        )
        for name in (*rates, "correlation", "difficulty"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number from 0 to 1")
        if self.no_class_rate + self.wrong_rate > 1.0:
            raise ConfigError(
                f"no_class_rate + wrong_rate is {self.no_class_rate + self.wrong_rate}; expected at most 1"
            )
        known = [style for style, _ in _STYLE_SHARES[self.kind]]
        unknown = [style for style, _ in self.style_shares if style not in known]
        if unknown:
            raise ConfigError(f"unknown style {unknown[0]!r} for a {self.kind} world; expected {', '.join(known)}")
        total = sum(share for _, share in self.style_shares)
        if any(share < 0 for _, share in self.style_shares) or abs(total - 1.0) > 1e-6:
            raise ConfigError(f"style_shares sum to {total:g}; expected non-negative shares that sum to 1")


_SIZES = {
    (MINIATURE, "tiny"): {},
    (MINIATURE, "small"): {
        "rows": 20_000,
        "reference_rows": 4_000,
        "test_rows": 1_200,
        "counter_rows": 60,
        "samples_per_shard": 500,
    },
    (DIGITS, "tiny"): {"rows": 1_000, "reference_rows": 400, "test_rows": 300},
    (DIGITS, "small"): {"rows": 8_000, "reference_rows": 1_500, "test_rows": 500, "samples_per_shard": 500},
}


def preset(
    name: str,
    *,
    rows: int | None = None,
    seed: int = 0,
    faults: bool = False,
    correlation: float | None = None,
    kind: str = MINIATURE,
) -> WorldSpec:
    """A world of a known size.

    Args:
        name: "tiny" (2,000 pool rows; seconds) or "small" (20,000 pool rows, test sets of 1,200; a minute).
            The digits worlds are smaller: 1,000 and 8,000 pool rows.
        rows: Pool rows in place of the preset's; the other sets keep their sizes.
        seed: Another seed is another world of the same kind.
        faults: Plant broken, repeated and truncated samples.
        correlation: Class-background correlation in place of the default; miniature worlds only.
        kind: "miniature" or "digits".

    Raises:
        ConfigError: If the name or the kind is unknown, or a value is out of range.
    """
    kinds = sorted({known for known, _ in _SIZES})
    if kind not in kinds:
        raise ConfigError(f"unknown world kind {kind!r}; expected one of {', '.join(kinds)}")
    if (kind, name) not in _SIZES:
        names = ", ".join(known for of_kind, known in _SIZES if of_kind == kind)
        raise ConfigError(f"unknown preset {name!r}; expected one of {names}", hint="clipgap world --preset tiny")
    spec = WorldSpec(kind=kind, seed=seed, faults=faults, style_shares=_STYLE_SHARES[kind], **_SIZES[kind, name])
    if kind == DIGITS:
        if correlation is not None:
            raise ConfigError(f"correlation is {correlation}, but a digits world has no backgrounds; leave it out")
        spec = replace(spec, counter_rows=0, correlation=0.0, distant_rate=0.0)
    elif correlation is not None:
        spec = replace(spec, correlation=correlation)
    return spec if rows is None else replace(spec, rows=rows)


def evaluation_sets(spec: WorldSpec) -> tuple[str, ...]:
    """Names of the world's test sets, in the order of their folders' rendering."""
    return _TEST_SETS[spec.kind]
