"""The service at its edges: columns that a pool brought, values that fit no column, queues, deadlines, origins."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clipgap_ray import store
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.index import Answer
from clipgap_ray.serving import results
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.backend import MOST_ROWS
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import Limits, Neighbour
from tests.index_fixture import DIM, uid, unit_rows, write_embeddings
from tests.service_fixture import serve_locally

ROWS = 30
PHASH = 2**61 + 1  # no float64 holds it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pool whose owner added `punsafe` (the row's number / 100) and `topic`; the first row has a phash."""
    uri = write_embeddings(tmp_path_factory.mktemp("pool") / "emb", [unit_rows(ROWS, 0)])
    (path,) = Path(uri, "metadata").iterdir()
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index("phash"), "phash", pa.array([PHASH] + [None] * (ROWS - 1)))
    table = table.append_column("punsafe", pa.array(np.arange(ROWS) / 100))
    table = table.append_column("topic", pa.array(["birds", "boats"] * (ROWS // 2), pa.large_string()))
    pq.write_table(table.append_column("box", pa.array([[0, 1]] * ROWS)), path)
    return uri


@pytest.fixture(scope="module")
def backend(source: str, tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    return serve_locally(source, tmp_path_factory.mktemp("service") / "index")


@pytest.fixture
def client(backend: LocalBackend) -> Iterator[TestClient]:
    with TestClient(make_api(backend)) as client:
        yield client


def _found(client: TestClient, *conditions: dict[str, Any]) -> list[int]:
    response = client.post("/v1/search", json={"uid": uid(0, 0), "k": ROWS, "filter": conditions})
    assert response.status_code == 200, response.text
    return sorted(row["row_id"] for row in response.json()["results"][0])


def test_filters_know_the_columns_of_the_pool(client: TestClient) -> None:
    assert _found(client, {"column": "punsafe", "at_least": 0.275}) == [28, 29]
    assert _found(client, {"column": "punsafe", "equals": 0.03}) == [3]
    assert _found(client, {"column": "topic", "equals": "boats"}, {"column": "punsafe", "at_most": 0.04}) == [1, 3]


@pytest.mark.parametrize("column", ["nothing", "box"])
def test_a_column_that_no_filter_can_use(client: TestClient, column: str) -> None:
    response = client.post("/v1/search", json={"text": "x", "filter": [{"column": column, "equals": 1}]})
    assert response.status_code == 400
    assert "punsafe" in response.json()["error"]["hint"]
    assert "box" not in response.json()["error"]["hint"]


def test_whole_numbers_are_compared_as_such(client: TestClient) -> None:
    assert _found(client, {"column": "phash", "equals": PHASH}) == [0]
    assert _found(client, {"column": "phash", "any_of": [PHASH - 1, PHASH + 1, 0.5, 1e300, 2**63, -(2**64)]}) == []


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"column": "caption", "equals": "\\ud800"}]', "[", "{}"])
def test_a_filter_in_a_form_that_cannot_be_read_is_a_bad_request(client: TestClient, text: str) -> None:
    assert client.post("/v1/search", json={"text": "x", "filter": text}).status_code == 400


def test_rules_know_the_columns_of_the_pool_and_hidden_samples_are_no_queries(source: str, tmp_path: Path) -> None:
    hidden = read_hidden("", ("punsafe>0.1",), EmbeddingSet.open(source).metadata_columns())
    backend = serve_locally(source, tmp_path / "index", hidden)
    with TestClient(make_api(backend)) as client:
        assert _found(client) == list(range(11))
        response = client.post("/v1/search", json={"uid": uid(0, 20)})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_uid")
    with pytest.raises(ConfigError, match="no column 'punsafe'"):
        read_hidden("", ("punsafe>0.1",))


@pytest.mark.parametrize("most", [3, 1000])
def test_collapsing_in_blocks_is_the_simple_greedy_rule(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((9, DIM))
    rows = (centres[generator.integers(0, 9, 60)] + 0.1 * generator.standard_normal((60, DIM))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    metadata = backend.searchers["pool"].metadata
    monkeypatch.setattr(metadata, "vectors", lambda row_ids: rows[row_ids])
    monkeypatch.setattr(results, "BLOCK", 7)
    near = [Neighbour(row_id=i, row_id_str=str(i), similarity=1.0) for i in range(60)]
    kept: list[int] = []
    for at in range(60):
        if all(rows[at] @ rows[other] < 0.9 for other in kept):
            kept.append(at)
    assert [one.row_id for one in results._collapsed(metadata, near, 0.9, most)] == kept[:most]


def test_looking_further_ends(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of one image a million times, collapsed: a bounded number of rows is held, and one is shown."""
    asked: list[int] = []

    async def alike(queries: np.ndarray, k: int, within: Any = ()) -> Answer:
        asked.append(k)
        return Answer(np.ones((1, k), np.float32), np.zeros((1, k), np.int64), 1, 1)

    monkeypatch.setattr(backend.searchers["pool"], "answer", alike)
    with TestClient(make_api(backend)) as client:
        (near,) = client.post("/v1/search", json={"text": "x", "k": 1000, "collapse": 0}).json()["results"]
    assert len(near) == 1
    assert asked == [1000, 4000, 16_000, MOST_ROWS]


def test_a_full_queue_is_refused_with_the_time_to_come_again(backend: LocalBackend) -> None:
    api = make_api(backend, Limits(requests=0))
    with TestClient(api) as client:
        response = client.post("/v1/search", json={"text": "x"})
        assert client.get("/healthz").status_code == 200
    assert (response.status_code, response.json()["error"]["code"]) == (503, "busy")
    assert response.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_given_up(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def slow(queries: np.ndarray, k: int, within: Any = ()) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        raise AssertionError

    monkeypatch.setattr(backend.searchers["pool"], "answer", slow)
    with TestClient(make_api(backend, Limits(requests=1, request_s=3.0))) as client:
        response = client.post("/v1/search", json={"text": "x"})
        monkeypatch.undo()
        assert client.post("/v1/search", json={"text": "x"}).status_code == 200
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert ended == ["cancelled"]


def test_pages_of_named_origins_may_ask(backend: LocalBackend) -> None:
    asked = {"origin": "https://front.example", "access-control-request-method": "POST"}
    headers = {**asked, "access-control-request-headers": "authorization,content-type"}
    with TestClient(make_api(backend, token_hash=token_sha256("t"), origins=("https://front.example",))) as client:
        preflight = client.options("/knn-service", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://front.example"
        refused = client.post("/v1/search", json={"text": "x"}, headers={"origin": "https://front.example"})
        assert refused.status_code == 401  # the page can read why
        assert refused.headers["access-control-allow-origin"] == "https://front.example"
        other = client.options("/knn-service", headers={**headers, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    with TestClient(make_api(backend)) as client:
        assert "access-control-allow-origin" not in client.get("/healthz", headers=asked).headers


@pytest.mark.parametrize("origin", ["front.example", "https://front.example/page", "https://*.example"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="is no origin"):
        ServeSettings.load({"index": ["pool=x"], "origins": [origin]}, "serve")


def test_the_list_of_clip_retrieval_says_in_a_header_that_rows_may_be_missing(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = backend.searchers["pool"]
    whole = searcher.answer

    async def half(queries: np.ndarray, k: int, within: Any = ()) -> Answer:
        answer = await whole(queries, k)
        return Answer(answer.similarities, answer.row_ids, 1, 2)

    body = {"text": "x", "modality": "image", "num_images": 2, "indice_name": "pool"}
    with TestClient(make_api(backend)) as client:
        assert "x-clipgap-degraded" not in client.post("/knn-service", json=body).headers
        monkeypatch.setattr(searcher, "answer", half)
        assert client.post("/knn-service", json=body).headers["x-clipgap-degraded"] == "true"
        assert "clipgap_degraded_answers_total 1.0" in client.get("/metrics").text


def test_a_service_without_its_encoder_is_not_ready(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> bool:
        return False

    monkeypatch.setattr(backend.encoder, "answers", gone)
    with TestClient(make_api(backend)) as client:
        response = client.get("/readyz")
    assert response.status_code == 503
    assert (response.json()["shards_ok"], response.json()["encoder_ok"]) == (1, False)


def test_a_file_that_is_written_anew_has_another_version(tmp_path: Path) -> None:
    path = tmp_path / "blocklist.txt"
    path.write_text("a")
    before = store.version_of(str(path))
    assert store.version_of(str(path)) == before
    path.write_text(json.dumps({"b": 1}))
    assert store.version_of(str(path)) != before
    with pytest.raises(DataError, match="cannot be read"):
        store.version_of(str(tmp_path / "none"))


def test_several_indexes_are_told_apart_by_name_and_modality(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = serve_locally(write_embeddings(tmp_path / "emb", [unit_rows(8, 5)]), tmp_path / "index")
    second = other.searchers["pool"]
    second.info = second.info.model_copy(update={"name": "captions", "modality": "text"})
    monkeypatch.setitem(backend.searchers, "captions", second)
    with TestClient(make_api(backend)) as client:
        assert [info["name"] for info in client.get("/v1/indices").json()["indices"]] == ["pool", "captions"]

        def asked(**words: Any) -> tuple[str, int]:
            answer = client.post("/v1/search", json={"text": "x", "k": 100, **words}).json()
            return answer["index"], len(answer["results"][0])

        assert asked() == asked(index="pool") == asked(modality="image") == ("pool", ROWS)
        assert asked(index="captions") == asked(modality="text") == ("captions", 8)
        for words, status in (({"index": "none"}, 404), ({"index": "pool", "modality": "text"}, 400)):
            assert client.post("/v1/search", json={"text": "x", **words}).status_code == status
        assert client.get("/readyz").json()["shards"] == 2


def test_prompts_of_a_class_set_are_encoded_once(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    whole = backend.encoder.encode_texts

    async def counted(texts: list[str]) -> np.ndarray:
        encoded.append(len(texts))
        return await whole(texts)

    monkeypatch.setattr(backend.encoder, "encode_texts", counted)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    body = {"image": base64.b64encode(buffer.getvalue()).decode(), "classes": ["cat", "dog"]}
    with TestClient(make_api(backend)) as client:
        first, second = (client.post("/v1/zero-shot", json=body).json() for _ in range(2))
        assert first == second
        assert encoded == [2]
        client.post("/v1/zero-shot", json={**body, "templates": ["a {}", "the {}"]})
    assert encoded == [2, 4]
