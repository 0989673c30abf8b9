"""clip-retrieval's routes, asked in its words: by hand, by its own Python client, and by its own web front."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import importlib.util
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.clip_retrieval import ROUTES
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import Limits
from tests.service_fixture import over_http, serve_locally

LIMITS = Limits(k=500)
VERSION = "2.45.0"
BODY = {"text": "a photo of a cat", "modality": "image", "num_images": 3, "indice_name": "pool"}


@pytest.fixture(scope="module")
def rows(tiny_embeddings: dict[str, str]) -> list[dict]:
    return EmbeddingSet.open(tiny_embeddings["pool"]).all_metadata().to_pylist()


@pytest.fixture(scope="module")
def backend(tiny_embeddings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    return serve_locally(tiny_embeddings["pool"], tmp_path_factory.mktemp("index") / "i")


@pytest.fixture(scope="module")
def client(backend: LocalBackend) -> TestClient:
    return TestClient(make_api(backend, LIMITS))


@pytest.fixture(scope="module")
def no_addresses(tiny_embeddings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    """A service over images that lie in tars and nowhere on the web."""
    return serve_locally(tiny_embeddings["val"], tmp_path_factory.mktemp("index") / "i")


def is_jpeg(text: str) -> bool:
    return Image.open(io.BytesIO(base64.b64decode(text))).format == "JPEG"


# --- by hand -----------------------------------------------------------------------------------------------


def test_bodies_of_any_content_type_are_answered(client: TestClient, rows: list[dict]) -> None:
    assert client.get("/indices-list").json() == ["pool"]
    body = (
        '{"text": "a photo of a cat", "image": "", "image_url": null, "embedding_input": null, "modality": "image",'
        ' "num_images": 3, "num_result_ids": 8, "indice_name": "pool", "deduplicate": false, "use_mclip": false,'
        ' "aesthetic_score": null, "aesthetic_weight": 0.5}'
    )
    for content_type in ("text/plain", "application/json"):
        found = client.post("/knn-service", content=body, headers={"content-type": content_type}).json()
        assert len(found) == 8
        assert all({"id", "similarity", "caption", "uid"} <= set(row) for row in found[:3])
        assert all(set(row) == {"id", "similarity"} for row in found[3:])
    own = client.post("/v1/search", json={"text": "a photo of a cat", "k": 8}).json()["results"][0]
    assert [row["id"] for row in found] == [row["row_id"] for row in own]
    described = client.post("/metadata", json={"indice_name": "pool", "ids": [row["id"] for row in found[3:]]}).json()
    captions = {row["row_id"]: row["caption"] for row in rows}
    assert [row["metadata"]["caption"] for row in described] == [captions[row["id"]] for row in found[3:]]


@pytest.mark.parametrize(("ids", "expected"), [(None, 3), (2, 2), (7, 7), (3000, 500), (10**20, 500)])
def test_ids_are_given_up_to_the_limit(client: TestClient, ids: int | None, expected: int) -> None:
    """Its front asks for 3,000 whatever a service allows: only descriptions are refused."""
    body = {**BODY, "num_result_ids": ids}
    found = client.post("/knn-service", json=body).json()
    assert len(found) == expected
    assert [row for row in found if "uid" in row] == found[:3]


def test_rows_without_address_bring_their_picture_and_no_nulls(no_addresses: LocalBackend) -> None:
    client = TestClient(make_api(no_addresses, LIMITS))
    found = client.post("/knn-service", json={**BODY, "num_result_ids": 12}).json()
    ids = [row["id"] for row in found]
    assert all(is_jpeg(row["image"]) for row in found[:3])
    # json-bigint, which its front reads numbers with, writes the long ones as text
    described = client.post("/metadata", json={"indice_name": "pool", "ids": [*map(str, ids), 1 << 60]}).json()
    assert [row["id"] for row in described] == ids
    for row in described:
        assert is_jpeg(row["metadata"]["image"])
        assert "url" not in row["metadata"]
    assert [row["metadata"]["image"] for row in described[:3]] == [row["image"] for row in found[:3]]
    assert client.post("/metadata", json={"indice_name": "pool", "ids": []}).json() == []
    assert client.post("/metadata", json={"indice_name": "other", "ids": [1]}).status_code == 404


def test_rows_with_an_address_bring_no_picture(client: TestClient) -> None:
    found = client.post("/knn-service", json={**BODY, "num_images": 200}).json()
    assert all(("url" in row) != ("image" in row) for row in found[:100])
    assert any("url" in row for row in found)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"indice_name": "other"}, 404, "unknown_index"),
        ({"modality": "text"}, 400, "wrong_modality"),
        ({"num_images": 501}, 400, "k_too_large"),
        ({"num_images": 0}, 400, "invalid_request"),
        ({"text": ""}, 400, "invalid_query"),
        ({"image_url": "http://127.0.0.1/"}, 400, "invalid_query"),
        ({"text": None, "image_url": "http://127.0.0.1/"}, 400, "image_url_off"),
    ],
)
def test_what_cannot_be_answered_is_refused(client: TestClient, change: dict, status: int, code: str) -> None:
    answer = client.post("/knn-service", json={**BODY, **change})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_summary_of_where_the_time_goes(tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    client = TestClient(make_api(serve_locally(tiny_embeddings["val"], tmp_path / "i"), LIMITS))
    before = client.get("/metrics-summary")
    assert before.headers["content-type"].startswith("text/plain")
    assert before.text == "no search yet\n"
    for _ in range(3):
        client.post("/knn-service", json={**BODY, "deduplicate": True})
    head, names, *lines = client.get("/metrics-summary").text.splitlines()
    assert head.startswith("3 searches, 0.")
    assert names.split() == ["name", "calls", "average", "share", "description"]
    steps = {line.split()[0]: (int(line.split()[1]), float(line.split()[2].rstrip("s"))) for line in lines}
    assert len(steps) == 9
    assert steps["knn_index_time"][0] == steps["dedup_time"][0] == 3
    assert steps["safety_time"] == (0, 0.0)
    assert [mean for _, mean in steps.values()] == sorted((mean for _, mean in steps.values()), reverse=True)


def test_a_token_is_taken_as_a_password(backend: LocalBackend) -> None:
    client = TestClient(make_api(backend, LIMITS, token_sha256("secret")))
    assert client.post("/knn-service", json=BODY).status_code == 401
    assert client.post("/knn-service", json=BODY, auth=("anybody", "secret")).status_code == 200
    assert client.post("/knn-service", json=BODY, auth=("secret", "wrong")).status_code == 401
    for header in ("Basic", "Basic ", "Basic %%%", "Basic c2VjcmV0", "Basic secret"):
        assert client.post("/knn-service", json=BODY, headers={"authorization": header}).status_code == 401


# --- its Python client -------------------------------------------------------------------------------------


def installed(ending: str) -> Path:
    """A file of the installed clip-retrieval; the package itself cannot be imported without all that it depends on."""
    try:
        files = importlib.metadata.files("clip-retrieval") or []
        version = importlib.metadata.version("clip-retrieval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"`pip install --no-deps clip-retrieval=={VERSION}` brings its client and front")
    assert version == VERSION
    return Path(str(next(file for file in files if file.as_posix().endswith(ending)).locate()))


@pytest.fixture(scope="module")
def their_module() -> Any:
    spec = importlib.util.spec_from_file_location("clip_client_2_45", installed("clip_retrieval/clip_client.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(backend: LocalBackend) -> Iterator[str]:
    with over_http(make_api(backend, LIMITS)) as address:
        yield address


def test_its_client_finds_what_ours_finds(
    their_module: Any, address: str, rows: list[dict], client: TestClient
) -> None:
    theirs = their_module.ClipClient(f"{address}/knn-service", "pool", num_images=40, deduplicate=False)
    found = theirs.query(text="a photo of a cat")
    own = client.post("/v1/search", json={"text": "a photo of a cat", "k": 40}).json()["results"][0]
    assert [(row["id"], row["similarity"]) for row in found] == [(row["row_id"], row["similarity"]) for row in own]
    captions = {row["row_id"]: row["caption"] for row in rows}
    assert [row.get("caption") for row in found] == [captions[row["id"]] for row in found]
    assert all("url" in row or is_jpeg(row["image"]) for row in found)


def test_its_client_sends_files_and_vectors(
    their_module: Any, address: str, backend: LocalBackend, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    theirs = their_module.ClipClient(f"{address}/knn-service", "pool", num_images=2)
    embeddings = EmbeddingSet.open(tiny_embeddings["pool"])
    row = np.asarray(embeddings.images(0))[3]
    nearest, second = theirs.query(embedding_input=row.astype(float).tolist())
    assert nearest["similarity"] == pytest.approx(1.0, abs=1e-3)
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(backend.searchers["pool"].metadata.image(3))
    by_file = theirs.query(image=str(picture))
    assert [one["id"] for one in by_file] == [nearest["id"], second["id"]]


def test_its_client_leaves_near_duplicates_out(their_module: Any, address: str, client: TestClient) -> None:
    words: dict[str, Any] = {"url": f"{address}/knn-service", "indice_name": "pool", "num_images": 100}
    all_rows = [row["id"] for row in their_module.ClipClient(**words, deduplicate=False).query(text="a red bird")]
    different = [row["id"] for row in their_module.ClipClient(**words).query(text="a red bird")]  # its default
    collapsed = client.post("/v1/search", json={"text": "a red bird", "k": 100, "collapse": 0.94}).json()["results"][0]
    assert different == [row["row_id"] for row in collapsed]
    assert len(set(all_rows) - set(different)) > 0


def test_its_client_is_told_why_not(their_module: Any, address: str) -> None:
    """It does not look at the status: what is no list is an error."""

    def ask(**words: Any) -> Any:
        question = words.pop("query", {"text": "x"})
        settings = {"url": f"{address}/knn-service", "indice_name": "pool", **words}
        return their_module.ClipClient(**settings).query(**question)["error"]["code"]

    assert ask(indice_name="laion5B") == "unknown_index"
    assert ask(num_images=501) == "k_too_large"
    assert ask(modality=their_module.Modality.TEXT) == "wrong_modality"
    assert ask(query={"image": "http://127.0.0.1/x.png"}) == "image_url_off"
    assert ask(query={"embedding_input": [1.0, 2.0]}) == "wrong_dim"


def test_its_client_shows_a_token_as_a_password(
    their_module: Any, backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with over_http(make_api(backend, LIMITS, token_sha256("secret"))) as address:
        url = f"{address}/knn-service"
        assert their_module.ClipClient(url, "pool").query(text="x")["error"]["code"] == "unauthorised"
        assert len(their_module.ClipClient(url.replace("//", "//any:secret@"), "pool").query(text="x")) == 40
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login any password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert len(their_module.ClipClient(url, "pool").query(text="x")) == 40


# --- its web front -----------------------------------------------------------------------------------------

ROOT = "document.querySelector('clip-front')?.shadowRoot"
FIGURES = f"{ROOT}.querySelectorAll('figure').length"
SHOWN = f"[...{ROOT}.querySelectorAll('img.pic')].filter(i => i.complete && i.naturalWidth > 0).length"


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium")
    return found or pytest.skip("needs Debian's chromium; `make test-all` installs it as root")


@contextlib.contextmanager
def fronts(backend: LocalBackend) -> Iterator[dict[str, str]]:
    """Addresses of its front: on a site of its own, asking the service by name; and shown by a proxy of the service."""
    files = Starlette(routes=[Mount("/", StaticFiles(directory=installed("front/build/index.html").parent, html=True))])
    with over_http(files) as site:
        api = make_api(backend, LIMITS, origins=(site,))

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            is_ours = scope["type"] != "http" or scope["path"] in ROUTES
            await (api if is_ours else files)(scope, receive, send)

        with over_http(proxy) as service:
            yield {"own site": f"{site}/?back={service}&index=pool", "behind a proxy": service}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("hosted", ["own site", "behind a proxy"])
def test_its_front_searches_scrolls_and_searches_by_a_picture(
    hosted: str, chromium: str, no_addresses: LocalBackend, tmp_path: Path
) -> None:
    from tests.e2e.browser import open_page

    body = {**BODY, "num_images": 40, "num_result_ids": 500, "deduplicate": True}
    rows = len(TestClient(make_api(no_addresses, LIMITS)).post("/knn-service", json=body).json())
    assert rows > 40
    with fronts(no_addresses) as addresses, open_page(chromium, addresses[hosted], tmp_path / "profile") as page:
        page.size(1200, 1500)
        page.wait(f"{ROOT}?.querySelector('select')?.value === 'pool'")
        page.run(f"{ROOT}.querySelector('#searchBar').focus()")
        page.type("a photo of a cat")
        page.press("Enter", 13, "\r")
        # 40 come with the answer, the others by themselves from /metadata while there is room in the window
        page.wait(f"{FIGURES} === {rows} && {SHOWN} === {rows}")
        assert page.run(f"{ROOT}.querySelectorAll('figcaption').length") > 0
        sixth = page.run(f"{ROOT}.querySelectorAll('img.pic')[5].src")
        page.run(f"{ROOT}.querySelectorAll('figure')[5].querySelector('.subImageSearch').click()")
        page.wait(f"{ROOT}.querySelectorAll('img.pic')[0].src === {sixth!r}")
        page.screenshot(tmp_path / "front.png")
        missing = ("favicon.ico", "vendor/webcomponents-loader.js")  # in the distribution; its page names the second
        assert [error for error in page.errors if not error.endswith(missing)] == []
