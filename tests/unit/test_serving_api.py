from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clipgap_ray import rundir, schema
from clipgap_ray.embeddings import METADATA_GROUP_ROWS
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import IndexMismatchError
from clipgap_ray.index import Answer, IndexShard, LocalIndex, shard_uri
from clipgap_ray.kernels import faiss_index
from clipgap_ray.serving import guard
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import Limits
from clipgap_ray.serving.metadata import Metadata
from tests.index_fixture import DIM, FINGERPRINT, uid, unit_rows, write_embeddings

LIMITS = Limits(k=50, batch=4, body_bytes=200_000, image_pixels=10_000, text_chars=100, classes=10, prompts=20)
ENCODER = EncoderSettings("projection").build()


def _png(width: int = 8, height: int = 8, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    """Two parts; part 1 holds the rows of known texts and images, so that answers are known."""
    folder = tmp_path_factory.mktemp("service")
    planted = np.concatenate([
        ENCODER.encode_texts(["a red bird", "a blue fish"]),
        ENCODER.encode_images(np.stack([ENCODER.preprocess.decode(_pattern(seed)) for seed in range(2)])),
    ]).astype(np.float16)  # fmt: skip
    parts = [unit_rows(30, 0), planted]
    source = write_embeddings(folder / "emb", parts)
    return _backend(folder / "index", source, parts)


def _backend(folder: Path, source: str, parts: list[np.ndarray]) -> LocalBackend:
    uri = str(folder)
    with rundir.RunDirectory(uri, "index", {}) as directory:
        for number in range(2):
            shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0), number)
            shard.add(parts[number], schema.row_ids(number, len(parts[number])), number)
            shard.save(shard_uri(uri, number))
        shards = [{"number": n, "rows": len(parts[n])} for n in range(2)]
        directory.finish(
            {"num_shards": 2, "dim": DIM, "nprobe": 0, "key": "Flat", "recall_at_10": 1.0, "modality": "image",
             "encoder": FINGERPRINT, "index_version": "v1", "shards": shards, "embeddings": {"uri": source}}
        )  # fmt: skip
    return LocalBackend(LocalIndex.open(uri), ENCODER, Metadata(source), name="pool")


