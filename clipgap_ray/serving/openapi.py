"""Bodies that the routes parse themselves, in the OpenAPI document: FastAPI cannot know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic
from fastapi import FastAPI


def described(name: str, uploads: bool = False) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a body of the model of this name, in a form with files too if allowed."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    if uploads:
        form = {
            "type": "object",
            "description": f"The fields of {name}, and files",
            "properties": {"file": {"type": "string", "format": "binary"}},
        }
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}


def describe_bodies(app: FastAPI, models: Sequence[type[pydantic.BaseModel]]) -> None:
    """Add the models to an application's OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
