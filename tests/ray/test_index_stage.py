from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.limits import LimitsSettings
from clipgap_ray.errors import ConfigError, DataError, ShardLostError, StaleOutputError, StoppedError
from clipgap_ray.index import LocalIndex
from clipgap_ray.index_manifest import read_index
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.stages import index as stage
from clipgap_ray.stages import limits
from clipgap_ray.uidmap import UidMap
from tests.index_fixture import FINGERPRINT, all_rows, uid, unit_rows, write_embeddings, write_part

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def _agrees(uri: str, parts: list[np.ndarray]) -> None:
    rows, row_ids = all_rows(parts)
    queries = unit_rows(6, seed=99)
    expected = exact_topk(queries, rows, row_ids, 7)
    found = LocalIndex.open(uri).search(queries, 7)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_builds_then_does_nothing_then_appends(tmp_path: Path) -> None:
    parts = [unit_rows(n, seed) for seed, n in enumerate((40, 0, 25))]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    summary = stage.run(IndexSettings(embeddings=source, out=out, recall_queries=20))
    assert (summary.read, summary.kept, summary.parts, summary.parts_skipped) == (65, 65, 3, 0)
    manifest = rundir.read_manifest(out, "index")
    assert manifest["recall_at_10"] == 1.0
    assert manifest["encoder"] == FINGERPRINT
    assert [shard["rows"] for shard in manifest["shards"]] == [65, 0]
    assert manifest["uid_map"]["rows"] == 65
    _agrees(out, parts)

    before = Path(out, "shard_00000", "index.faiss").stat().st_mtime_ns
    assert stage.run(IndexSettings(embeddings=source, out=out, recall_queries=20)).parts_skipped == 3
    assert Path(out, "shard_00000", "index.faiss").stat().st_mtime_ns == before

    parts.append(unit_rows(10, seed=7))
    log = rundir.CommitLog(source)
    log.append([write_part(source, 3, parts[3])])
    assert stage.run(IndexSettings(embeddings=source, out=out, recall_queries=20)).kept == 75
    appended = rundir.read_manifest(out, "index")
    assert appended["index_version"] != manifest["index_version"]
    _agrees(out, parts)
    for known, one, row_id in ((manifest, uid(2, 3), 2 << 32 | 3), (appended, uid(3, 9), 3 << 32 | 9)):
        found = UidMap.of_index(out, known)
        assert found is not None
        assert found.row_id(one) == row_id

    log.append([write_part(source, 0, unit_rows(40, seed=55))])
    with pytest.raises(StaleOutputError, match=r"img_emb_00000\.npy has changed"):
        stage.run(IndexSettings(embeddings=source, out=out))


def test_a_lost_shard_is_built_again_from_its_parts(tmp_path: Path) -> None:
    parts = [unit_rows(30, seed) for seed in range(4)]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    stage.run(IndexSettings(embeddings=source, out=out, recall_queries=5))
    shutil.rmtree(Path(out, "shard_00001"))
    assert stage.run(IndexSettings(embeddings=source, out=out, recall_queries=5)).kept == 120
    _agrees(out, parts)


def test_a_limit_stops_between_two_batches_and_the_same_command_continues(tmp_path: Path) -> None:
    parts = [unit_rows(30, seed) for seed in range(4)]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    settings = IndexSettings(embeddings=source, out=out, recall_queries=5, limits=LimitsSettings(max_hours=1e-9))
    limits.start(settings.limits)
    try:
        with pytest.raises(StoppedError, match="--max-hours"):
            stage.run(settings)
    finally:
        limits.start(LimitsSettings())
    assert not Path(out, "manifest.json").exists()
    assert stage.run(settings.model_copy(update={"limits": LimitsSettings()})).kept == 120
    _agrees(out, parts)


def test_tombstones_outlive_a_build_and_name_its_version(tmp_path: Path) -> None:
    parts = [unit_rows(20, seed) for seed in range(2)]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    listed = tmp_path / "blocklist.txt"
    listed.write_text(f"{uid(1, 3)}\n")
    settings = IndexSettings(embeddings=source, out=out, recall_queries=5)
    built = stage.run(settings.model_copy(update={"blocklist": str(listed)}))
    assert isinstance(built, rundir.Summary)
    assert built.extra["hidden"] == 1
    hiding = read_index(out)["index_version"]
    stage.run(settings)  # does nothing, and forgets nothing
    assert read_index(out)["index_version"] == hiding != read_index(out)["built_version"]
    assert (1 << 32) + 3 not in LocalIndex.open(out).search(parts[1], 40)[1]


def test_a_limit_stops_the_wait_for_a_source_that_stands_still(tmp_path: Path) -> None:
    source = str(tmp_path / "emb")
    settings = IndexSettings(follow=source, out=str(tmp_path / "index"), poll_s=0.05)
    with rundir.RunDirectory(source, "embed", {}) as directory:
        store.write_json(directory.path("encoder.json"), FINGERPRINT)  # and then nothing
        limits.start(LimitsSettings(max_hours=1e-6))
        try:
            with pytest.raises(StoppedError, match="--max-hours"):
                stage.run(settings)
        finally:
            limits.start(LimitsSettings())


def test_a_builder_that_dies_gets_its_parts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [unit_rows(30, seed) for seed in range(6)]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    marker = tmp_path / "died"

    class Mortal(stage.ShardActor):
        def add(self, source: Any, parts: list[int]) -> dict[int, int]:
            held = super().add(source, parts)
            if 2 in held and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return held

    monkeypatch.setattr(stage, "ShardActor", Mortal)
    monkeypatch.setattr(stage, "BATCH_BYTES", 1)  # a call per part
    summary = stage.run(IndexSettings(embeddings=source, out=out, recall_queries=5))
    assert marker.exists()
    assert summary.kept == 180
    _agrees(out, parts)


