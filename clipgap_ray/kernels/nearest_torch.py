"""The pass of `kernels.nearest` on a torch device: float16 inputs, float32 sums, reductions blockwise on the device.

Never bfloat16 and never TF32: the product of two float16 numbers is exact in float32, and only the additions round.
Tensor cores truncate where a CPU rounds to nearest, so the bound is twice the CPU's (tests/gpu measures it).

Shapes as in `kernels.nearest`. Device memory: Q x (d + 12 (k + 8)) plus one (block_rows, Q) float32 product.
The nearest row is exact; which of several float32-equal rows holds the k-th place may differ from the CPU.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from clipgap_ray.kernels.nearest import Pass as CpuPass
from clipgap_ray.kernels.nearest import PoolScores, Queries
from clipgap_ray.kernels.topk import merge_topk

PRODUCT_BYTES = 1 << 30


class TorchPass(CpuPass):
    """`nearest.Pass` on a torch device.

    Args:
        queries: The stacked test rows.
        k: Nearest pool rows to keep per test row.
        violations: Count violated test rows too.
        device: A torch device; "cpu" works too and is how the maths is tested without a GPU.
    """

    def __init__(self, queries: Queries, k: int, *, violations: bool = False, device: str = "cuda") -> None:
        self._device = torch.device(device)
        super().__init__(queries, k, violations=violations)
        self.bound *= 2
        self.block_rows = max(64, min(65536, PRODUCT_BYTES // (4 * max(1, len(queries.rows)))))

    def _start_lists(self, width: int) -> None:
        # A copy: rows from the object store are read-only, which tensors cannot be.
        columns = torch.from_numpy(np.array(self.queries.rows, order="C")).to(self._device).T
        # CPUs have no product of float16 with float32 sums; converting first gives the same numbers.
        self._columns = columns if self._device.type == "cuda" else columns.float()
        self._device_tau = torch.from_numpy(self._tau).to(self._device)
        self._values = torch.full((width, len(self.queries.rows)), -torch.inf, device=self._device)
        self._ids = torch.full((width, len(self.queries.rows)), -1, dtype=torch.int64, device=self._device)

    def _lists(self) -> tuple[np.ndarray, np.ndarray]:
        lists = self._values.T.cpu().numpy(), self._ids.T.cpu().numpy()
        return merge_topk([lists], lists[0].shape[1])  # one order among equals: the smaller id first

    def _fold(self, rows: np.ndarray, row_ids: np.ndarray, scores: PoolScores) -> None:
        product = self._product(rows)
        over = product - self._device_tau
        for segment, (first, last) in enumerate(itertools.pairwise(self.queries.offsets.tolist())):
            if first == last:
                continue
            _write_maxima(product[:, first:last], first, scores.m[:, segment], scores.arg_m[:, segment])
            _write_maxima(over[:, first:last], first, scores.margin[:, segment], scores.arg_margin[:, segment])
            if scores.violations is not None:
                sure = (over[:, first:last] > 2 * self.bound).sum(1, dtype=torch.int32)
                scores.violations[:, segment] = sure.cpu().numpy()
        if scores.violations is not None:
            row, query = torch.nonzero(over.abs() <= 2 * self.bound, as_tuple=True)
            self._decide_violations(rows, row.cpu().numpy(), query.cpu().numpy(), scores.violations)
        self._insert(product, torch.from_numpy(row_ids).to(self._device))

    def _product(self, rows: np.ndarray) -> torch.Tensor:
        block = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            return torch.mm(block, self._columns, out_dtype=torch.float32)
        return block.float() @ self._columns

    def _insert(self, product: torch.Tensor, row_ids: torch.Tensor) -> None:
        """Merge a block into the lists of those queries of which it beats the last entry."""
        active = torch.nonzero(product.amax(0) >= self._values[-1]).squeeze(1)
        if not len(active):
            return
        width = len(self._values)
        values, at = product[:, active].topk(min(width, len(product)), dim=0)
        both = torch.cat([self._values[:, active], values])
        ids = torch.cat([self._ids[:, active], row_ids[at]])
        best, at = both.topk(width, dim=0)
        self._values[:, active], self._ids[:, active] = best, ids.gather(0, at)


def _write_maxima(block: torch.Tensor, offset: int, values: np.ndarray, positions: np.ndarray) -> None:
    """Row maxima of a segment of the product and the first test row that attains each."""
    at = block.argmax(dim=1)  # torch documents: the first of several maxima
    values[:] = block.gather(1, at[:, None]).squeeze(1).cpu().numpy()
    positions[:] = at.cpu().numpy() + offset
