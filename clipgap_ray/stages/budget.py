"""What embedding on CPUs would cost, said before it starts: hours are refused unless asked for.

A short probe of the encoder that the driver has built anyway, times the rows that the first shard lets expect.
Decoding is not counted: for models worth waiting for it is a few percent. GPU runs are not probed, since the driver
need not have one.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from clipgap_ray.encoder import Encoder
from clipgap_ray.errors import BudgetError

LIMIT_S = 2 * 3600.0
PROBE_ROWS = 8
START_S = 10.0  # until an encoder's process has loaded torch and the model
DECODE_S = 0.002  # of a row at 256 pixels, to tell a small job from a large one


@dataclass(frozen=True)
class Forecast:
    """Rows to embed, and seconds."""

    rows: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Predicted rate of all encoders together."""
        return self.rows / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"about {self.rows:,} rows at {self.images_per_s:,.3g} images/s: ETA {duration(self.seconds)}"


def probe(encoder: Encoder, text: bool) -> float:
    """Return the seconds that an encoder takes for one row: two small batches, of which the second is timed.

    Args:
        encoder: Built, on this machine's CPU.
        text: Whether captions are embedded too.
    """
    small = copy.copy(encoder)  # shares the weights
    small.settings = dataclasses.replace(encoder.settings, batch_size=PROBE_ROWS)
    size = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (PROBE_ROWS, size, size, 3), np.uint8)
    captions = [f"a photo of a thing, number {i}" for i in range(PROBE_ROWS)]
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        small.encode_images(pixels)
        if text:
            small.encode_texts(captions)
        seconds = time.perf_counter() - started
    return seconds / PROBE_ROWS


def check(predicted: Forecast, agreed: bool) -> None:
    """Refuse a run of more than two hours unless it was agreed to.

    Raises:
        BudgetError: With the prediction and the ways out.
    """
    if predicted.seconds > LIMIT_S and not agreed:
        raise BudgetError(
            f"embedding on CPUs, {predicted}; more than {duration(LIMIT_S)} needs --yes",
            hint="use GPUs (--device cuda), try a part (--sample 0.01, --shards 0:10), or add --yes",
        )


def is_small(predicted: Forecast, encoders: float) -> bool:
    """Return whether one process alone would be done before an encoder actor has started.

    Args:
        predicted: With so many encoders at once.
        encoders: Their number.
    """
    return predicted.seconds * encoders + predicted.rows * DECODE_S < START_S


def duration(seconds: float) -> str:
    """Return seconds as words: "42 s", "12 min", "3.4 h", "2.1 days"."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f} {name}" if name != "h" else f"{value:.1f} {name}"
    return f"{seconds / 86400:.1f} days"
