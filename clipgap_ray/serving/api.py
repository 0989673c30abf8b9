"""The HTTP interface: routes, OpenAPI, errors. Built from any backend; knows neither Ray nor files.

Bodies are parsed here and not by FastAPI's body parameters: clients of other tools send JSON without a content
type, one route takes JSON or multipart, and a refused body must not be echoed.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from clipgap_ray import __version__
from clipgap_ray.errors import ClipgapError
from clipgap_ray.serving import admin as admin_routes
from clipgap_ray.serving import clip_retrieval
from clipgap_ray.serving.admin import Admin
from clipgap_ray.serving.contracts import Backend
from clipgap_ray.serving.fetch import Fetcher
from clipgap_ray.serving.filters import Filter, read_filter
from clipgap_ray.serving.guard import Guard, Keys, Meters
from clipgap_ray.serving.inputs import Body, parse_json, read_search, read_zero_shot, refusal
from clipgap_ray.serving.messages import (
    ApiError,
    ClassScore,
    ErrorResponse,
    IndicesResponse,
    Limits,
    Readiness,
    SearchRequest,
    SearchResponse,
    SetsResponse,
    SimilarityRequest,
    SimilarityResponse,
    SplitsResponse,
    ZeroShotRequest,
    ZeroShotResponse,
)
from clipgap_ray.serving.openapi import describe_bodies, described

logger = logging.getLogger("clipgap")

LOGIT_SCALE = 100.0  # CLIP's learned temperature, clipped to 100 in training
SHOWN_S = 60  # how long a browser may show a thumbnail without asking again whether it is still to be shown
PAGE = pathlib.Path(__file__).with_name("page")
PAGE_POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'"


def make_api(
    backend: Backend,
    limits: Limits | None = None,
    token_hash: str | None = None,
    fetcher: Fetcher | None = None,
    admin: Admin | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Build the application.

    Args:
        backend: What answers.
        limits: What one request may ask for.
        token_hash: `guard.token_sha256` of the bearer token; None lets everybody in.
        fetcher: Of images given by address; default: from public addresses within the limits.
        admin: Who swaps versions for the holder of the admin key; None: nobody, there are no such routes.
        origins: Web pages of which origins may ask from a browser; "*" is all.
    """
    limits = limits or Limits()
    fetcher = fetcher or Fetcher(limits)
    meters = Meters()
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 503)
    }
    app = FastAPI(title="clipgap", version=__version__, redoc_url=None, responses=refused)
    _add_errors(app)
    _add_v1(app, backend, limits, meters, fetcher)
    clip_retrieval.add_routes(app, backend, limits, meters, fetcher)
    _add_health(app, backend, meters)
    if admin is not None:
        admin_routes.add_routes(app, admin.operator)
    describe_bodies(
        app, [SearchRequest, SimilarityRequest, ZeroShotRequest, *clip_retrieval.BODIES, *admin_routes.BODIES]
    )
    routes = frozenset(getattr(route, "path", "") for route in app.routes) | {
        "/v1/search", "/v1/similarity", "/v1/splits", "/v1/tests", "/v1/zero-shot", "/v1/indices",
        "/v1/admin/swap", "/healthz", "/readyz", "/metrics", "/", *clip_retrieval.ROUTES,
    }  # fmt: skip
    keys = Keys(token_hash, admin.key_hash if admin is not None else None)
    app.add_middleware(Guard, limits=limits, keys=keys, meters=meters, routes=routes)
    if origins:  # before the guard: a browser asks first, without the token, whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", clip_retrieval.DEGRADED],
        )
    return app


