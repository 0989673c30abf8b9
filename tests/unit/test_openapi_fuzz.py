"""Requests made up from the service's own OpenAPI document, right ones and wrong ones: no route answers 5xx."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from clipgap_ray.serving.admin import Admin, SwapState
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.messages import ApiError, Limits
from tests.index_fixture import uid, unit_rows, write_embeddings
from tests.service_fixture import serve_locally

# Every route of the document: a new one is added here, and so is tried.
ROUTES = [
    "GET /config.json", "GET /healthz", "GET /indices-list", "GET /metrics", "GET /metrics-summary", "GET /readyz",
    "GET /v1/admin/swap", "GET /v1/indices", "GET /v1/splits", "GET /v1/tests", "GET /v1/thumbnails/{row_id}",
    "POST /knn-service", "POST /metadata", "POST /v1/admin/swap", "POST /v1/search", "POST /v1/similarity",
    "POST /v1/zero-shot",
]  # fmt: skip
HEADERS = {"authorization": "Bearer boss"}
EXAMPLES = 8  # per route and mode


class _Operator:
    async def swap(self, index: str, uri: str | None) -> SwapState:
        if index != "pool":
            raise ApiError(404, "unknown_index", "no such index")
        return SwapState(state="loading", index=index)

    async def swap_state(self) -> SwapState:
        return SwapState()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The document of a service of 30 rows, its application behind it."""
    folder = tmp_path_factory.mktemp("fuzz")
    backend = serve_locally(write_embeddings(folder / "emb", [unit_rows(30, 0)]), folder / "index")
    limits = Limits(body_bytes=100_000, image_pixels=10_000, image_url=True, image_url_s=0.2)
    app = make_api(backend, limits, admin=Admin(token_sha256("boss"), _Operator()))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def _operations(document: Any) -> dict[str, Any]:
    found = [result.ok() for result in document.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_every_route_is_tried(document: Any) -> None:
    assert sorted(_operations(document)) == ROUTES


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("route", ROUTES)
def test_no_made_up_request_is_an_error_of_the_server(document: Any, route: str, mode: GenerationMode) -> None:
    operation = _operations(document)[route]
    if mode is GenerationMode.NEGATIVE and not operation.body and not operation.path_parameters:
        mode = GenerationMode.POSITIVE  # a route without parameters cannot be asked wrongly

    @hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        _check(case.call(headers=HEADERS))

    ask()


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(max_size=20) | st.none(),
        "vector": st.lists(NUMBERS, max_size=6),
        "uid": st.sampled_from([uid(0, 3), "f" * 32, "../x", ""]),
        "image_url": st.sampled_from(["http://127.0.0.1/", "file:///etc/passwd", "http://[::1", "x"]),
        "k": st.integers(-2, 40),
        "collapse": st.floats(-1, 2) | st.none(),
        "index": st.sampled_from(["pool", "other", None]),
        "filter": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "column": st.sampled_from(["caption", "uid", "width", "clip_score", "sha256", "row_id", "none"]),
                    "equals": st.text(max_size=3) | NUMBERS | st.integers(),
                    "any_of": st.lists(st.text(max_size=3) | st.integers(), max_size=3),
                    "at_least": NUMBERS,
                    "at_most": st.integers(),
                    "split": st.just("near"),
                },
            ),
            max_size=3,
        ),
    },
)


@hypothesis.given(body=FIELDS)
@hypothesis.settings(max_examples=40)
def test_searches_with_every_field_are_answered_or_refused(document: Any, body: dict[str, Any]) -> None:
    _check(
        _operations(document)["POST /v1/search"].Case(body=body, media_type="application/json").call(headers=HEADERS)
    )


def _check(answer: Any) -> None:
    """Answered, or refused with a code and a message and nothing of the server's inside."""
    assert answer.status_code < 500, (answer.status_code, answer.text[:500])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["code"]
        assert error["message"]
        assert "Traceback" not in answer.text