def _pattern(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def client(backend: LocalBackend) -> Iterator[TestClient]:
    # raise_server_exceptions: an unexpected error fails the test instead of becoming a 500
    with TestClient(make_api(backend, LIMITS)) as client:
        yield client


def _top(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    top: dict[str, Any] = response.json()["results"][0][0]
    return top


def test_every_kind_of_query_finds_its_own_row(client: TestClient) -> None:
    assert _top(client, text="a blue fish")["row_id"] == (1 << 32) + 1
    assert _top(client, image=_b64(_pattern(1)))["row_id"] == (1 << 32) + 3
    assert _top(client, image="data:image/png;base64," + _b64(_pattern(0)))["row_id"] == (1 << 32) + 2
    assert _top(client, uid=uid(0, 7).upper())["row_id"] == 7
    assert _top(client, vector=(1e30 * unit_rows(30, 0)[4].astype(float)).tolist())["row_id"] == 4


def test_the_answer_carries_completeness_and_metadata(client: TestClient) -> None:
    body = client.post("/v1/search", json={"text": "a red bird", "k": 2}).json()
    assert {name: body[name] for name in ("index", "version", "shards", "shards_ok", "degraded")} == {
        "index": "pool", "version": "v1", "shards": 2, "shards_ok": 2, "degraded": False,
    }  # fmt: skip
    first, second = body["results"][0]
    assert first["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert first["similarity"] >= second["similarity"]
    assert first["row_id_str"] == str(1 << 32)
    assert first["uid"] == uid(1, 0)
    assert (first["caption"], first["image_path"]) == ("caption 1 0", "000010000")


def test_a_batch_is_answered_in_order(client: TestClient) -> None:
    queries = [{"uid": uid(0, 3)}, {"text": "a red bird"}, {"image": _b64(_pattern(1))}, {"uid": uid(0, 1)}]
    results = client.post("/v1/search", json={"queries": queries, "k": 1}).json()["results"]
    assert [rows[0]["row_id"] for rows in results] == [3, 1 << 32, (1 << 32) + 3, 1]


def test_k_beyond_the_rows_returns_the_rows(client: TestClient) -> None:
    assert len(client.post("/v1/search", json={"text": "x", "k": 50}).json()["results"][0]) == 34


def test_an_image_can_be_uploaded_and_json_needs_no_content_type(client: TestClient) -> None:
    response = client.post("/v1/search", files={"file": _pattern(1)}, data={"k": "1"})
    assert response.json()["results"][0][0]["row_id"] == (1 << 32) + 3
    response = client.post("/v1/search", content=b'{"text": "a red bird"}', headers={"content-type": ""})
    assert response.status_code == 200


def test_zero_shot_ranks_classes_and_sums_to_one(client: TestClient) -> None:
    body = {"image": _b64(_pattern(0)), "classes": ["cat", "dog", "owl"], "templates": ["a {}.", "{} {0.x}"], "top": 9}
    rows = client.post("/v1/zero-shot", json=body).json()["results"][0]
    prompts = ENCODER.encode_texts([f"a {c}." for c in body["classes"]] + [f"{c} {{0.x}}" for c in body["classes"]])
    mean = prompts[:3] + prompts[3:]
    expected = (mean / np.linalg.norm(mean, axis=1, keepdims=True)) @ ENCODER.encode_images(
        ENCODER.preprocess.decode(_pattern(0))[None]
    )[0]
    assert [row["label"] for row in rows] == [body["classes"][i] for i in np.argsort(-expected)]
    assert [row["similarity"] for row in rows] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert sum(row["probability"] for row in rows) == pytest.approx(1)
    upload = client.post("/v1/zero-shot", files={"file": _pattern(0)}, data={"classes": ["cat", "dog"], "top": "1"})
    assert len(upload.json()["results"][0]) == 1


def test_service_routes(client: TestClient) -> None:
    (info,) = client.get("/v1/indices").json()["indices"]
    assert (info["name"], info["rows"], info["dim"], info["model"]) == ("pool", 34, DIM, "projection")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "shards": 2, "shards_ok": 2, "encoder_ok": True}
    assert "/docs" in client.get("/").text
    assert client.get("/docs").status_code == 200


def test_the_openapi_document_describes_the_bodies(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    references = set(_references(document))
    assert "#/components/schemas/SearchRequest" in references
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        for child in value.values():
            yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)


def _chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in (*chunks, (b"IEND", b""))
    )


def _header(side: int) -> tuple[bytes, bytes]:
    return b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"


def _huge_png() -> bytes:
    """A PNG whose header promises 100 megapixels; its data is a few bytes."""
    return _chunks(_header(10_000), (b"IDAT", zlib.compress(b"\0" * 1000)))


def _text_bomb() -> bytes:
    """A small picture with a comment of 60 MB, compressed to 60 kB."""
    comment = b"comment\0\0" + zlib.compress(b"\0" * 60_000_000, 9)
    return _chunks(_header(8), (b"zTXt", comment), (b"IDAT", zlib.compress(b"\0" * 25 * 8)))


def _pixel_bomb() -> bytes:
    """A picture of 8 x 8 pixels whose data unpacks to 60 MB."""
    return _chunks(_header(8), (b"IDAT", zlib.compress(b"\0" * 60_000_000, 9)))


IMAGE = _b64(_png())
HOSTILE_SEARCH = [
    ({}, 400, "invalid_query"),
    ({"text": ""}, 400, "empty_text"),
    ({"text": " \n"}, 400, "empty_text"),
    ({"text": "x" * 101}, 400, "text_too_long"),
    ({"text": "x", "k": 0}, 400, "invalid_request"),
    ({"text": "x", "k": 51}, 400, "k_too_large"),
    ({"text": "x", "k": 10**30}, 400, "k_too_large"),
    ({"text": "x", "k": "many"}, 400, "invalid_request"),
    ({"text": "x", "kk": 1}, 400, "invalid_request"),
    ({"text": 5}, 400, "invalid_request"),
    ({"text": "x", "image": IMAGE}, 400, "invalid_query"),
    ({"text": "x", "queries": [{"text": "x"}]}, 400, "invalid_query"),
    ({"text": "x", "index": "other"}, 404, "unknown_index"),
    ({"text": "x", "index": "../../etc/passwd"}, 404, "unknown_index"),
    ({"queries": []}, 400, "batch_size"),
    ({"queries": [{"text": "x"}] * 5}, 400, "batch_size"),
    ({"queries": [{}]}, 400, "invalid_query"),
    ({"vector": []}, 400, "zero_vector"),
    ({"vector": [0.0] * DIM}, 400, "zero_vector"),
    ({"vector": [1.0] * (DIM + 1)}, 400, "wrong_dim"),
    ({"vector": [1.0] * 5000}, 400, "wrong_dim"),
    ({"vector": ["a"]}, 400, "invalid_request"),
    ({"uid": "../../../etc/passwd"}, 400, "invalid_uid"),
    ({"uid": "f" * 32}, 404, "unknown_uid"),
    ({"image": "no base64!"}, 400, "invalid_base64"),
    ({"image": "ÿ"}, 400, "invalid_base64"),
    ({"image": ""}, 400, "broken_image"),
    ({"image": _b64(b"GIF89a")}, 400, "broken_image"),
    ({"image": _b64(_png()[:40])}, 400, "broken_image"),
    ({"image": _b64(_huge_png())}, 413, "image_too_large"),
    ({"image": _b64(_text_bomb())}, 400, "broken_image"),
    ({"image": _b64(_png(2000, 1))}, 400, "image_too_long"),
    ({"image": _b64(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, 400, "broken_image"),
    ({"image_url": "http://169.254.169.254/latest/meta-data"}, 400, "image_url_off"),
    ({"queries": [{"image_url": "file:///etc/passwd"}]}, 400, "image_url_off"),
]


@pytest.mark.parametrize(("body", "status", "code"), HOSTILE_SEARCH, ids=lambda value: str(value)[:40])
def test_bad_queries_get_their_documented_status(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    _refused(client.post("/v1/search", json=body), status, code)


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(client: TestClient) -> None:
    bomb = client.post("/v1/search", json={"image": _b64(_pixel_bomb())})  # Pillow reads 8 x 8 pixels of it
    assert bomb.status_code in (200, 400)
    packed = gzip.compress(b'{"text": "' + b"x" * 60_000_000 + b'"}')
    for headers in ({"content-encoding": "gzip"}, {}):
        _refused(client.post("/v1/search", content=packed, headers=headers), 400, "invalid_request")


def _refused(response: Any, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    for secret in ("Traceback", "/tmp", "site-packages"):
        assert secret not in response.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"vector": [NaN]}', 400),
        (b'{"vector": [1e400]}', 400),
        (b'{"vector": [-Infinity]}', 400),
        (b'{"text": "\\ud800"}', 400),
        (b'{"k": ' + b"9" * 5000 + b', "text": "x"}', 400),
        (b"[" * 50_000, 400),
        (b'{"text": "' + b"x" * 200_000 + b'"}', 413),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["/v1/search", "/v1/zero-shot"])
def test_bodies_that_are_no_request(client: TestClient, path: str, content: bytes, status: int) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"]


def test_a_body_without_length_is_limited_too(client: TestClient) -> None:
    response = client.post("/v1/search", content=(b"x" * 1000 for _ in range(300)))
    _refused(response, 413, "body_too_large")


def test_a_broken_multipart_body(client: TestClient) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        response = client.post("/v1/search", content=b"--x\r\nnonsense", headers={"content-type": content_type})
        assert response.status_code == 400
        assert response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"classes": ["a"]}, "invalid_query"),
        ({"image": IMAGE}, "invalid_request"),
        ({"image": IMAGE, "classes": []}, "invalid_request"),
        ({"image": IMAGE, "classes": [" "]}, "empty_text"),
        ({"image": IMAGE, "classes": ["a"] * 11}, "too_many_classes"),
        ({"image": IMAGE, "classes": ["a"] * 10, "templates": ["{}"] * 3}, "too_many_classes"),
        ({"image": IMAGE, "classes": ["a"], "templates": ["no place"]}, "invalid_template"),
        ({"images": [], "classes": ["a"]}, "batch_size"),
        ({"images": [IMAGE] * 5, "classes": ["a"]}, "batch_size"),
        ({"image": _b64(b"no image"), "classes": ["a"]}, "broken_image"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_bad_zero_shot_requests(client: TestClient, body: dict[str, Any], code: str) -> None:
    _refused(client.post("/v1/zero-shot", json=body), 400, code)


def test_unknown_paths_and_methods(client: TestClient) -> None:
    _refused(client.get("/v2/search"), 404, "not_found")
    _refused(client.get("/v1/search"), 405, "method_not_allowed")


def test_the_token_guards_everything_but_health_and_docs(backend: LocalBackend) -> None:
    with TestClient(make_api(backend, LIMITS, token_sha256("gehéim"))) as client:
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic gehéim".encode()}):
            response = client.post("/v1/search", json={"text": "x"}, headers=headers)
            _refused(response, 401, "unauthorised")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/indices", "/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/healthz", "/readyz", "/docs", "/"):
            assert client.get(path).status_code == 200
        headers = {"authorization": "Bearer gehéim".encode()}
        assert client.post("/v1/search", json={"text": "x"}, headers=headers).status_code == 200


def test_metrics_count_routes_and_degraded_answers(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = backend.searchers["pool"]
    whole = searcher.answer

    async def half(queries, k, within=()) -> Answer:
        answer = await whole(queries, k)
        return Answer(answer.similarities, answer.row_ids, 1, 2)

    with TestClient(make_api(backend, LIMITS)) as client:
        client.post("/v1/search", json={"text": "x"})
        monkeypatch.setattr(searcher, "answer", half)
        body = client.post("/v1/search", json={"text": "x"}).json()
        assert (body["degraded"], body["shards_ok"]) == (True, 1)
        client.get("/some/strangers/path")
        text = client.get("/metrics").text
    assert 'clipgap_requests_total{route="/v1/search",status="200"} 2.0' in text
    assert 'clipgap_requests_total{route="other",status="404"} 1.0' in text
    assert "clipgap_degraded_answers_total 1.0" in text


def test_times_have_the_names_of_clip_retrieval(backend: LocalBackend) -> None:
    """The names are copied from its source (peers.md 4.9), not from ours."""
    names = {
        "full_knn_request_time", "download_time", "text_clip_inference_time", "image_clip_inference_time",
        "metadata_get_time", "knn_index_time", "dedup_time", "safety_time", "image_prepro_time", "text_prepro_time",
    }  # fmt: skip
    knn = {"modality": "image", "num_images": 3, "indice_name": "pool"}

    def counts(client: TestClient) -> dict[str, float]:
        found = re.findall(r"^(\w+_time)_count ([\d.]+)$", client.get("/metrics").text, re.M)
        return {name: float(count) for name, count in found}

    with TestClient(make_api(backend, LIMITS)) as client:
        before = counts(client)
        assert set(before) == names
        client.post("/v1/search", json={"text": "a red bird", "collapse": 0.9})
        client.post("/v1/search", json={"image": _b64(_pattern(0))})
        client.post("/knn-service", json={**knn, "text": "x"})
        client.post("/metadata", json={"indice_name": "pool", "ids": [0, 1]})
        client.post("/v1/zero-shot", json={"image": _b64(_pattern(1)), "classes": ["timed"]})
        client.post("/v1/search", json={"k": 0, "text": "refused"})
        after = counts(client)
        text = client.get("/metrics").text
    more = {name: after[name] - before[name] for name in names}
    assert more == {
        "full_knn_request_time": 3, "knn_index_time": 3, "metadata_get_time": 4, "dedup_time": 1,
        "text_clip_inference_time": 3, "image_clip_inference_time": 2, "image_prepro_time": 2,
        "download_time": 0, "safety_time": 0, "text_prepro_time": 0,
    }  # fmt: skip
    assert 'full_knn_request_time_bucket{le="0.005"}' in text
    seconds = float(re.search(r"^full_knn_request_time_sum ([\d.e-]+)$", text, re.M)[1])
    assert 0 < seconds < 60


def test_requests_have_an_id_and_the_log_says_nothing_of_what_was_asked(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(guard.access, name, getattr(guard.access, name))
    guard.write_access_log(log := io.StringIO())
    own = client.post("/v1/search", json={"text": "a secret wish"}, headers={"x-request-id": "mine-1.2_3"})
    assert own.headers["x-request-id"] == "mine-1.2_3"
    for given in ("", "a b", "x" * 65, 'quote"', "line\\n"):
        made = client.get("/v1/thumbnails/5?index=secret", headers={"x-request-id": given}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
    client.get("/secret/path")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert lines[0].pop("ms") >= 0
    assert lines[0] == {"request_id": "mine-1.2_3", "method": "POST", "route": "/v1/search", "status": 200}
    assert (lines[1]["route"], lines[1]["status"]) == ("/v1/thumbnails/", 404)
    assert (lines[-1]["route"], lines[-1]["status"]) == ("other", 404)
    assert "secret" not in log.getvalue()


def test_no_shard_at_all_is_unavailable(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(queries, k, within=()) -> Answer:
        return Answer(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1), 0, 2)

    monkeypatch.setattr(backend.searchers["pool"], "answer", nobody)
    with TestClient(make_api(backend, LIMITS)) as client:
        response = client.post("/v1/search", json={"text": "x"})
    _refused(response, 503, "no_shard")
    assert response.headers["retry-after"] == "1"


def test_damaged_metadata_is_no_500_and_names_no_path(backend: LocalBackend, tmp_path: Path) -> None:
    parts = [unit_rows(3, 0), unit_rows(3, 1)]
    source = write_embeddings(tmp_path / "emb", parts)
    damaged = _backend(tmp_path / "index", source, parts)
    for file in (tmp_path / "emb" / "metadata").iterdir():
        file.unlink()
    with TestClient(make_api(damaged, LIMITS)) as client:
        response = client.post("/v1/search", json={"text": "x"})
    _refused(response, 503, "unavailable")
    assert str(tmp_path) not in response.text


def test_an_index_of_another_encoder_is_refused_at_start(backend: LocalBackend) -> None:
    other = EncoderSettings("projection").build()
    other.fingerprint = {**other.fingerprint, "weights_sha256": "0" * 64}
    searcher = backend.searchers["pool"]
    with pytest.raises(IndexMismatchError, match="weights_sha256"):
        LocalBackend(searcher.index, other, searcher.metadata)


def test_metadata_memory_is_bounded(tmp_path: Path) -> None:
    source = write_embeddings(tmp_path / "emb", [unit_rows(50, seed) for seed in range(4)])
    one = Metadata(source)._table(0, 0).nbytes
    metadata = Metadata(source, cache_bytes=int(2.5 * one))
    ids = np.array([(part << 32) + 5 for part in (3, 0, 2, 1, 3)])
    assert [row["uid"] for row in metadata.lookup(ids)] == [uid(part, 5) for part in (3, 0, 2, 1, 3)]
    assert len(metadata._tables) == 2


def test_a_row_is_read_with_its_group_only(tmp_path: Path) -> None:
    rows = 2 * METADATA_GROUP_ROWS + 300
    source = write_embeddings(tmp_path / "emb", [unit_rows(rows, 0), unit_rows(50, 1)])
    metadata = Metadata(source)
    ids = np.array([rows - 1, 0, (1 << 32) + 49, METADATA_GROUP_ROWS - 1, 2 * METADATA_GROUP_ROWS, rows, 5 << 32, 0])
    wanted = [uid(0, rows - 1), uid(0, 0), uid(1, 49), uid(0, METADATA_GROUP_ROWS - 1), uid(0, 2 * METADATA_GROUP_ROWS)]
    assert [row.get("uid") for row in metadata.lookup(ids)] == [*wanted, None, None, uid(0, 0)]
    assert sorted(metadata._tables) == [(0, 0), (0, 2), (1, 0)]
    assert [table.num_rows for table in metadata._tables.values()].count(METADATA_GROUP_ROWS) == 1


def test_the_json_numbers_survive_a_round_trip(client: TestClient) -> None:
    text = client.post("/v1/search", json={"uid": uid(1, 1), "k": 1}).text
    assert int(json.loads(text)["results"][0][0]["row_id_str"]) == (1 << 32) + 1
