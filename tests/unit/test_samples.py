"""The sample index without Ray: who is in a split, and where an image lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema, store
from clipgap_ray.errors import ConfigError
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import samples
from clipgap_ray.stages.train_data import augment, read_image
from clipgap_ray.testsets import open_test_set
from tests import made

# Few high words, so that the search must look at the low word too.
UIDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30).map(
    lambda pairs: [f"{high:016x}{low:016x}" for high, low in pairs]
)


def table_of(uids: list[str]) -> pa.Table:
    return pa.table({"uid": pa.array(uids, pa.string())})


@given(UIDS, UIDS)
def test_membership_equals_a_set(uids: list[str], chosen: list[str]) -> None:
    packed = schema.pack_uids(sorted(set(chosen)))
    assert samples.in_split(table_of(uids), packed).tolist() == [uid in set(chosen) for uid in uids]
    assert samples.in_split(table_of(uids), None).all()


def test_index_of_a_pool_leads_back_to_the_image_bytes(tiny_world: made.World, tmp_path: Path) -> None:
    read = kept = 0
    for part, shard in enumerate(list_shards(tiny_world.path("pool"))):
        record = samples._index_shard(str(tmp_path), part, shard, None)
        assert record["read"] == record["kept"] + sum(record["dropped"].values())
        table = store.read_table(str(tmp_path / "samples" / f"part-{part:05d}.parquet"))
        assert table.schema.names == samples.SAMPLES.names
        assert table.num_rows == record["kept"]
        read, kept = read + record["read"], kept + record["kept"]
        for row in table.slice(0, 5).to_pylist():
            head = read_image(row)[:12]
            assert head.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))
            assert len(read_image(row)) == row["num_bytes"]
    truth = tiny_world.of("pool")
    lost = sum(row["fault"] == "truncated_shard" for row in truth)
    assert kept == sum(row["fault"] not in ("truncated_shard", "empty_shard") for row in truth)
    assert 0 <= read - kept <= lost


def test_index_of_a_tree_points_at_files(tiny_world: made.World, tmp_path: Path) -> None:
    test_set = open_test_set(tiny_world.path("counteranimal"))
    for part, shard in enumerate(test_set.shards[:3]):
        samples._index_shard(str(tmp_path), part, shard, test_set)
        for row in store.read_table(str(tmp_path / "samples" / f"part-{part:05d}.parquet")).to_pylist():
            assert row["offset"] == -1
            assert read_image(row) == Path(row["uri"]).read_bytes()
            assert test_set.class_names[row["label"]] in row["uri"]
            assert row["caption"] == f"A photo of {test_set.class_names[row['label']]}."


def test_parquet_is_refused_with_the_reason(tmp_path: Path) -> None:
    store.write_table(str(tmp_path / "0.parquet"), pa.table({"image": [made.jpeg(0)], "caption": ["x"]}))
    with pytest.raises(ConfigError, match="is parquet: training reads images by byte range"):
        samples._index_shard(str(tmp_path / "out"), 0, list_shards(str(tmp_path))[0], None)


def test_augmentation_is_a_function_of_its_key_alone() -> None:
    image = made.jpeg(3, 80)
    first = augment(image, 32, (0.5, 1.0), (0, 1, 2))
    np.random.default_rng(0).random(100)
    assert np.array_equal(first, augment(image, 32, (0.5, 1.0), (0, 1, 2)))
    assert not np.array_equal(first, augment(image, 32, (0.5, 1.0), (0, 1, 3)))
    assert first.shape == (32, 32, 3)


@pytest.mark.parametrize("broken", [b"", b"no image", made.jpeg(3, 80)[:300]])
def test_an_image_that_cannot_be_decoded_is_grey_so_that_ranks_stay_in_step(broken: bytes) -> None:
    assert (augment(broken, 16, (0.9, 1.0), (0,)) == 128).all()
