"""What the search page needs: thumbnails, hidden rows, collapsing, filters, and the page itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.hidden import read_hidden
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.messages import Limits
from tests.service_fixture import serve_locally

LIMITS = Limits(k=700)


@pytest.fixture(scope="module")
def pool(tiny_embeddings: dict[str, str]) -> str:
    return tiny_embeddings["pool"]


@pytest.fixture(scope="module")
def rows(pool: str) -> list[dict]:
    return EmbeddingSet.open(pool).all_metadata().to_pylist()


@pytest.fixture(scope="module")
def client(pool: str, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(make_api(serve_locally(pool, tmp_path_factory.mktemp("index") / "i"), LIMITS))


@pytest.fixture(scope="module")
def hiding(pool: str, rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A service that hides row 0 by its uid and every caption with the word `dog`."""
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "list.txt").write_text(rows[0]["uid"] + "\n")
    hidden = read_hidden(str(folder / "list.txt"), ("caption~dog",))
    return TestClient(make_api(serve_locally(pool, folder / "i", hidden), LIMITS))


# --- thumbnails --------------------------------------------------------------------------------------------


def test_a_thumbnail_is_the_row_s_own_picture(client: TestClient, rows: list[dict]) -> None:
    answer = client.get(f"/v1/thumbnails/{rows[5]['row_id']}?index=pool")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (rows[5]["width"], rows[5]["height"])


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (str(7 << 40), 404, "no_image"),  # no such part
        ("99999999", 404, "no_image"),  # no such row
        ("0?index=other", 404, "unknown_index"),
        ("-1", 400, "invalid_request"),
        (str(1 << 63), 400, "invalid_request"),
        ("../../etc/passwd", 404, "not_found"),
        ("abc", 400, "invalid_request"),
    ],
)
def test_other_thumbnails_are_refused(client: TestClient, path: str, status: int, code: str) -> None:
    answer = client.get(f"/v1/thumbnails/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


# --- hidden rows -------------------------------------------------------------------------------------------


def test_what_is_hidden_is_in_no_answer(hiding: TestClient, rows: list[dict]) -> None:
    shown = [row for row in rows[1:] if "dog" not in (row["caption"] or "").lower()]
    assert 0 < len(shown) < len(rows) - 1
    found = hiding.post("/v1/search", json={"text": "a dog", "k": 700}).json()["results"][0]
    assert {row["uid"] for row in found} == {row["uid"] for row in shown}


def test_hidden_rows_are_replaced_by_the_next(hiding: TestClient) -> None:
    found = hiding.post("/v1/search", json={"text": "a photo of a dog", "k": 5}).json()["results"][0]
    assert len(found) == 5
    assert not [row for row in found if "dog" in (row["caption"] or "").lower()]


def test_a_hidden_row_has_no_thumbnail_and_no_metadata(hiding: TestClient, rows: list[dict]) -> None:
    assert hiding.get(f"/v1/thumbnails/{rows[0]['row_id']}").status_code == 404
    ids = [rows[0]["row_id"], rows[-1]["row_id"], 1 << 50]
    answer = hiding.post("/metadata", json={"indice_name": "pool", "ids": ids}).json()
    assert [row["id"] for row in answer] in ([ids[1]], [])


# --- near duplicates ---------------------------------------------------------------------------------------


def test_collapsing_leaves_one_of_each(client: TestClient, rows: list[dict]) -> None:
    query = {"uid": rows[3]["uid"], "k": 40}
    plain = client.post("/v1/search", json=query).json()["results"][0]
    collapsed = client.post("/v1/search", json={**query, "collapse": 0.9}).json()["results"][0]
    assert len(plain) == len(collapsed) == 40
    assert collapsed[0] == plain[0]
    assert collapsed[-1]["similarity"] < plain[-1]["similarity"]  # it had to go further for as many
    nothing_else = client.post("/v1/search", json={**query, "collapse": 0.0}).json()["results"][0]
    assert len(nothing_else) < 40


# --- filters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "fulfils"),
    [
        ([{"column": "width", "at_least": 60}], lambda r: r["width"] >= 60),
        ([{"column": "width", "at_most": 63}], lambda r: r["width"] <= 63),
        ([{"column": "clip_score", "at_least": -0.05, "at_most": 0.05}],
         lambda r: r["clip_score"] is not None and -0.05 <= r["clip_score"] <= 0.05),
        ([{"column": "caption", "equals": "a cat"}], lambda r: r["caption"] == "a cat"),
        ([{"column": "width", "any_of": [64, 63]}, {"column": "height", "equals": 64}],
         lambda r: r["width"] in (64, 63) and r["height"] == 64),
        ([{"column": "caption", "any_of": ["nobody wrote this"]}], lambda r: False),
    ],
)  # fmt: skip
def test_a_filter_finds_exactly_the_rows_that_fulfil_it(
    client: TestClient, rows: list[dict], conditions, fulfils
) -> None:
    for _ in range(2):  # the second time from memory
        body = {"text": "cat", "k": 700, "filter": conditions}
        found = client.post("/v1/search", json=body).json()["results"][0]
        assert {row["row_id"] for row in found} == {row["row_id"] for row in rows if fulfils(row)}
    similarities = [row["similarity"] for row in found]
    assert similarities == sorted(similarities, reverse=True)


def test_a_filter_in_a_form_is_json(client: TestClient) -> None:
    form = {"text": "cat", "k": "5", "filter": '[{"column": "width", "at_least": 64}]'}
    answer = client.post("/v1/search", files={name: (None, value) for name, value in form.items()})
    plain = client.post("/v1/search", json={"text": "cat", "k": 5, "filter": [{"column": "width", "at_least": 64}]})
    assert answer.json()["results"] == plain.json()["results"]
    assert client.post("/v1/search", files={"text": (None, "a"), "filter": (None, "[{")}).status_code == 400


@pytest.mark.parametrize(
    "condition",
    [
        {}, {"column": "width"}, {"column": "width", "split": "near", "equals": 1}, {"column": "weight", "equals": 1},
        {"column": "caption", "at_least": 1}, {"column": "caption", "equals": 3}, {"column": "width", "equals": "64"},
        {"split": "unknown"}, {"column": "width", "any_of": []}, {"column": "width", "above": 3},
    ],
)  # fmt: skip
def test_a_condition_that_makes_no_sense_is_refused(client: TestClient, condition: dict) -> None:
    answer = client.post("/v1/search", json={"text": "cat", "filter": [condition]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_filter", "invalid_request")


# --- the page ----------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_outside_and_needs_no_token(pool: str, tmp_path: Path) -> None:
    guarded = TestClient(make_api(serve_locally(pool, tmp_path / "i"), LIMITS, token_sha256("secret")))
    page = guarded.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        assert f"/page/{name}" in page.text
        text = guarded.get(f"/page/{name}").text
        assert "http://" not in text
        assert "https://" not in text
    assert guarded.get("/page/..%2Fguard.py").status_code == 404
    for path in ("/v1/indices", "/v1/tests", "/v1/thumbnails/0", "/indices-list"):
        assert guarded.get(path).status_code == 401
