"""clip-retrieval's own routes, so that its Python client and its web front work unchanged (docs/serve.md).

Names, absent-by-empty-string and the raw body are its conventions. What this service has no model for (safety,
violence, aesthetics, multilingual texts) is accepted and does nothing; what must not be shown is left out by
`--blocklist` and `--hide` whatever a client asks for.

Its front is a folder of static files that whoever wants it hosts: all it asks a back end for are the routes here. It
asks for the ids of 3,000 rows, shows 40, and fetches the others' metadata, pictures included, as a user scrolls.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from clipgap_ray.serving.contracts import Backend
from clipgap_ray.serving.fetch import Fetcher
from clipgap_ray.serving.guard import Meters
from clipgap_ray.serving.inputs import parse_json, read_search
from clipgap_ray.serving.messages import ApiError, Finite, IndexInfo, Limits, Neighbour, SearchRequest
from clipgap_ray.serving.openapi import described

DUPLICATE = 0.94  # cosine from which its back end takes two results for the same image
DEGRADED = "x-clipgap-degraded"
MOST_IMAGES = 100  # thumbnails in one answer
PICTURES_AT_ONCE = 8  # per request: other requests read through the same threads
ROUTES = ("/config.json", "/indices-list", "/knn-service", "/metadata", "/metrics-summary")


class KnnRequest(pydantic.BaseModel):
    """The body of /knn-service; unknown fields are ignored, as there."""

    model_config = pydantic.ConfigDict(use_attribute_docstrings=True)

    text: str | None = None
    image: str | None = None
    """An image file, base64."""
    image_url: str | None = None
    embedding_input: list[Finite] | None = None
    modality: Literal["image", "text"]
    num_images: int = pydantic.Field(ge=1)
    """Rows to describe, the nearest ones."""
    num_result_ids: int | None = pydantic.Field(default=None, ge=1)
    """Rows to return; default: `num_images`. Up to the service's limit: its front asks for 3,000 whatever that is."""
    indice_name: str
    deduplicate: bool = False

    @pydantic.field_validator("text", "image", "image_url", "embedding_input", mode="before")
    @classmethod
    def _empty_is_absent(cls, value: Any) -> Any:
        return value or None


class MetadataRequest(pydantic.BaseModel):
    """The body of /metadata."""

    indice_name: str
    ids: list[Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]] = pydantic.Field(max_length=10_000)


BODIES = (KnnRequest, MetadataRequest)


def add_routes(app: FastAPI, backend: Backend, limits: Limits, meters: Meters, fetcher: Fetcher) -> None:
    """Add `ROUTES` to an application."""

    @app.get("/config.json")
    async def config() -> dict[str, str]:
        """What its front fetches beside itself: for one that a proxy shows at this service's own address."""
        return {"defaultBackend": "", "defaultIndex": "", "urlColumn": "url"}

    @app.get("/metrics-summary", response_class=PlainTextResponse)
    async def metrics_summary() -> str:
        """Where the time of searches goes, as a table for people."""
        return backend.timings.summary()

    @app.get("/indices-list")
    async def indices_list() -> list[str]:
        """Names of the indexes."""
        return [info.name for info in await backend.indices()]

    @app.post("/knn-service", openapi_extra=described("KnnRequest"))
    async def knn_service(request: Request, response: Response) -> list[dict[str, Any]]:
        """Nearest rows of one query; rows past `num_images` have only id and similarity.

        Where a shard did not answer, neighbours may be missing: its list has no room for that, a header says it.
        """
        asked = parse_json(await request.body(), KnnRequest)
        _check_modality(asked, await backend.indices())
        query = SearchRequest(
            text=asked.text, image=asked.image, image_url=asked.image_url, vector=asked.embedding_input,
            k=_rows_to_find(asked, limits), index=asked.indice_name,
            collapse=DUPLICATE if asked.deduplicate else None,
        )  # fmt: skip
        queries = await fetcher.fill(read_search(query, limits), backend.timings)
        found = await backend.search(query.index, queries, query.k, query.collapse)
        if found.answer.degraded:
            meters.degraded.inc()
            response.headers[DEGRADED] = "true"
        (near,) = found.neighbours
        top = [(row.row_id, {**_facts(row.model_dump()), **_short(row)}) for row in near[: asked.num_images]]
        rows = await _with_pictures(top, backend, found.info)
        return [*rows, *(_short(row) for row in near[asked.num_images :])]

    @app.post("/metadata", openapi_extra=described("MetadataRequest"))
    async def metadata(request: Request) -> list[dict[str, Any]]:
        """Metadata of rows by id; unknown and hidden rows are left out."""
        asked = parse_json(await request.body(), MetadataRequest)
        info = next((info for info in await backend.indices() if info.name == asked.indice_name), None)
        rows = await backend.describe(asked.indice_name, asked.ids)  # refuses an unknown index
        known = [(row_id, _facts(facts)) for row_id, facts in zip(asked.ids, rows, strict=True) if facts]
        shown = await _with_pictures(known, backend, info) if info else []
        return [{"id": row_id, "metadata": facts} for (row_id, _), facts in zip(known, shown, strict=True)]


def _check_modality(asked: KnnRequest, indices: list[IndexInfo]) -> None:
    """There an index has images and texts; here it has one of them."""
    named = next((info for info in indices if info.name == asked.indice_name), None)
    if named is None or named.modality == asked.modality:  # an unknown index is refused by the search
        return
    others = [info.name for info in indices if info.modality == asked.modality]
    hint = f"index {' or '.join(others)} holds them" if others else "`clipgap index --modality` builds one that does"
    message = f"index {named.name} holds {named.modality} embeddings, asked for is {asked.modality}"
    raise ApiError(400, "wrong_modality", message, hint)


def _rows_to_find(asked: KnnRequest, limits: Limits) -> int:
    """As many ids as asked for and allowed; descriptions of more rows than allowed are refused with the search."""
    return min(asked.num_result_ids or asked.num_images, max(asked.num_images, limits.k))


def _short(row: Neighbour) -> dict[str, Any]:
    return {"id": row.row_id, "similarity": row.similarity}


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What is known: its front takes a null for an address."""
    return {name: value for name, value in facts.items() if value is not None}


async def _with_pictures(
    rows: list[tuple[int, dict[str, Any]]], backend: Backend, index: IndexInfo
) -> list[dict[str, Any]]:
    """Return the facts of rows; those without an address bring their picture, as from a back end with local images."""
    slots = asyncio.Semaphore(PICTURES_AT_ONCE)

    async def beside(row_id: int, facts: dict[str, Any]) -> dict[str, Any]:
        if facts.get("url"):
            return facts
        async with slots:
            try:
                picture = await backend.thumbnail(index.name, row_id, index.version)
            except ApiError:
                return facts
        return {**facts, "image": base64.b64encode(picture).decode()}

    shown = await asyncio.gather(*(beside(row_id, facts) for row_id, facts in rows[:MOST_IMAGES]))
    return [*shown, *(facts for _, facts in rows[MOST_IMAGES:])]
