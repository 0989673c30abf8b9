"""Settings of `world`."""

from __future__ import annotations

from typing import Literal

import pydantic

from clipgap_ray.config.base import Settings


class WorldSettings(Settings):
    """Render a miniature world: pool, reference, test sets, CounterAnimal tree and the truth about every row."""

    out: str
    """Directory to write: pool/, reference/, tests/<name>/, counteranimal/, truth.parquet."""
    preset: Literal["tiny", "small"] = "tiny"
    """tiny: about 2,000 pool rows, for tests; small: about 20,000, the demo."""
    kind: Literal["miniature", "digits"] = "miniature"
    """miniature: drawn animals and things; digits: scikit-learn's handwritten digits (needs the extra `digits`)."""
    rows: pydantic.PositiveInt | None = None
    """Pool rows, instead of the preset's."""
    seed: int = 0
    """Same seed, same bytes."""
    correlation: float | None = None
    """How strongly a class keeps to its habitual background in the pool: 0 (not at all) to 1 (always)."""
    faults: bool = False
    """Plant faults: a truncated tar, broken images, repeated keys, missing captions, an empty shard."""
