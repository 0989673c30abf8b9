"""Ray Data counts score tables as one process does."""

import numpy as np
import pytest

from clipgap_ray import store
from clipgap_ray.errors import DataError
from clipgap_ray.reporting import pool_side
from clipgap_ray.stages import pool_side as stage
from tests.unit.test_pool_side import scores

pytestmark = pytest.mark.ray


def test_ray_data_counts_what_one_process_counts(ray_session, tmp_path) -> None:
    tables = [scores(500, seed) for seed in range(4)]
    for number, table in enumerate(tables):
        store.write_table(str(tmp_path / "val" / f"part-{number:05d}.parquet"), table)
    found = stage.count(str(tmp_path / "val"), 0.05)
    twin = pool_side.merge([pool_side.fold(table, 0.05) for table in tables])
    assert (found.num_rows, found.num_above) == (twin.num_rows, twin.num_above) == (2000, twin.num_above)
    for name in ("nearest", "culprits", "removed"):
        assert np.array_equal(getattr(found, name), getattr(twin, name))


def test_a_folder_without_tables_is_named(tmp_path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="holds no score table"):
        stage.count(str(tmp_path / "val"), 0.0)
