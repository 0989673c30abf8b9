"""clip-retrieval's own routes, so that its Python client and its web front work unchanged (peers.md 4.9).

Names, absent-by-empty-string and the raw body are its conventions. What this service has no model for (safety,
violence, aesthetics, multilingual texts) is accepted and does nothing; what must not be shown is left out by
`--blocklist` and `--hide` whatever a client asks for.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import pydantic
from fastapi import FastAPI, Request, Response

from clipgap_ray.serving.contracts import Backend
from clipgap_ray.serving.fetch import Fetcher
from clipgap_ray.serving.guard import Meters
from clipgap_ray.serving.inputs import parse_json, read_search
from clipgap_ray.serving.messages import ApiError, Finite, IndexInfo, Limits, Neighbour, SearchRequest
from clipgap_ray.serving.openapi import described

DUPLICATE = 0.94  # cosine from which its back end takes two results for the same image
DEGRADED = "x-clipgap-degraded"
MOST_IMAGES = 100  # thumbnails in one answer


class KnnRequest(pydantic.BaseModel):
    """The body of /knn-service; unknown fields are ignored, as there."""

    text: str | None = None
    image: str | None = None
    image_url: str | None = None
    embedding_input: list[Finite] | None = None
    modality: Literal["image", "text"]
    num_images: int = pydantic.Field(ge=1)
    num_result_ids: int | None = pydantic.Field(default=None, ge=1)
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
    """Add /indices-list, /knn-service and /metadata to an application."""

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
        info = next((info for info in await backend.indices() if info.name == asked.indice_name), None)
        if info is not None and info.modality != asked.modality:
            raise ApiError(400, "wrong_modality", f"index {info.name} holds {info.modality} embeddings")
        query = SearchRequest(
            text=asked.text, image=asked.image, image_url=asked.image_url, vector=asked.embedding_input,
            k=max(asked.num_images, asked.num_result_ids or 0), index=asked.indice_name,
            collapse=DUPLICATE if asked.deduplicate else None,
        )  # fmt: skip
        queries = await fetcher.fill(read_search(query, limits), backend.timings)
        found = await backend.search(query.index, queries, query.k, query.collapse)
        if found.answer.degraded:
            meters.degraded.inc()
            response.headers[DEGRADED] = "true"
        (near,) = found.neighbours
        return [
            await _described(backend, found.info, row, with_image=at < MOST_IMAGES)
            if at < asked.num_images
            else _short(row)
            for at, row in enumerate(near)
        ]

    @app.post("/metadata", openapi_extra=described("MetadataRequest"))
    async def metadata(request: Request) -> list[dict[str, Any]]:
        """Metadata of rows by id; unknown and hidden rows are left out."""
        asked = parse_json(await request.body(), MetadataRequest)
        rows = await backend.describe(asked.indice_name, asked.ids)
        return [{"id": row_id, "metadata": facts} for row_id, facts in zip(asked.ids, rows, strict=True) if facts]


def _short(row: Neighbour) -> dict[str, Any]:
    return {"id": row.row_id, "similarity": row.similarity}


async def _described(backend: Backend, index: IndexInfo, row: Neighbour, with_image: bool) -> dict[str, Any]:
    """A row with its metadata; without an address its picture comes along, as from a back end with local images."""
    facts = {name: value for name, value in row.model_dump().items() if value is not None}
    described = {**facts, **_short(row)}
    if row.url or not with_image:
        return described
    try:
        picture = await backend.thumbnail(index.name, row.row_id, index.version)
        return {**described, "image": base64.b64encode(picture).decode()}
    except ApiError:
        return described
