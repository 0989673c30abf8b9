"""FAISS's part on a GPU, where faiss-gpu is installed and this process has one: finding the cells of rows.

That is nearly all of the work of training and filling an IVF index. The index itself stays on the CPU, so that every
kind can be built so and its files are those of any machine.
"""

from __future__ import annotations

import functools
from typing import Any

import faiss

_swig: Any = faiss  # what the package's type stubs do not know


def gpu_flat(dim: int, metric: int) -> Any:
    """Return an empty flat index on the first GPU of this process; None without faiss-gpu or without a GPU."""
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return None
    flat = faiss.IndexFlatIP(dim) if metric == faiss.METRIC_INNER_PRODUCT else faiss.IndexFlatL2(dim)
    return _swig.index_cpu_to_gpu(_resources(), 0, flat)


@functools.cache
def _resources() -> Any:
    return _swig.StandardGpuResources()  # scratch memory of the device: once per process
