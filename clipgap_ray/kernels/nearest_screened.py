"""The pass of `kernels.nearest` on CPUs with bfloat16: a rough product tells which pairs can matter, exact sums decide.

The product in bfloat16 takes half the time of one in float32 (x86 with AVX512-BF16 or AMX). With x~ and q~ the rows
rounded to bfloat16, its similarities are off by at most (Cauchy-Schwarz, and `vectors.error_bound` for the sums)

    |x| |q - q~| + |x - x~| |q~| + bound |x~| |q~|,    and, rounded themselves, once more by 2**-8 of themselves,

some 0.004 for unit rows. Of a row's pairs with a test set only those whose interval reaches the best lower end can be
its maximum, of all pairs only those that reach a query's last entry can enter its list: a few of a thousand. These are
computed exactly, so results are within the bound of the plain pass, and mostly the truth rounded to float32.

Cost: beside the product two sweeps over it, and d multiplications for each pair that can matter. Memory beyond the
plain pass: (Q, d) and (BLOCK_ROWS, block_columns) bfloat16, and torch. Counts of violations are left to the plain pass:
every pair near its threshold would matter. Not built: 8-bit integers, faster still, with several times as many pairs
within reach.
"""

from __future__ import annotations

import numpy as np
import torch

from clipgap_ray.kernels.nearest import Pass, PoolScores
from clipgap_ray.kernels.nearest_loops import fold_screened


def supported() -> bool:
    """Tell whether this processor multiplies in bfloat16 faster than in float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class ScreenedPass(Pass):
    """`nearest.Pass` by a rough product; right on any CPU, and slow where `supported` is False.

    Attributes:
        begin_at: Rows per entry of the lists that the plain pass takes first: to lists of few rows' best too many pairs
            can matter.
        block_columns: Test rows that a block of rows is multiplied with at once: their product fits the cache.
    """

    begin_at = 32
    block_columns = 8192

    def _start_lists(self, width: int) -> None:
        super()._start_lists(width)
        exact = torch.from_numpy(self.queries.rows.astype(np.float32))
        rough = exact.bfloat16()
        self._columns, self._bits = rough.T, self.queries.rows.view(np.uint16)
        self._gap, self._size = _largest_norm(exact - rough.float()), _largest_norm(exact)
        nan = np.concatenate([[0], np.cumsum(np.isnan(self.queries.tau))])
        self._judged = nan[self.queries.offsets[1:]] == nan[self.queries.offsets[:-1]]
        self._exact_tau = np.nan_to_num(self.queries.tau)
        self._float_tau = self._exact_tau.astype(np.float32)
        self._seen = 0

    def _fold(self, rows: np.ndarray, row_ids: np.ndarray, scores: PoolScores) -> None:
        early = self._seen < self.begin_at * self._heap.shape[1]
        self._seen += len(rows)
        if early or scores.violations is not None:
            super()._fold(rows, row_ids, scores)
            return
        exact = torch.from_numpy(rows.copy()).float()  # faster than numpy's astype; torch warns of read-only arrays
        rounded, reach = self.rounded(exact)
        if not torch.isfinite(reach).all():  # of a NaN nothing can be said, and the loops promise that none comes
            super()._fold(rows, row_ids, scores)
            return
        for first in range(0, len(self.queries.rows), self.block_columns):
            here = slice(first, min(first + self.block_columns, len(self.queries.rows)))
            product = rounded @ self._columns[:, here]
            fold_screened(
                product.view(torch.int16).numpy().view(np.uint16), exact.numpy(), self._bits[here], self._pieces(here),
                first, self._float_tau[here], self._exact_tau[here], self._judged, reach.numpy(), row_ids,
                scores.m, scores.arg_m, scores.margin, scores.arg_margin,
                self._heap[here], self._heap_ids[here], self._floor[here],
            )  # fmt: skip

    def _pieces(self, columns: slice) -> np.ndarray:
        """(p, 3) int64: which of these columns belong to which test set."""
        bounds = np.clip(self.queries.offsets, columns.start, columns.stop) - columns.start
        pieces = np.stack([bounds[:-1], bounds[1:], np.arange(len(bounds) - 1)], axis=1)
        return pieces[bounds[:-1] < bounds[1:]]

    def rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, d) float32 rows in bfloat16, and how far off their similarities are, (n,) float32.

        That is before these are rounded: rounding adds `nearest_loops.ROUNDED` of themselves.
        """
        rounded = rows.bfloat16()
        size, gap = rows.norm(dim=1).double(), (rows - rounded.float()).norm(dim=1).double()
        reach = size * self._gap + gap * (self._size + self._gap) + (size + gap) * (self._size + self._gap) * self.bound
        # A hundredth more, and 2**-20: norms, thresholds and the comparisons themselves are float32.
        return rounded, (reach * 1.01 + 2.0**-20).float()


def _largest_norm(rows: torch.Tensor) -> float:
    return float(rows.norm(dim=1).max()) if len(rows) else 0.0