def _add_v1(app: FastAPI, backend: Backend, limits: Limits, meters: Meters, fetcher: Fetcher) -> None:
    @app.post("/v1/search", openapi_extra=described("SearchRequest", uploads=True))
    async def search(body: Annotated[tuple[Any, list[bytes]], Depends(_parse_search)]) -> SearchResponse:
        """Nearest rows of a text, an image, a vector or a sample of the index; or of a batch of them."""
        request, uploads = body
        index = await _index_of(backend, request.index, request.modality)
        within: Filter = ()
        if request.filter:
            splits = [split.name for split in await backend.splits()]
            within = read_filter(request.filter, splits, await backend.columns(index))
        queries = await fetcher.fill(read_search(request, limits, uploads), backend.timings)
        found = await backend.search(index, queries, request.k, request.collapse, within)
        if found.answer.degraded:
            meters.degraded.inc()
        return SearchResponse(
            index=found.info.name,
            version=found.info.version,
            shards=found.answer.shards,
            shards_ok=found.answer.shards_ok,
            degraded=found.answer.degraded,
            results=found.neighbours,
        )

    @app.post("/v1/similarity", openapi_extra=described("SimilarityRequest", uploads=True))
    async def similarity(body: Annotated[tuple[Any, list[bytes]], Depends(_parse_similarity)]) -> SimilarityResponse:
        """How covered is it by the training set: nearest training and test images, percentile, which splits drop it."""
        request, uploads = body
        queries = await fetcher.fill(read_search(request, limits, uploads), backend.timings)
        covered = await backend.similarity(request.index, queries, request.k)
        answer = covered.found.answer
        if answer.degraded:
            meters.degraded.inc()
        return SimilarityResponse(
            index=covered.found.info.name,
            version=covered.found.info.version,
            shards=answer.shards,
            shards_ok=answer.shards_ok,
            degraded=answer.degraded,
            results=covered.results,
        )

    @app.get("/v1/splits")
    async def splits() -> SplitsResponse:
        """The splits that /v1/similarity judges by."""
        return SplitsResponse(splits=await backend.splits())

    @app.get("/v1/tests")
    async def tests() -> SetsResponse:
        """The test sets that /v1/similarity compares with: how close each lies to the training set."""
        return SetsResponse(tests=await backend.sets())

    @app.get("/v1/thumbnails/{row_id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def thumbnail(
        row_id: Annotated[int, Path(ge=0, lt=1 << 63)], index: Annotated[str | None, Query(max_length=200)] = None
    ) -> Response:
        """A small JPEG of a row of an index, read from its shard."""
        data = await backend.thumbnail(index, row_id)
        return Response(data, media_type="image/jpeg", headers={"cache-control": f"private, max-age={SHOWN_S}"})

    @app.post("/v1/zero-shot", openapi_extra=described("ZeroShotRequest", uploads=True))
    async def zero_shot(body: Annotated[tuple[Any, list[bytes]], Depends(_parse_zero_shot)]) -> ZeroShotResponse:
        """Classify images into the classes of the request."""
        request, uploads = body
        images = read_zero_shot(request, limits, uploads)
        similarities = await backend.zero_shot(images, request.classes, request.templates)
        return ZeroShotResponse(results=[_best(row, request.classes, request.top) for row in similarities])

    @app.get("/v1/indices")
    async def indices() -> IndicesResponse:
        """The indexes that are being served, the default one first."""
        return IndicesResponse(indices=await backend.indices())


def _add_health(app: FastAPI, backend: Backend, meters: Meters) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Every index shard answers; 503 until then."""
        state = await backend.ready()
        response.status_code = 200 if state.ready else 503
        return state

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics of this replica: its own, and clip-retrieval's."""
        return Response(meters.text() + backend.timings.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": PAGE_POLICY})

    app.mount("/page", StaticFiles(directory=PAGE))


async def _index_of(backend: Backend, name: str | None, modality: str | None) -> str | None:
    """The index to ask: the named one, or the first one with rows of a modality."""
    if modality is None:
        return name
    indices = await backend.indices()
    if name is None:
        found = next((info.name for info in indices if info.modality == modality), None)
        if found is None:
            raise ApiError(404, "unknown_index", f"no index holds {modality} embeddings", "see /v1/indices")
        return found
    if any(info.name == name and info.modality != modality for info in indices):
        raise ApiError(400, "wrong_modality", f"the index holds no {modality} embeddings", "see /v1/indices")
    return name


async def _parse_search(request: Request) -> tuple[SearchRequest, list[bytes]]:
    return await _parse(request, SearchRequest)


async def _parse_similarity(request: Request) -> tuple[SimilarityRequest, list[bytes]]:
    return await _parse(request, SimilarityRequest)


async def _parse_zero_shot(request: Request) -> tuple[ZeroShotRequest, list[bytes]]:
    return await _parse(request, ZeroShotRequest)


async def _parse(request: Request, model: type[Body]) -> tuple[Body, list[bytes]]:
    """Read a JSON or multipart body into a model and the uploaded files."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        try:
            return await _parse_form(request, model)
        except pydantic.ValidationError as error:
            raise refusal(error) from None
    return parse_json(await request.body(), model), []


async def _parse_form(request: Request, model: type[Body]) -> tuple[Body, list[bytes]]:
    values: dict[str, Any] = {}
    files: list[bytes] = []
    async with request.form(max_files=100, max_fields=5000) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append(await value.read())
            elif name in ("classes", "templates"):  # repeated fields
                values.setdefault(name, []).append(value)
            else:
                values[name] = value
    return model.model_validate(values), files


def _best(similarities: np.ndarray, classes: list[str], top: int) -> list[ClassScore]:
    logits = LOGIT_SCALE * similarities.astype(np.float64)
    weights = np.exp(logits - logits.max())
    order = np.argsort(-similarities, kind="stable")[:top]
    return [
        ClassScore(label=classes[i], probability=float(weights[i] / weights.sum()), similarity=float(similarities[i]))
        for i in order
    ]


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 503 else None
        return JSONResponse(error.as_dict(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        body = ApiError(error.status_code, code, str(error.detail), "see /docs").as_dict()
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        return JSONResponse(ApiError(400, "invalid_request", f"{where}: {first['msg']}", "see /docs").as_dict(), 400)

    @app.exception_handler(ClipgapError)
    async def damaged(request: Request, error: ClipgapError) -> JSONResponse:
        # Its message may name paths of the server: that is for the log.
        logger.error("request %s failed: %s", request.scope.get("request_id"), error)
        body = ApiError(503, "unavailable", "the index or its metadata cannot be read now").as_dict()
        return JSONResponse(body, 503, {"retry-after": "5"})

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("request %s failed", request.scope.get("request_id"), exc_info=error)
        return JSONResponse(ApiError(500, "internal", "an error of the server, see its log").as_dict(), 500)
