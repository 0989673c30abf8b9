"""The order in which training sees samples: a pure function of (seed, position).

`SampleOrder` sees each sample once per epoch, `ResampledOrder` draws with replacement; both give the same interface.

The stream is epoch after epoch without a seam: position p lies in epoch p // n. In each epoch the parts are
permuted, neighbouring parts form windows of at least `window_rows` samples, and every window is permuted. So only
one window of samples need be open at a time, and a run resumes at any position on any number of workers without
replaying: the position is the number of samples seen.
"""

from __future__ import annotations

import functools

import numpy as np


class SampleOrder:
    """Positions of the training stream to (part, row).

    Args:
        counts: (P,) samples per part; parts may be empty.
        seed: Seed of the whole run.
        window_rows: Samples that are shuffled together, at least.

    Raises:
        ValueError: If there is no sample at all.
    """

    def __init__(self, counts: np.ndarray, seed: int, window_rows: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ValueError("no samples to order: every part is empty")
        self.seed = seed
        self.window_rows = window_rows
        self._window = functools.lru_cache(maxsize=4)(self._make_window)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, object]:
        return {"counts": self.counts, "seed": self.seed, "window_rows": self.window_rows}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the samples at positions start..stop-1.

        Returns:
            (n,) int64 epochs, (n,) int64 parts, (n,) int64 rows within the parts.
        """
        pieces = []
        position = start
        while position < stop:
            epoch, inside = divmod(position, self.num_samples)
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, inside, side="right"))
            first = int(ends[window - 1]) if window else 0
            length = min(stop - position, int(ends[window]) - inside)
            parts, rows = self._window(epoch, window)
            piece = slice(inside - first, inside - first + length)
            pieces.append((np.full(length, epoch, np.int64), parts[piece], rows[piece]))
            position += length
        epochs, parts, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return epochs, parts, rows

    def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the parts of each window, and the (w,) int64 cumulated sizes of the windows."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        windows: list[np.ndarray] = []
        sizes: list[int] = []
        start, size = 0, 0
        for at, part in enumerate(order):
            size += int(self.counts[part])
            if size >= self.window_rows or (at == len(order) - 1 and size):
                windows.append(order[start : at + 1])
                sizes.append(size)
                start, size = at + 1, 0
        return windows, np.cumsum(sizes)

    def _make_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._epoch(epoch)[0][window]
        parts = np.repeat(chosen, self.counts[chosen])
        rows = np.concatenate([np.arange(self.counts[part]) for part in chosen])
        mix = np.random.default_rng([self.seed, epoch, window, 1]).permutation(len(parts))
        return parts[mix], rows[mix]


class ResampledOrder:
    """Positions of a stream that draws samples with replacement, each with probability proportional to its weight.

    Windows of `window_rows` positions, each drawn for itself: first parts, then rows in those parts. So few parts are
    open at a time, as in `SampleOrder`, and a window needs nothing of the one before.

    Args:
        counts: (P,) samples per part; parts may be empty.
        weights: (P,) positive weight of every sample of a part.
        seed: Seed of the whole run.
        window_rows: Positions per window.

    Raises:
        ValueError: If there is no sample at all.
    """

    LEAST_PARTS = 16  # per window: fewer would mix sources and shards badly

    def __init__(self, counts: np.ndarray, weights: np.ndarray, seed: int, window_rows: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ValueError("no samples to order: every part is empty")
        self.seed = seed
        self.window_rows = window_rows
        mass = self.counts * self.weights
        self._shares = mass / mass.sum()
        self._window = functools.lru_cache(maxsize=4)(self._make_window)

    def __getstate__(self) -> dict[str, object]:
        names = ("counts", "weights", "seed", "window_rows")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the samples at positions start..stop-1; an epoch is as many positions as there are samples.

        Returns:
            (n,) int64 epochs, (n,) int64 parts, (n,) int64 rows within the parts.
        """
        positions = np.arange(start, stop, dtype=np.int64)
        windows, inside = np.divmod(positions, self.window_rows)
        parts, rows = np.empty_like(positions), np.empty_like(positions)
        for window in np.unique(windows):
            own = windows == window
            drawn_parts, drawn_rows = self._window(int(window))
            parts[own], rows[own] = drawn_parts[inside[own]], drawn_rows[inside[own]]
        return positions // self.num_samples, parts, rows

    def _make_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, window, 2])
        mean = self.num_samples / len(self.counts)
        num_parts = max(self.LEAST_PARTS, round(self.window_rows / max(mean, 1.0)))
        chosen = rng.choice(len(self.counts), num_parts, p=self._shares)
        parts = chosen[rng.integers(num_parts, size=self.window_rows)].astype(np.int64)
        return parts, rng.integers(self.counts[parts])
