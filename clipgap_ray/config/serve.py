"""Settings of `serve`."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError

TOKEN_VARIABLE = "CLIPGAP_TOKEN"


class ServeSettings(Settings):
    """Serve indexes over HTTP: search, zero-shot, health, metrics."""

    index: tuple[str, ...]
    """Indexes, NAME=INDEX, separated by blanks; the first one answers when a request names none."""
    model: str = ""
    """open_clip model that encodes the queries; empty = the one that made the first index."""
    pretrained: str = ""
    """Its tag, checkpoint file, or run directory of `clipgap train`."""
    scores: str = ""
    """Output of `clipgap score` on the same pool, for /v1/similarity: test sets, thresholds, percentiles."""
    splits: tuple[str, ...] = ()
    """Splits NAME.npy cut from these scores; /v1/similarity says which of them would drop an image."""
    blocklist: str = ""
    """Takedown list, as for `embed`: its samples are in no answer, as neighbour or thumbnail."""
    hide: tuple[str, ...] = ()
    """Rules over the metadata that do the same: `caption~REGEX`, `clip_score<0.1`."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a bearer token in the environment variable CLIPGAP_TOKEN."""
    port: Annotated[int, pydantic.Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    max_k: pydantic.PositiveInt = 1000
    """Most neighbours per query."""
    max_batch: pydantic.PositiveInt = 64
    """Most queries per request."""
    max_body_mb: pydantic.PositiveFloat = 16.0
    """Largest request in megabytes."""
    max_image_megapixels: pydantic.PositiveFloat = 32.0
    """Largest image, in megapixels after decompression."""
    image_url: bool = False
    """Allow images by address in queries: http and https, public addresses only, no larger than a request may be."""
    image_url_timeout_s: Annotated[pydantic.PositiveFloat, Operational()] = 5.0
    """Seconds to wait for all images that a request gives by address."""
    shard_timeout_s: Annotated[pydantic.PositiveFloat, Operational()] = 5.0
    """An index shard that takes longer is left out; the answer says `degraded`."""
    replicas: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Replicas of every index shard."""

    @pydantic.field_validator("index")
    @classmethod
    def _indexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ConfigError("--index names no index", hint="for example --index pool=out/index")
        schema.named(value, "--index")
        return value

    @pydantic.model_validator(mode="after")
    def _splits_need_scores(self) -> ServeSettings:
        if self.splits and not self.scores:
            raise ConfigError(
                f"--splits {' '.join(self.splits)} needs --scores", hint="the score run they were cut from"
            )
        return self

    @property
    def is_public(self) -> bool:
        """True when the address can be reached from other machines."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"
