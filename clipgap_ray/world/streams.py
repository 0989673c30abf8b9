"""One random stream per (set, row, purpose), so that every row can be computed alone.

Philox is a keyed counter generator: a stream is named by its key and costs 9 us to open, and no stream's numbers
depend on how many another one drew. A row has three streams. SCENE and DISTANCE decide the picture and nothing else, so
a duplicate or a leak repeats a picture by opening its source's streams again; RECORD decides what belongs to the row
itself (caption, how a near copy differs). A fourth, PLAN, belongs to a whole set.
"""

from __future__ import annotations

import numpy as np

PLAN, SCENE, RECORD, DISTANCE = range(4)

#: Position in this list is part of the key: append, never reorder, or every world changes.
_SETS = ("pool", "reference", "counteranimal", "val", "v2", "sketch", "r", "a", "objectnet",
         "inverted", "outlined", "rotated", "scans")  # fmt: skip


def stream(seed: int, set_name: str, row: int, purpose: int) -> np.random.Generator:
    """Open the random stream of one row.

    Args:
        seed: The world's seed, below 2**64.
        set_name: "pool", "reference", "counteranimal" or a test set.
        row: Row in the set, 0 <= row < 2**48.
        purpose: PLAN, SCENE, RECORD or DISTANCE.
    """
    key = np.array([seed, _SETS.index(set_name) << 56 | purpose << 48 | row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
