"""What travels over HTTP: requests, answers, errors, limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status, 4xx or 503.
        code: For programs, for example `unknown_index`.
        message: What is wrong, with the value and the expectation; no paths of the server.
        hint: The next step.
    """

    def __init__(self, status: int, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        k: Most neighbours per query.
        batch: Most queries or images per request.
        body_bytes: Largest body.
        image_pixels: Largest image after decompression.
        aspect: Longest side over shortest side of an image: resizing the shortest side to the model's size would
            otherwise blow a 1 x 60,000 image up to gigabytes.
        text_chars: Longest text of a query, class name or template.
        classes: Most classes of a zero-shot request.
        prompts: Most classes x templates.
        image_url: Whether images may be given by their address on the internet.
        image_url_s: Most seconds to wait for all images of a request.
        requests: Most requests under way in a gateway; more get 503.
        request_s: Longest that a request may take, its body included.
    """

    k: int = 1000
    batch: int = 64
    body_bytes: int = 16 << 20
    image_pixels: int = 32_000_000
    aspect: float = 50.0
    text_chars: int = 4000
    classes: int = 2000
    prompts: int = 10_000
    image_url: bool = False
    image_url_s: float = 5.0
    requests: int = 256
    request_s: float = 50.0


class Strict(pydantic.BaseModel):
    """Base of requests: unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


class QueryFields(Strict):
    """One query: exactly one of these."""

    text: str | None = None
    """Words to search for."""
    image: str | None = None
    """An image file, base64."""
    vector: list[Finite] | None = None
    """An embedding of the index's dimension; scaled to unit norm unless it is a unit row (within 0.1 %)."""
    uid: str | None = None
    """A sample of the index, 32 hex characters: its own embedding is the query."""
    image_url: str | None = None
    """Address of an image on the internet, where the service allows it (`clipgap serve --image-url`)."""


class ConditionFields(Strict):
    """A condition on the neighbours: a column with a test, or a split."""

    column: str | None = None
    """Of the metadata: caption, width, clip_score, label, group, ..."""
    equals: str | int | Finite | None = None
    """This value."""
    any_of: list[str | int | Finite] | None = pydantic.Field(default=None, min_length=1, max_length=1000)
    """One of these values."""
    at_least: Finite | None = None
    """Not less than this."""
    at_most: Finite | None = None
    """Not more than this."""
    split: str | None = None
    """Kept by this split of the service."""


class SearchRequest(QueryFields):
    """One query in the request itself, or many under `queries`."""

    queries: list[QueryFields] | None = None
    """A batch of queries, answered in order."""
    k: int = pydantic.Field(default=10, ge=1)
    """Neighbours per query."""
    index: str | None = None
    """Which index; default: the first one."""
    modality: Literal["image", "text"] | None = None
    """What its rows are: without `index`, the first index of such rows answers."""
    collapse: float | None = pydantic.Field(default=None, ge=0, le=1)
    """Leave out a neighbour that is at least so alike to a nearer one: near duplicates are shown once."""
    filter: list[ConditionFields] = pydantic.Field(default=[], max_length=20)
    """Only neighbours that fulfil all of these; in a form, as JSON."""

    @pydantic.field_validator("filter", mode="before")
    @classmethod
    def _json_in_a_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            read = json.loads(value)
            json.dumps(read, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return read


class ZeroShotRequest(Strict):
    """Images to classify into classes given here."""

    image: str | None = None
    """An image file, base64."""
    images: list[str] | None = None
    """Or several."""
    classes: list[str] = pydantic.Field(min_length=1)
    """Class names."""
    templates: list[str] = pydantic.Field(default=["a photo of a {}."], min_length=1)
    """Prompts; {} is the class name. A class is the mean of its prompts."""
    top: int = pydantic.Field(default=5, ge=1)
    """Classes to return per image."""


class Neighbour(pydantic.BaseModel):
    """A row of the index that is near a query."""

    row_id: int
    row_id_str: str
    """The same as text: row ids exceed 2**53, where JavaScript rounds."""
    similarity: float
    uid: str | None = None
    caption: str | None = None
    image_path: str | None = None
    shard: str | None = None
    url: str | None = None
    splits: list[str] | None = None
    """The service's splits that keep it; null where the service knows none."""


class SearchResponse(pydantic.BaseModel):
    """Neighbours of every query, most alike first."""

    index: str
    version: str
    """Version of the index that answered."""
    shards: int
    shards_ok: int
    degraded: bool
    """True when an index shard did not answer: neighbours may be missing."""
    results: list[list[Neighbour]]


class SimilarityRequest(QueryFields):
    """One query in the request itself, or many under `queries`."""

    queries: list[QueryFields] | None = None
    """A batch of queries, answered in order."""
    k: int = pydantic.Field(default=5, ge=1)
    """Neighbours to name, in the training set and in each test set."""
    index: str | None = None
    """Which index holds the training set; default: the first one."""


class SetNeighbour(pydantic.BaseModel):
    """A test image near a query; `tau` is its similarity to its nearest reference image."""

    uid: str
    class_name: str = ""
    similarity: float
    tau: float | None = None


class SetCoverage(pydantic.BaseModel):
    """How a query stands to one test set."""

    test: str
    similarity: float | None = None
    """To the nearest test image (m of the paper), exact."""
    margin: float | None = None
    """Largest similarity - tau: above 0 the image lies closer to a test image than the reference does."""
    percentile: float | None = None
    """Share of the test set, in percent, whose nearest training image is less alike than the query's."""
    neighbours: list[SetNeighbour]


class SplitVerdict(pydantic.BaseModel):
    """Whether a split would drop the query if it were in the pool; null where its rule needs more than similarity."""

    name: str
    kind: str
    drops: bool | None = None
    decided_by: str | None = None
    """`list`: the query is a uid of the pool; `rule`: the split's own rule."""


class SimilarityResult(pydantic.BaseModel):
    """Coverage of one query."""

    similarity: float | None = None
    """To the nearest training image, or, for a uid of the index, to the nearest other one."""
    neighbours: list[Neighbour]
    tests: list[SetCoverage]
    splits: list[SplitVerdict]


class SimilarityResponse(pydantic.BaseModel):
    """Coverage of every query by the training set."""

    index: str
    version: str
    shards: int
    shards_ok: int
    degraded: bool
    """True when an index shard did not answer: nearer training images may be missing."""
    results: list[SimilarityResult]


class SplitInfo(pydantic.BaseModel):
    """A split that the service knows."""

    name: str
    kind: str
    tests: list[str]
    pool: int
    kept: int


class SetInfo(pydantic.BaseModel):
    """A test set: how many of its images lie how close to the training set, and to the reference."""

    name: str
    rows: int
    edges: list[float]
    """Edges of the bins of similarity."""
    train: list[int]
    """Test images per bin, by the similarity to their nearest training image."""
    reference: list[int] | None = None
    """The same for the nearest reference image (tau)."""


class SetsResponse(pydantic.BaseModel):
    """The test sets that /v1/similarity compares with."""

    tests: list[SetInfo]


class SplitsResponse(pydantic.BaseModel):
    """The splits that /v1/similarity judges by."""

    splits: list[SplitInfo]


class ClassScore(pydantic.BaseModel):
    """A class with its probability (softmax of 100 x similarity over all classes of the request)."""

    label: str
    probability: float
    similarity: float


class ZeroShotResponse(pydantic.BaseModel):
    """The best classes of every image, best first."""

    results: list[list[ClassScore]]


class IndexInfo(pydantic.BaseModel):
    """An index that is being served."""

    name: str
    version: str
    rows: int
    dim: int
    shards: int
    key: str
    recall_at_10: float | None = None
    modality: str = "image"
    model: str = ""


class IndicesResponse(pydantic.BaseModel):
    """The indexes, the default one first."""

    indices: list[IndexInfo]


class Readiness(pydantic.BaseModel):
    """Whether every index shard and the encoder answer."""

    ready: bool
    shards: int
    shards_ok: int
    encoder_ok: bool


class ErrorBody(pydantic.BaseModel):
    """See `Error`."""

    code: str
    message: str
    hint: str | None = None


class ErrorResponse(pydantic.BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody
