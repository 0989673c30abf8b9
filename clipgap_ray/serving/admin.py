"""Routes for whoever runs the service, behind a key of their own: put another version of an index in place.

They exist only when there is an admin key. The read-only key opens none of them; the admin key opens all routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import pydantic
from fastapi import FastAPI, Request

from clipgap_ray.serving.inputs import parse_json
from clipgap_ray.serving.messages import Strict
from clipgap_ray.serving.openapi import described

PREFIX = "/v1/admin"


class SwapRequest(Strict):
    """Which index gets which version."""

    index: str = pydantic.Field(max_length=200)
    """Name of an index of the service."""
    uri: str | None = pydantic.Field(default=None, max_length=2000)
    """Folder of the new version, as the service's nodes see it; default: the folder served now, built anew."""


class SwapState(pydantic.BaseModel):
    """Where the last swap stands."""

    state: Literal["none", "loading", "flipping", "draining", "done", "failed"] = "none"
    """`loading`: the new shards start beside the old ones; `flipping`: gateways change over; `draining`: the old
    shards answer what is under way; `failed`: the old version answers on."""
    index: str | None = None
    version_before: str | None = None
    version_after: str | None = None
    message: str | None = None
    """Why it failed."""

    @property
    def is_over(self) -> bool:
        """Whether another one may begin."""
        return self.state in ("none", "done", "failed")


class Operator(Protocol):
    """What carries swaps out."""

    async def swap(self, index: str, uri: str | None) -> SwapState:
        """Begin one; ApiError 404 for an unknown index, 400 for a folder that cannot be served, 409 during another."""
        ...

    async def swap_state(self) -> SwapState:
        """Return where the last one stands."""
        ...


@dataclass(frozen=True)
class Admin:
    """The key's `guard.token_sha256`, and who does what its holder asks for."""

    key_hash: str
    operator: Operator


BODIES = (SwapRequest,)


def add_routes(app: FastAPI, operator: Operator) -> None:
    """Add the routes to an application; `guard.Guard` keeps strangers out."""

    @app.post(f"{PREFIX}/swap", status_code=202, openapi_extra=described("SwapRequest"))
    async def swap(request: Request) -> SwapState:
        """Load a version of an index beside the one that answers, change over, let the old one go."""
        asked = parse_json(await request.body(), SwapRequest)
        return await operator.swap(asked.index, asked.uri)

    @app.get(f"{PREFIX}/swap")
    async def swap_state() -> SwapState:
        """Where the last swap stands."""
        return await operator.swap_state()
