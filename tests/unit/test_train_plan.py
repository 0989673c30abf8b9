"""What a run is planned to see, without Ray: shares of ranks, splits, sources, and what makes a run impossible."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.errors import DataError
from clipgap_ray.kernels.order import ResampledOrder, SampleOrder
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import samples, train_plan
from clipgap_ray.stages.train_data import Plan, Tables, batches, prefetched
from tests import made


def index_here(source: str, out: str) -> str:
    """Index a source in this process, as the stage's tasks would."""
    shards = list_shards(source)
    with rundir.RunDirectory(out, "samples", {"source": source}) as directory:
        parts = rundir.assign_parts(out, [shard.name for shard in shards])
        directory.log.append([samples._index_shard(out, parts[shard.name], shard, None) for shard in shards])
        directory.finish({"source": source, "kind": "pool"})
    return out


@pytest.fixture(scope="module")
def pool(tiny_world: made.World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = tiny_world.path("pool")
    return {"source": source, "samples": index_here(source, str(tmp_path_factory.mktemp("index")))}


def plan_of(pool: dict[str, str], out: Path, **more: Any) -> tuple[Plan, dict[str, int]]:
    words = {"model": "conv-64-test", "batch_size": 4, "workers": 2, "num_samples": 64, "window": 100, "seed": 5}
    return train_plan.make_plan(TrainSettings(**{**words, **pool, "out": str(out), **more}), str(out), 16)


def uids_of(plan: Plan) -> list[str]:
    return [uid for part in plan.parts for uid in part.table().column("uid").to_pylist()]


@pytest.fixture
def half(pool: dict[str, str], tmp_path: Path) -> tuple[str, set[str]]:
    """A split of every second uid of the pool."""
    uids = sorted(set(uids_of(plan_of(pool, tmp_path)[0])))[::2]
    np.save(tmp_path / "half.npy", schema.pack_uids(uids))
    return str(tmp_path / "half.npy"), set(uids)


@pytest.mark.parametrize(("world_size", "accum_freq"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 3)])
def test_ranks_share_one_stream_whatever_their_number(
    pool: dict[str, str], tmp_path: Path, world_size: int, accum_freq: int
) -> None:
    """Elastic workers: the global batch stays, so the samples of a step do too, to the last pixel."""
    plan, _ = plan_of(pool, tmp_path, accum_freq=accum_freq, num_samples=32 * accum_freq)
    assert plan.global_batch == 8 * accum_freq
    assert plan.steps == 4
    alone = list(itertools.islice(batches(plan, 0, 1, 1), 2))
    ranks = [list(itertools.islice(batches(plan, rank, world_size, 1), 2)) for rank in range(world_size)]
    for step in range(2):
        assert np.array_equal(alone[step][0], np.concatenate([rank[step][0] for rank in ranks]))
        assert alone[step][1] == [text for rank in ranks for text in rank[step][1]]


def test_a_run_begins_where_it_is_told_to(pool: dict[str, str], tmp_path: Path) -> None:
    plan, _ = plan_of(pool, tmp_path)
    whole = [pixels for pixels, _, _ in batches(plan, 1, 2, 0)]
    resumed = [pixels for pixels, _, _ in batches(plan, 1, 2, 5)]
    assert len(whole) == plan.steps
    assert all(np.array_equal(one, other) for one, other in zip(whole[5:], resumed, strict=True))


def test_one_epoch_sees_every_sample_of_the_split_once(
    pool: dict[str, str], tmp_path: Path, half: tuple[str, set[str]]
) -> None:
    split, uids = half
    plan, counts = plan_of(pool, tmp_path, split=split)
    assert set(uids_of(plan)) == uids
    assert counts["used"] == len(uids_of(plan)) == sum(part.count for part in plan.parts)
    assert counts["available"] > counts["used"]
    _, parts, rows = plan.order.take(0, counts["used"])
    assert len(set(zip(parts.tolist(), rows.tolist(), strict=True))) == counts["used"]


