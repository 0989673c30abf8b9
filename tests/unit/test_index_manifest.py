"""An index beside its shards: states that must not be mixed, an index that grows, rows that are not to be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import DataError
from clipgap_ray.index import IndexShard, LocalIndex, shard_uri
from clipgap_ray.index_manifest import close_growing, hide_rows, publish_growing, read_index, rows_of
from clipgap_ray.kernels import faiss_index
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.stages import index as stage
from tests.index_fixture import DIM, FINGERPRINT, uid, unit_rows, write_embeddings, write_part

PARTS = [unit_rows(20, 0), unit_rows(10, 1)]


def _manifest(uri: str, source: str, parts: list[np.ndarray]) -> dict[str, Any]:
    """Save a shard per part, and return what the stage would say of them."""
    shards = []
    for number, rows in enumerate(parts):
        shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0), number)
        shard.add(rows, schema.row_ids(number, len(rows)), number)
        saved = shard.save(shard_uri(uri, number))
        shards.append({"number": number, "rows": len(rows), "parts": 1, "files": saved["files"]})
    return {
        "num_shards": len(parts), "dim": DIM, "nprobe": 0, "key": "Flat", "modality": "image", "encoder": FINGERPRINT,
        "index_version": "v1", "shards": shards, "embeddings": {"uri": source},
    }  # fmt: skip


def _complete(folder: Path) -> str:
    source, uri = write_embeddings(folder / "emb", PARTS), str(folder / "index")
    with rundir.RunDirectory(uri, "index", {}) as directory:
        directory.finish(_manifest(uri, source, PARTS))
    return uri


def test_a_shard_that_went_on_is_not_opened_as_the_version_before(tmp_path: Path) -> None:
    uri = _complete(tmp_path)
    LocalIndex.open(uri)
    shard = IndexShard.load(shard_uri(uri, 1), mmap=False)
    shard.add(unit_rows(5, 2), schema.row_ids(2, 5), 2)
    shard.save(shard_uri(uri, 1))
    with pytest.raises(DataError, match=r"shard_00001 is not the shard that the index's manifest names"):
        LocalIndex.open(uri)


def test_an_index_that_grows_is_served_as_far_as_it_is_saved(tmp_path: Path) -> None:
    """While `embed` writes: there is no manifest of the embeddings, and none of the index."""
    source, uri = str(tmp_path / "emb"), str(tmp_path / "index")
    with rundir.RunDirectory(source, "embed", {}) as directory:
        store.write_json(directory.path("encoder.json"), FINGERPRINT)
        directory.log.append([write_part(source, 0, PARTS[0])])
        publish_growing(uri, _manifest(uri, source, PARTS[:1]))
        manifest = read_index(uri)
        metadata = Metadata(rows_of(manifest))
        backend = LocalBackend(LocalIndex.open(uri), EncoderSettings("projection").build(), metadata)
        with TestClient(make_api(backend)) as client:
            (near,) = client.post("/v1/search", json={"uid": uid(0, 3), "k": 1}).json()["results"]
        assert [one["row_id"] for one in near] == [3]
        directory.log.append([write_part(source, 1, PARTS[1])])
        publish_growing(uri, _manifest(uri, source, PARTS))  # a shard may be further than an old manifest says
        assert LocalIndex.open(uri).num_rows == rows_of(read_index(uri)).num_rows == 30
    with rundir.RunDirectory(uri, "index", {}) as directory:
        directory.finish({**_manifest(uri, source, PARTS), "index_version": "v2"})
    assert read_index(uri)["index_version"] == "v2"  # complete, also when the builder dies right here
    publish_growing(uri, _manifest(uri, source, PARTS))
    assert read_index(uri)["complete"] is False  # it grows again
    close_growing(uri)
    assert read_index(uri)["index_version"] == "v2"


def test_what_is_no_index_is_said(tmp_path: Path) -> None:
    uri = str(tmp_path)
    close_growing(uri)  # nothing to take back
    with pytest.raises(DataError, match="does not exist"):
        read_index(uri)


def test_tombstones_make_another_version_and_can_be_lifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, listed = _complete(tmp_path), tmp_path / "blocklist.txt"
    listed.write_text(f"{uid(0, 3)}\n{uid(1, 9)}\n")
    assert stage.run(IndexSettings(out=uri, blocklist=str(listed))) == {"hidden": 2}
    index = LocalIndex.open(uri)
    found = index.search(np.concatenate(PARTS), 30)[1]
    assert not {3, (1 << 32) + 9} & set(found.ravel().tolist())
    assert index.manifest["index_version"] != "v1"
    listed.write_text("")
    assert hide_rows(uri, str(listed)) == 0
    assert LocalIndex.open(uri).manifest["index_version"] == "v1"
    assert (LocalIndex.open(uri).search(PARTS[0][3:4], 1)[1] == 3).all()


@pytest.mark.parametrize(("cpus", "shards", "each"), [(4, 2, 0.25), (4, 16, 0.125), (1, 3, 0.1666), (0, 2, 0.25)])
def test_builders_leave_half_of_the_cpus(monkeypatch: pytest.MonkeyPatch, cpus: int, shards: int, each: float) -> None:
    monkeypatch.setattr(stage.ray, "cluster_resources", lambda: {"CPU": cpus} if cpus else {})
    assert stage._builder_cpus(shards) == each
