"""From what a stranger sent to queries that are safe to compute: every limit is checked here, before any work."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pydantic
from PIL import Image

from clipgap_ray.schema import UID_TEXT
from clipgap_ray.serving.messages import (
    ApiError,
    Limits,
    QueryFields,
    SearchRequest,
    SimilarityRequest,
    ZeroShotRequest,
)

# Pillow also opens formats that start other programs (EPS) or are containers; these decode in the process.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
UNIT_TOLERANCE = 2.0**-10  # rounding a unit row to float16 changes its norm by up to half of this
KINDS = ("text", "image", "vector", "uid", "image_url")

Body = TypeVar("Body", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class Query:
    """A checked query: exactly one field is set.

    Attributes:
        text: Words.
        image: Bytes of an image file of a known format, within the limits.
        vector: (d,) float32, unit norm.
        uid: 32 hex characters in lower case.
        image_url: Where an image lies, not looked at yet (`fetch`).
    """

    text: str | None = None
    image: bytes | None = None
    vector: np.ndarray | None = None
    uid: str | None = None
    image_url: str | None = None


def parse_json(body: bytes, model: type[Body]) -> Body:
    """Read a JSON body, whatever content type it was sent with: some clients name none.

    Raises:
        ApiError: 400, naming the field; the body is not echoed.
    """
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise refusal(error) from None


def refusal(error: pydantic.ValidationError) -> ApiError:
    """Return what a stranger is told about a body that is no request."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(step) for step in first["loc"]) or "body"
    return ApiError(400, "invalid_request", f"{where[:100]}: {first['msg'][:200]}", "see /docs")


def read_search(
    request: SearchRequest | SimilarityRequest, limits: Limits, uploads: Sequence[bytes] = ()
) -> list[Query]:
    """Check a search or similarity request.

    Args:
        request: The parsed body.
        limits: What is allowed.
        uploads: Image files of a multipart request.

    Returns:
        At least one query.

    Raises:
        ApiError: 400 or 413, naming what is wrong.
    """
    if request.k > limits.k:
        raise ApiError(400, "k_too_large", f"k is {request.k}, at most {limits.k} is allowed")
    own = any(getattr(request, kind) is not None for kind in KINDS)
    if own + (request.queries is not None) + bool(uploads) != 1:
        raise ApiError(
            400,
            "invalid_query",
            "expected exactly one of: a query in the request, `queries`, or an uploaded image",
            'for example {"text": "a red bird", "k": 5}',
        )
    fields = request.queries if request.queries is not None else [request] if own else []
    _check_batch(len(fields) + len(uploads), limits)
    return [_read_query(query, limits) for query in fields] + [
        Query(image=check_image(data, limits)) for data in uploads
    ]


def read_zero_shot(request: ZeroShotRequest, limits: Limits, uploads: Sequence[bytes] = ()) -> list[bytes]:
    """Check a zero-shot request and return its image files.

    Raises:
        ApiError: 400 or 413, naming what is wrong.
    """
    encoded = request.images if request.images is not None else [request.image] if request.image is not None else []
    if (request.image is not None) + (request.images is not None) + bool(uploads) != 1:
        raise ApiError(400, "invalid_query", "expected exactly one of: `image`, `images`, or an uploaded image")
    _check_batch(len(encoded) + len(uploads), limits)
    prompts = len(request.classes) * len(request.templates)
    if len(request.classes) > limits.classes or prompts > limits.prompts:
        raise ApiError(
            400,
            "too_many_classes",
            f"{len(request.classes)} classes x {len(request.templates)} templates: at most {limits.classes} classes "
            f"and {limits.prompts} prompts are allowed",
        )
    for name in request.classes:
        _check_text(name, limits, "a class name")
    for template in request.templates:
        _check_text(template, limits, "a template")
        if "{}" not in template:
            raise ApiError(400, "invalid_template", "a template has no {} for the class name", 'for example "a {}."')
    return [check_image(_from_base64(image), limits) for image in encoded] + [check_image(d, limits) for d in uploads]


def _check_batch(count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.batch:
        raise ApiError(400, "batch_size", f"the request holds {count} queries, 1 to {limits.batch} are allowed")


def _read_query(query: QueryFields, limits: Limits) -> Query:
    given = [kind for kind in KINDS if getattr(query, kind) is not None]
    if len(given) != 1:
        raise ApiError(400, "invalid_query", f"a query gives {given or 'nothing'}: expected exactly one of {KINDS}")
    if query.text is not None:
        return Query(text=_check_text(query.text, limits, "text"))
    if query.image is not None:
        return Query(image=check_image(_from_base64(query.image), limits))
    if query.vector is not None:
        return Query(vector=_check_vector(query.vector))
    if query.uid is not None:
        if not UID_TEXT.match(query.uid):
            raise ApiError(400, "invalid_uid", "uid is not 32 hex characters")
        return Query(uid=query.uid.lower())
    if limits.image_url:
        return Query(image_url=query.image_url)
    raise ApiError(
        400, "image_url_off", "image_url is not allowed on this server", "send the image itself: base64 or multipart"
    )


def _check_text(text: str, limits: Limits, what: str) -> str:
    if not text.strip():
        raise ApiError(400, "empty_text", f"{what} is empty")
    if len(text) > limits.text_chars:
        raise ApiError(400, "text_too_long", f"{what} has {len(text)} characters, {limits.text_chars} are allowed")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ApiError(400, "invalid_text", f"{what} holds half of a surrogate pair: not Unicode text")
    return text


def _check_vector(vector: list[float]) -> np.ndarray:
    """Scale to unit norm, in two steps so that nothing overflows; rows that are unit rows already stay as they are."""
    row = np.asarray(vector, np.float64)
    if not row.any():
        raise ApiError(400, "zero_vector", "vector is empty or all zeros: it has no direction")
    scaled = row / np.abs(row).max()
    norm = float(np.linalg.norm(scaled))
    if abs(norm * np.abs(row).max() - 1) <= UNIT_TOLERANCE:
        return row.astype(np.float32)
    return (scaled / norm).astype(np.float32)


def _from_base64(text: str) -> bytes:
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_base64", "image is not base64", "encode the bytes of the image file") from None


def check_image(data: bytes, limits: Limits) -> bytes:
    """Look at an image's header without decompressing it.

    Raises:
        ApiError: 400 for no image of a known format, 413 for too many pixels or too long a side.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
                width, height = picture.size
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise ApiError(400, "broken_image", f"{len(data)} bytes are no image of {', '.join(IMAGE_FORMATS)}") from None
    if width * height > limits.image_pixels:
        raise ApiError(
            413, "image_too_large", f"the image has {width}x{height} pixels, {limits.image_pixels} are allowed"
        )
    if max(width, height) > limits.aspect * max(1, min(width, height)):
        raise ApiError(400, "image_too_long", f"the image is {width}x{height}: sides may differ {limits.aspect:g}-fold")
    return data