def test_what_a_split_covers_and_costs_is_said(
    pool: dict[str, str], tmp_path: Path, half: tuple[str, set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    uids = half[1]
    strangers = [f"{i:032x}" for i in range(len(uids))]
    np.save(tmp_path / "mixed.npy", schema.pack_uids(sorted([*uids, *strangers])))
    with caplog.at_level(logging.INFO, "clipgap"):
        plan_of(pool, tmp_path, split=str(tmp_path / "mixed.npy"))
    said = caplog.text
    assert f"only {len(uids)} of its {2 * len(uids)} uids" in said
    assert "coverage 50.0 %" in said
    assert "read amplification" in said
    assert "clipgap export" in said  # the tiny world's images are a fraction of a page
    np.save(tmp_path / "strange.npy", schema.pack_uids(strangers))
    with pytest.raises(DataError, match=r"none of its .* uids is in .* \(coverage 0 %\)"):
        plan_of(pool, tmp_path, split=str(tmp_path / "strange.npy"))


def test_amplification_by_hand() -> None:
    one = train_plan.Chosen([], bytes_used=10_000, bytes_paged=12_288, bytes_beside=25_000)
    assert train_plan.amplification(one, remote=False) == {"ranges": 1.2288, "shards": 2.5, "export": False}
    assert train_plan.amplification(one, remote=True)["export"]  # one request per image, or 2.5 times the bytes


def test_the_index_takes_sizes_from_headers(pool: dict[str, str], tmp_path: Path) -> None:
    plan, _ = plan_of(pool, tmp_path)
    row = plan.parts[0].table().to_pylist()[0]
    data = Path(row["uri"]).read_bytes()[row["offset"] : row["offset"] + row["num_bytes"]]
    assert data[:2] == b"\xff\xd8"
    assert data[-2:] == b"\xff\xd9"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.tiff", b"x"), ("a.txt", b"cat")], r"has no readable image; suffixes in its first shards: .*tiff"),
        ([("a.jpg", made.jpeg(0)), ("a.caption", b"cat")], r"none of the 1 samples of .* has a caption; .*caption 1"),
    ],
    ids=["images", "captions"],
)
def test_mistaken_suffixes_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    source = str(tmp_path / "pool")
    made.tar_shard(tmp_path / "pool" / "00000.tar", members)
    with pytest.raises(DataError, match=message):
        plan_of({"source": source, "samples": index_here(source, str(tmp_path / "index"))}, tmp_path)


def test_sources_are_weighed_when_samples_are_drawn_with_replacement(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 2)):
        members = [m for i in range(count) for m in ((f"{i}.jpg", made.jpeg(i)), (f"{i}.txt", name.encode()))]
        for part in range(2):
            made.tar_shard(tmp_path / name / f"{part}.tar", members)
    source = f"{tmp_path}/a::{tmp_path}/b"
    words = {"source": source, "samples": index_here(source, str(tmp_path / "index"))}
    plain, _ = plan_of(words, tmp_path)
    assert isinstance(plain.order, SampleOrder)
    plan, _ = plan_of(words, tmp_path, dataset_resampled=True, train_data_upsampling_factors="1::3", window=1000)
    assert isinstance(plan.order, ResampledOrder)
    assert plan.order.weights.tolist() == [1, 1, 3, 3]
    _, parts, _ = plan.order.take(0, 20_000)
    assert abs(np.mean(parts >= 2) - 0.5) < 0.05  # 12 samples of weight 1, 4 of weight 3


def test_tables_stay_open_as_long_as_rows_allow(pool: dict[str, str], tmp_path: Path) -> None:
    plan, _ = plan_of(pool, tmp_path)
    tables = Tables(plan.parts, plan.parts[0].count + plan.parts[1].count)
    for part in (0, 1, 0, 2):
        assert tables[part].num_rows == plan.parts[part].count
    assert list(tables._open) == [0, 2]  # the one used longest ago went
    assert Tables(plan.parts, 0)[3].num_rows == plan.parts[3].count


def test_a_large_pool_s_parts_come_in_their_order(pool: dict[str, str], tmp_path: Path) -> None:
    """The Ray tasks of a pool with many parts return what the loop returns."""
    uris = [store.join(pool["samples"], "samples", f"part-{part:05d}.parquet") for part in range(3)]
    number, found = train_plan._filter_group(7, uris, None, True)
    assert number == 7
    assert [part.uri for part, _ in found] == uris
    assert [counts["kept"] for _, counts in found] == [part.count for part in plan_of(pool, tmp_path)[0].parts[:3]]


def test_batches_made_ahead_are_the_same_and_their_errors_arrive() -> None:
    assert [item for item, _ in prefetched(iter(range(20)))] == list(range(20))

    def broken() -> Any:
        yield 1
        raise DataError("lost")

    with pytest.raises(DataError, match="lost"):
        list(prefetched(broken()))
