from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from clipgap_ray.client import AsyncClient, Client
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ClipgapError, ConfigError, DataError, IndexMismatchError
from clipgap_ray.kernels.topk import exact_topk
from tests.index_fixture import all_rows, uid, unit_rows, write_embeddings
from tests.waiting import free_port, until

pytestmark = pytest.mark.ray

PARTS = [unit_rows(60, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def index(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    from clipgap_ray.stages import index as stage

    folder = tmp_path_factory.mktemp("serve")
    out = str(folder / "index")
    stage.run(IndexSettings(embeddings=write_embeddings(folder / "emb", PARTS), out=out, recall_queries=5))
    return out


@pytest.fixture(scope="module")
def takedowns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service's takedown list, empty at first."""
    path = tmp_path_factory.mktemp("lists") / "takedowns.txt"
    path.write_text("")
    return path


@pytest.fixture(scope="module")
def address(index: str, takedowns: Path) -> Iterator[str]:
    """The real service over real HTTP."""
    from ray import serve

    from clipgap_ray.serving.app import build_app
    from clipgap_ray.serving.run import deploy

    settings = ServeSettings(
        index=(f"pool={index}",), port=free_port(), shard_timeout_s=3.0, blocklist=str(takedowns),
        origins=("https://front.example",),
    )  # fmt: skip
    deploy(build_app(settings), settings)
    yield f"http://127.0.0.1:{settings.port}"
    serve.shutdown()


def test_answers_are_the_exact_ones_for_every_client(address: str) -> None:
    queries = unit_rows(24, seed=77)
    expected = exact_topk(queries, *all_rows(PARTS), 5)
    with Client(address) as client, ThreadPoolExecutor(8) as threads:
        single = list(threads.map(lambda q: client.search(vector=q.astype(float), k=5)[0], queries))
        batch = client.search(queries=[{"vector": q.astype(float).tolist()} for q in queries], k=5)
    for results in (single, batch.results):
        assert [[n.row_id for n in rows] for rows in results] == expected[1].tolist()
        assert [[n.similarity for n in rows] for rows in results] == expected[0].tolist()
    assert (batch.shards_ok, batch.shards, batch.degraded) == (2, 2, False)


def test_text_zero_shot_and_service_routes(address: str) -> None:
    async def ask() -> Any:
        async with AsyncClient(address) as client:
            return await asyncio.gather(*(client.search(text=f"text {i}", k=1) for i in range(20)), client.indices())

    *answers, (info,) = asyncio.run(ask())
    rows = EncoderSettings("projection").build().encode_texts([f"text {i}" for i in range(20)])
    expected = exact_topk(rows, *all_rows(PARTS), 1)[1][:, 0]
    assert [answer[0][0].row_id for answer in answers] == expected.tolist()
    assert (info.rows, info.shards, info.key) == (240, 2, "Flat")
    ready = {"ready": True, "shards": 2, "shards_ok": 2, "encoder_ok": True}
    assert httpx.get(f"{address}/readyz").json() == ready
    assert "clipgap_requests_total" in httpx.get(f"{address}/metrics").text
    assert httpx.get(f"{address}/docs").status_code == 200


def test_images_filters_and_zero_shot_cross_the_wire(address: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    encoder = EncoderSettings("projection").build()
    pixels = encoder.preprocess.decode(buffer.getvalue())[None]
    expected = exact_topk(encoder.encode_images(pixels), *all_rows(PARTS), 3)[1].tolist()
    with Client(address) as client:
        found = client.search(image=buffer.getvalue(), k=3)
        assert [[row.row_id for row in found[0]]] == expected
        (only,) = client.search(image=buffer.getvalue(), k=3, filter=[{"column": "caption", "equals": "caption 3 7"}])
        assert [row.row_id for row in only] == [(3 << 32) + 7]
        (best,) = client.zero_shot([buffer.getvalue()], ["cat", "dog"], top=2)
    similarities = encoder.encode_texts(["a photo of a cat.", "a photo of a dog."]) @ encoder.encode_images(pixels)[0]
    assert [row.label for row in best] == [["cat", "dog"][i] for i in np.argsort(-similarities)]


def test_a_front_of_another_site_may_ask(address: str) -> None:
    headers = {"origin": "https://front.example", "access-control-request-method": "POST"}
    allowed = httpx.options(f"{address}/knn-service", headers=headers).headers
    assert allowed["access-control-allow-origin"] == "https://front.example"


def test_a_takedown_list_that_changes_holds_in_the_running_service(address: str, takedowns: Path) -> None:
    with Client(address) as client:
        assert client.search(uid=uid(0, 3), k=1)[0][0].row_id == 3
        takedowns.write_text(f"{uid(0, 3)}\n")
        until(lambda: httpx.post(f"{address}/v1/search", json={"uid": uid(0, 3)}).status_code == 404, "the takedown")
        near = client.search(vector=PARTS[0][3].astype(float), k=240)[0]
        assert 3 not in [row.row_id for row in near]
        takedowns.write_text("")
        until(lambda: httpx.post(f"{address}/v1/search", json={"uid": uid(0, 3)}).status_code == 200, "its end")


def test_bad_input_is_4xx_over_the_wire(address: str) -> None:
    with Client(address) as client, pytest.raises(ClipgapError, match="400 wrong_dim: vector has 3 dims"):
        client.search(vector=[1, 2, 3])
    response = httpx.post(f"{address}/v1/search", content=b'{"vector": [NaN]}')
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    response = httpx.post(f"{address}/v1/search", content=b"x" * 17_000_000)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_sub_call_with_another_version_is_not_answered(address: str) -> None:
    from ray import serve

    from clipgap_ray.serving.deployments import ShardQuery
    from clipgap_ray.serving.run import APP

    handle = serve.get_deployment_handle("pool-shard-0", APP)
    version = handle.describe.remote().result(timeout_s=20)["version"]
    assert handle.search.remote(ShardQuery("older", PARTS[0][:1], 1)).result(timeout_s=20) is None
    assert handle.search.remote(ShardQuery(version, PARTS[0][:1], 1)).result(timeout_s=20)[1].tolist() == [[0]]


def test_a_lost_shard_is_flagged_then_comes_back_and_nothing_is_wrong(address: str) -> None:
    from ray import serve

    from clipgap_ray.serving.run import APP

    handle = serve.get_deployment_handle("pool-shard-1", APP)
    pid = handle.describe.remote().result(timeout_s=20)["pid"]
    query = PARTS[1][3].astype(float)  # lives in shard 1
    rows, row_ids = all_rows(PARTS)
    here = (row_ids >> 32) % 2 == 0
    whole = exact_topk(PARTS[1][3:4], rows, row_ids, 4)[1][0].tolist()
    without = exact_topk(PARTS[1][3:4], rows[here], row_ids[here], 4)[1][0].tolist()

    def ask() -> bool:
        answer = client.search(vector=query, k=4)
        assert [n.row_id for n in answer[0]] == (without if answer.degraded else whole)
        assert answer.shards_ok == (1 if answer.degraded else 2)
        return answer.degraded

    with Client(address) as client:
        assert not ask()
        # First it hangs: a killed replica may be back before the deadline, and nobody would see it missing.
        os.kill(pid, signal.SIGSTOP)
        until(ask, "an answer without the shard")
        assert httpx.get(f"{address}/readyz").status_code == 503
        os.kill(pid, signal.SIGKILL)
        until(lambda: not ask(), "whole again")
    assert handle.describe.remote().result(timeout_s=20)["pid"] != pid
    assert "clipgap_degraded_answers_total 0.0" not in httpx.get(f"{address}/metrics").text


def test_impossible_settings_are_refused_before_anything_starts(index: str, address: str, tmp_path: Path) -> None:
    from clipgap_ray.serving import run as service
    from clipgap_ray.serving.app import build_app

    with pytest.raises(DataError, match="does not exist"):
        build_app({"index": [f"pool={tmp_path}/none"]})
    with pytest.raises(ConfigError, match="unknown setting 'indx'"):
        build_app({"index": ["pool=x"], "indx": []})
    with pytest.raises(ConfigError, match="Serve runs on this cluster already"):
        service.run(ServeSettings(index=(f"pool={index}",), port=free_port()))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ConfigError, match="cannot listen on 127"):
            service.run(ServeSettings(index=(f"pool={index}",), port=busy.getsockname()[1]))


def test_an_index_of_another_encoder_is_refused_at_start(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipgap_ray.serving.app import build_app

    other = EncoderSettings("projection").build()
    other.fingerprint = {**other.fingerprint, "model": "clipgap-other"}
    monkeypatch.setattr(EncoderSettings, "build", lambda self: other)
    with pytest.raises(IndexMismatchError, match="model is 'projection' and 'clipgap-other'"):
        build_app({"index": [f"pool={index}"]})


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["--haproxy", "--no-haproxy"])
def test_the_command_says_how_to_ask_answers_and_ends_on_a_signal(index: str, proxy: str, tmp_path: Path) -> None:
    port, queries = free_port(), unit_rows(40, seed=78)
    expected = exact_topk(queries, *all_rows(PARTS), 5)[1].tolist()
    words = ["serve", "--index", f"pool={index}", "--port", str(port), proxy]
    environment = {**os.environ, "CLIPGAP_TOKEN": "for the test"}
    environment.pop("RAY_ADDRESS", None)
    with Path(tmp_path, "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "clipgap_ray.cli", *words],
            stdout=subprocess.PIPE, stderr=said, text=True, env=environment,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            curl = next(line for line in lines if line.startswith("curl"))
            assert "for the test" not in curl
            answer = subprocess.run(curl, shell=True, capture_output=True, text=True, env=environment, timeout=60)
            assert '"degraded":false' in answer.stdout
            assert httpx.post(f"http://127.0.0.1:{port}/v1/search", json={"text": "x"}).status_code == 401
            with Client(f"http://127.0.0.1:{port}", token="for the test") as client, ThreadPoolExecutor(8) as threads:
                found = list(threads.map(lambda q: client.search(vector=q.astype(float), k=5)[0], queries))
            assert [[row.row_id for row in rows] for rows in found] == expected
            process.send_signal(signal.SIGINT if proxy == "--haproxy" else signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        warnings = said.read()
    assert ("HAProxy" in warnings) == (proxy == "--haproxy")  # its ports, which listen on all interfaces
    assert "Traceback" not in warnings
