"""The pool side of a report by Ray Data: score tables of any size become counts, in bounded memory everywhere.

`read_parquet` streams the columns that are needed, every block is folded to one row of counts where it was read, and
the driver adds those rows up as they arrive. It holds counts per bin and per test image, never a pool row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.reporting import pool_side
from clipgap_ray.reporting.pool_side import PoolSide
from clipgap_ray.stages.session import connect

BATCH_ROWS = 1 << 18  # 5 MB of the three columns
CPUS = 0.5  # reading and folding each: two cores are enough, and a wide cluster is filled


def count(folder: str, slack: float) -> PoolSide:
    """Fold the score tables of a test set, SCORES/pool/<test>.

    Args:
        folder: The folder of part-*.parquet.
        slack: As for `pool_side.fold`.

    Raises:
        DataError: If the folder holds no table.
    """
    paths = [store.join(folder, name) for name in store.list_names(folder) if name.endswith(".parquet")]
    if not paths:
        raise DataError(f"{folder} holds no score table", hint="run `clipgap score`")
    connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    filesystem, _ = filesystems.filesystem(paths[0])
    places = [filesystems.filesystem(path)[1] for path in paths]
    dataset = ray.data.read_parquet(places, filesystem=filesystem, columns=list(pool_side.COLUMNS), num_cpus=CPUS)
    folded = dataset.map_batches(
        functools.partial(_fold, slack=slack), batch_format="pyarrow", batch_size=BATCH_ROWS, num_cpus=CPUS
    )
    total = pool_side.merge([])
    for row in folded.iter_rows():
        total = pool_side.merge([total, _side(row)])
    return total


def _fold(table: pa.Table, slack: float) -> pa.Table:
    found = pool_side.fold(table, slack)
    return pa.table(
        {
            "nearest": pa.array([found.nearest.tolist()], pa.list_(pa.int64())),
            "num_rows": pa.array([found.num_rows]),
            "num_above": pa.array([found.num_above]),
            "culprits": pa.array([found.culprits.tolist()], pa.list_(pa.int64())),
            "removed": pa.array([found.removed.tolist()], pa.list_(pa.int64())),
        }
    )


def _side(row: dict[str, Any]) -> PoolSide:
    nearest, culprits, removed = (np.asarray(row[name], np.int64) for name in ("nearest", "culprits", "removed"))
    return PoolSide(nearest, int(row["num_rows"]), int(row["num_above"]), culprits, removed)
