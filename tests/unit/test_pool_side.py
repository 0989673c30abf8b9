"""Counts over pool rows: any cut into chunks gives the whole's, and brute force agrees."""

import numpy as np
import pyarrow as pa

from clipgap_ray.reporting import pool_side


def scores(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    margin = rng.normal(-0.2, 0.2, rows).astype(np.float32)
    margin[::7] = np.nan
    return pa.table({"m": rng.uniform(-1, 1, rows).astype(np.float32), "margin": margin,
                     "arg_margin": rng.integers(0, 30, rows) << 32})  # fmt: skip


def test_chunks_add_up_to_brute_force() -> None:
    table = scores(1000)
    chunks = [table.slice(0, 1), table.slice(1, 0), table.slice(1, 600), table.slice(601)]
    found = pool_side.merge([pool_side.fold(chunk, 0.05) for chunk in chunks])
    m, margin, arg = (table.column(name).to_numpy() for name in pool_side.COLUMNS)
    above = margin > 0.05
    assert (found.num_rows, found.num_above) == (1000, above.sum())
    assert found.culprits.tolist() == sorted(set(arg[above].tolist()))
    assert found.removed.tolist() == [(arg[above] == id_).sum() for id_ in found.culprits]
    assert found.nearest.sum() == 1000
    for at in (0, 123, 399):
        low, high = pool_side.EDGES[at : at + 2]
        assert found.nearest[at] == ((m >= low) & (m < high)).sum()


def test_ends_and_unknown_values_are_counted_once() -> None:
    table = pa.table({"m": np.array([-1, 1, 1.0001, np.nan], np.float32), "margin": np.full(4, np.nan, np.float32),
                      "arg_margin": np.full(4, -1)})  # fmt: skip
    found = pool_side.fold(table, 0.0)
    assert (found.nearest[0], found.nearest[-1], found.nearest.sum()) == (1, 2, 3)
    assert (found.num_rows, found.num_above) == (4, 0)
    assert pool_side.merge([]).num_rows == 0
