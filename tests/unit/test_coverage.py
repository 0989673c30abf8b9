"""Coverage equals the definitions: m, margin, percentile and every split's verdict, over HTTP without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from clipgap_ray import rundir, schema, store
from clipgap_ray.client import Client
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ClipgapError, ConfigError, IndexMismatchError
from clipgap_ray.index import IndexShard, LocalIndex, shard_uri
from clipgap_ray.kernels import faiss_index
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.serving.timings import Timings
from tests import twins
from tests.index_fixture import DIM, FINGERPRINT, uid, unit_rows, write_embeddings

ENCODER = EncoderSettings("projection").build()
POOL, TESTS = unit_rows(40, 0), {"a": unit_rows(9, 1), "b": unit_rows(7, 2)}
TAU = {name: np.linspace(0.05, 0.4, len(rows)) for name, rows in TESTS.items()}


def _write_scores(folder: Path, pool: str) -> str:
    """The query side of a score run, as far as the service reads it; `b` has no thresholds."""
    digest = store.read_json(f"{pool}/manifest.json")["digest"]
    described = {}
    for name, rows in TESTS.items():
        uri = write_embeddings(folder / name, [rows])
        described[name] = {"uri": uri}
        similarity = twins.similarities(rows, POOL).max(axis=1)
        table = {
            "uid": [uid(0, i) for i in range(len(rows))],
            "tau": TAU[name] if name == "a" else np.full(len(rows), np.nan),
            "similarity": similarity,
        }
        store.write_table(f"{folder}/scores/queries/{name}.parquet", pa.table(table))
    with rundir.RunDirectory(f"{folder}/scores", "score", {}) as directory:
        directory.finish({"encoder": FINGERPRINT, "pool": {"uri": pool, "digest": digest}, "tests": described})
    return f"{folder}/scores"


def _write_split(folder: Path, digest: str, kind: str, **more: Any) -> str:
    """Keeps the even rows of the pool."""
    uids = schema.pack_uids([uid(0, i) for i in range(0, 40, 2)])
    recipe = {"name": kind, "kind": kind, "tests": ["a"], "counts": {"pool": 40, "kept": 20},
              "inputs": {"pool": {"digest": digest}}, **more}  # fmt: skip
    store.write_bytes(f"{folder}/{kind}.npy", store.array_bytes(np.sort(uids)))
    store.write_json(f"{folder}/{kind}.recipe.json", recipe)
    return f"{folder}/{kind}.npy"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, tuple[str, ...]]:
    """(pool, scores, splits)."""
    folder = tmp_path_factory.mktemp("coverage")
    pool = write_embeddings(folder / "pool", [POOL])
    digest = store.read_json(f"{pool}/manifest.json")["digest"]
    splits = (
        _write_split(folder, digest, "gap-match", slack=0.01),
        _write_split(folder, digest, "near", cut_similarity=0.2),
        _write_split(folder, digest, "far", cut_similarity=0.2),
        _write_split(folder, digest, "threshold", max_similarity=0.25),
        _write_split(folder, digest, "random", tests=[]),
        _write_split(folder, digest, "full", tests=[]),
    )
    return pool, _write_scores(folder, pool), splits


@pytest.fixture(scope="module")
def client(places: tuple[str, str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    pool, scores, splits = places
    uri = str(tmp_path_factory.mktemp("index"))
    with rundir.RunDirectory(uri, "index", {}) as directory:
        shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0), 0)
        shard.add(POOL, schema.row_ids(0, len(POOL)), 0)
        shard.save(shard_uri(uri, 0))
        directory.finish(
            {"num_shards": 1, "dim": DIM, "nprobe": 0, "key": "Flat", "recall_at_10": 1.0, "modality": "image",
             "encoder": FINGERPRINT, "index_version": "v1", "shards": [{"number": 0, "rows": 40}],
             "embeddings": {"uri": pool}}
        )  # fmt: skip
    coverage = Coverage(scores, splits)
    return TestClient(make_api(LocalBackend(LocalIndex.open(uri), ENCODER, Metadata(pool), coverage=coverage)))


def test_coverage_of_a_vector_equals_its_definition(client: TestClient) -> None:
    for seed in range(5):
        row = unit_rows(1, 100 + seed)
        (result,) = client.post("/v1/similarity", json={"vector": row[0].astype(float).tolist(), "k": 3}).json()[
            "results"
        ]
        to_pool = twins.similarities(row, POOL)[0]
        assert result["similarity"] == pytest.approx(to_pool.max(), abs=1e-5)
        assert [near["row_id"] for near in result["neighbours"]] == np.argsort(-to_pool)[:3].tolist()
        for found in result["tests"]:
            name = found["test"]
            own = twins.similarities(row, TESTS[name])[0]
            assert found["similarity"] == own.max()  # exact
            assert found["margin"] == ((own - TAU["a"]).max() if name == "a" else None)
            nearest = twins.similarities(TESTS[name], POOL).max(axis=1)
            assert found["percentile"] == pytest.approx(100 * (nearest < to_pool.max()).mean())
            assert [near["uid"] for near in found["neighbours"]] == [uid(0, i) for i in np.argsort(-own)[:3].tolist()]


def test_splits_judge_a_stranger_by_their_rules(client: TestClient) -> None:
    seen = set()
    for seed in range(30):
        row = unit_rows(1, 200 + seed)
        (result,) = client.post("/v1/similarity", json={"vector": row[0].astype(float).tolist()}).json()["results"]
        own = twins.similarities(row, TESTS["a"])[0]
        verdicts = {verdict["name"]: verdict["drops"] for verdict in result["splits"]}
        assert verdicts == {
            "gap-match": bool((own - TAU["a"]).max() > 0.01),
            "near": bool(own.max() > 0.2),
            "far": bool(own.max() < 0.2),
            "threshold": bool(own.max() >= 0.25),
            "random": None,
            "full": False,
        }
        seen.add(tuple(verdicts.values()))
    assert len(seen) > 2


def test_splits_judge_a_uid_of_the_pool_by_their_lists(client: TestClient) -> None:
    for row, drops in ((4, False), (5, True)):
        (result,) = client.post("/v1/similarity", json={"uid": uid(0, row)}).json()["results"]
        assert {(verdict["drops"], verdict["decided_by"]) for verdict in result["splits"]} == {(drops, "list")}
        others = np.delete(twins.similarities(POOL[row : row + 1], POOL)[0], row)
        assert result["similarity"] == pytest.approx(others.max(), abs=1e-6)  # itself does not count


def test_the_client_and_the_list_of_splits(client: TestClient) -> None:
    def forward(request: httpx.Request) -> httpx.Response:
        answer = client.request(request.method, request.url.path, content=request.content)
        return httpx.Response(answer.status_code, content=answer.content)

    typed = Client("http://testserver", transport=httpx.MockTransport(forward))
    covered = typed.similarity(queries=[{"uid": uid(0, 1)}, {"text": "a red bird"}], k=2)
    assert [len(one.neighbours) for one in covered] == [2, 2]
    assert covered[0].splits[0]["drops"] is True
    names = [split["name"] for split in client.get("/v1/splits").json()["splits"]]
    assert names == ["gap-match", "near", "far", "threshold", "random", "full"]


def test_without_scores_the_route_says_what_to_do(places: tuple[str, str, tuple[str, ...]], client: TestClient) -> None:
    backend = LocalBackend.__new__(LocalBackend)
    backend.coverage, backend.timings = None, Timings()
    bare = TestClient(make_api(backend))
    answer = bare.post("/v1/similarity", json={"text": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "code": "no_scores", "message": "this service knows no scores", "hint": "start it with --scores SCORES",
    }  # fmt: skip
    assert bare.get("/v1/splits").json() == {"splits": []}


def test_impossible_scores_and_splits_are_refused(places: tuple[str, str, tuple[str, ...]], tmp_path: Path) -> None:
    pool, scores, splits = places
    with pytest.raises(ConfigError, match="cut from another pool"):
        Coverage(scores, (_write_split(tmp_path, "other", "near"),))
    with pytest.raises(IndexMismatchError, match="weights_sha256"):
        Coverage(scores).check({**FINGERPRINT, "weights_sha256": "other"})
    with pytest.raises(ClipgapError, match="expected that of `clipgap score`"):
        Coverage(pool)
    with pytest.raises(ConfigError, match="needs --scores"):
        ServeSettings.load({"index": ["a=b"], "splits": list(splits)}, "serve")


def test_neighbours_name_their_splits_and_a_filter_keeps_to_one(client: TestClient) -> None:
    query = {"vector": unit_rows(1, 7)[0].astype(float).tolist(), "k": 40}
    everything = client.post("/v1/search", json=query).json()["results"][0]
    kept = [row for row in everything if "near" in row["splits"]]
    assert [row["row_id"] % 2 for row in kept] == [0] * 20
    assert {tuple(row["splits"]) for row in everything if row["row_id"] % 2} == {()}
    filtered = client.post("/v1/search", json={**query, "k": 20, "filter": [{"split": "near"}]}).json()["results"][0]
    assert filtered == kept


def test_the_histograms_hold_every_test_image(client: TestClient) -> None:
    for info in client.get("/v1/tests").json()["tests"]:
        assert sum(info["train"]) == info["rows"] == len(TESTS[info["name"]])
        assert len(info["edges"]) == len(info["train"]) + 1
        assert (info["reference"] is not None) == (info["name"] == "a")