def test_recall_is_measured_and_a_floor_fails_the_build(tmp_path: Path) -> None:
    parts = [unit_rows(400, seed) for seed in range(4)]
    source = write_embeddings(tmp_path / "emb", parts)
    reached = str(tmp_path / "ivf")
    stage.run(IndexSettings(embeddings=source, out=reached, key="IVF16,Flat", min_recall=0.9, recall_queries=50))
    manifest = rundir.read_manifest(reached, "index")
    # Random rows have no cells: low nprobe misses neighbours, all cells find everything.
    assert manifest["recall_at_10"] >= 0.9
    assert 1 < manifest["nprobe"] <= 16
    assert LocalIndex.open(reached).shards[0].nprobe == manifest["nprobe"]

    short = str(tmp_path / "pq")
    with pytest.raises(ConfigError, match=r"recall@10 of key PQ2x4 is 0\.\d+ .* below --min-recall 0.9"):
        stage.run(IndexSettings(embeddings=source, out=short, key="PQ2x4", min_recall=0.9, recall_queries=50))
    with pytest.raises(DataError, match="is not complete"):
        LocalIndex.open(short)


def test_text_rows_without_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    source, out = write_embeddings(tmp_path / "emb", [unit_rows(20, 0)]), str(tmp_path / "index")
    summary = stage.run(IndexSettings(embeddings=source, out=out, modality="text", recall_queries=5))
    assert (summary.read, summary.kept, summary.dropped) == (20, 16, {"no_caption": 4})


def test_follow_adds_parts_as_they_are_committed_until_the_manifest_is_there(tmp_path: Path) -> None:
    parts = [unit_rows(20, seed) for seed in range(3)]
    source, out = str(tmp_path / "emb"), str(tmp_path / "index")
    settings = IndexSettings(follow=source, out=out, poll_s=0.05, recall_queries=5)
    with pytest.raises(DataError, match="no `clipgap embed` has begun"):
        stage.run(settings)
    with rundir.RunDirectory(source, "embed", {}) as directory:
        store.write_json(directory.path("encoder.json"), FINGERPRINT)
        directory.log.append([write_part(source, 2, parts[2])])  # out of order, as actors finish
        result: list[rundir.Summary] = []
        follower = threading.Thread(target=lambda: result.append(stage.run(settings)))
        follower.start()
        _until(lambda: store.exists(f"{out}/key.json"))  # it works on what there is
        _until(lambda: store.exists(f"{out}/growing.json"))
        growing = LocalIndex.open(out)  # it answers before the job ends
        assert growing.search(parts[2][:3], 1)[1].ravel().tolist() == schema.row_ids(2, 3).tolist()
        with pytest.raises(DataError, match="is not complete"):
            rundir.read_manifest(out, "index")
        for number in (0, 1):
            directory.log.append([write_part(source, number, parts[number])])
        assert follower.is_alive()
        directory.finish({"encoder": FINGERPRINT, "shards": {"0": "a", "1": "b", "2": "c"}})
    follower.join(60)
    assert result[0].kept == 60
    assert not store.exists(f"{out}/growing.json")
    _agrees(out, parts)
    # The same index, whether it was built during or after.
    assert stage.run(IndexSettings(embeddings=source, out=out, recall_queries=5)).parts_skipped == 3


@pytest.mark.slow
def test_a_dead_actor_is_a_lost_shard_then_whole_again(tmp_path: Path) -> None:
    parts = [unit_rows(20, seed) for seed in range(2)]
    source, out = write_embeddings(tmp_path / "emb", parts), str(tmp_path / "index")
    stage.run(IndexSettings(embeddings=source, out=out, recall_queries=5))
    import ray

    index = stage.ShardedIndex.open(out)
    queries = parts[1][:2]
    whole = index.search(queries, 3)
    assert whole[1][0, 0] == 1 << 32
    ray.kill(index.actors[1], no_restart=True)
    degraded = index.answer(queries, 3)
    assert (degraded.shards_ok, degraded.shards, degraded.degraded) == (1, 2, True)
    assert (degraded.row_ids < 20).all()
    with pytest.raises(ShardLostError, match="1 of 2 index shards"):
        index.search(queries, 3)

    pid = ray.get(index.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)  # it restarts and reloads by itself
    _until(lambda: not Path(f"/proc/{pid}").exists())
    _until(lambda: index.answer(queries, 3).shards_ok == 1)
    assert np.array_equal(index.answer(queries, 3).row_ids, degraded.row_ids)
    ray.kill(index.actors[0])
    nothing = index.answer(queries, 3)
    assert nothing.shards_ok == 0
    assert (nothing.row_ids == -1).all()


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "IVFF4,Flat"}, "is not a FAISS factory string"),
        ({"key": "IVF4096,Flat"}, "cannot be trained on 20 rows"),
    ],
)
def test_impossible_keys_are_refused(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    source = write_embeddings(tmp_path / "emb", [unit_rows(20, 0)])
    with pytest.raises(ConfigError, match=message):
        stage.run(IndexSettings(embeddings=source, out=str(tmp_path / "index"), **settings))


def test_row_ids_are_those_of_the_schema(tmp_path: Path) -> None:
    source, out = write_embeddings(tmp_path / "emb", [unit_rows(3, 0), unit_rows(4, 1)]), str(tmp_path / "index")
    stage.run(IndexSettings(embeddings=source, out=out, shards=1, recall_queries=2))
    assert LocalIndex.open(out).shards[0].row_ids.tolist() == [*schema.row_ids(0, 3), *schema.row_ids(1, 4)]
