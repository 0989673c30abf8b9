"""Settings of `serve`."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import re
from typing import Annotated

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError

TOKEN_VARIABLE = "CLIPGAP_TOKEN"
ADMIN_VARIABLE = "CLIPGAP_ADMIN_TOKEN"
ORIGIN = re.compile(r"https?://[^/\s*@]+\Z")


def read_token(variable: str) -> str:
    """Return a bearer token from an environment variable, or from the file that <variable>_FILE names; "" for none.

    Never from a flag: other users of the machine see the flags of a process.

    Raises:
        ConfigError: If the file cannot be read or is empty.
    """
    path = os.environ.get(f"{variable}_FILE", "")
    if not path:
        return os.environ.get(variable, "").strip()
    try:
        token = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{variable}_FILE: {path} cannot be read: {error}", hint="a text file with one token"
        ) from None
    if not token:
        raise ConfigError(f"{variable}_FILE: {path} is empty", hint=f"openssl rand -hex 32 > {path}")
    return token


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
    origins: tuple[str, ...] = ()
    """Web pages of which origins may ask from a browser, such as clip-retrieval's front: `https://my.site`, or `*` for
    all (CORS). None: only the service's own page."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a bearer token in the environment variable CLIPGAP_TOKEN,
    or in the file that CLIPGAP_TOKEN_FILE names."""
    port: Annotated[int, pydantic.Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    haproxy: Annotated[bool, Operational()] = True
    """Use the fast proxy that Ray brings (HAProxy) and Ray Serve's switches for throughput: several times more requests
    per second. Its statistics and metrics listen on all interfaces (8404 and 9101, printed at start); --no-haproxy
    opens neither. Where Ray runs already, the nodes' environment decides (docs/cluster.md)."""
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
    access_log: Annotated[bool, Operational()] = False
    """Write a line of JSON per request to the gateway's log: id, method, route, status, milliseconds; never what was
    asked."""
    shard_timeout_s: Annotated[pydantic.PositiveFloat, Operational()] = 5.0
    """An index shard that takes longer is left out; the answer says `degraded`."""
    gateways: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Replicas of the gateway, which answers HTTP: with 2, losing one fails only the requests it was answering."""
    replicas: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Replicas of every index shard."""
    encoder_min_replicas: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Replicas of the encoder that are always there."""
    encoder_max_replicas: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Replicas of the encoder under load: one more comes whenever more requests wait than it encodes at once, and goes
    when they do not. They need a quarter of a CPU each, and the GPUs of --encoder-gpus."""
    encoder_gpus: Annotated[float, pydantic.Field(ge=0, le=8), Operational()] = 0.0
    """GPUs per replica of the encoder: 0 encodes on CPUs, 0.25 lets four replicas, or other work, share a GPU."""

    @pydantic.field_validator("index")
    @classmethod
    def _indexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ConfigError("--index names no index", hint="for example --index pool=out/index")
        schema.named(value, "--index")
        return value

    @pydantic.field_validator("origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not ORIGIN.match(origin):
                raise ConfigError(
                    f"--origins {origin!r} is no origin of web pages", hint="scheme, host and port: https://my.site"
                )
        return value

    @pydantic.model_validator(mode="after")
    def _splits_need_scores(self) -> ServeSettings:
        if self.splits and not self.scores:
            raise ConfigError(
                f"--splits {' '.join(self.splits)} needs --scores", hint="the score run they were cut from"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _some_encoders(self) -> ServeSettings:
        if self.encoder_max_replicas < self.encoder_min_replicas:
            raise ConfigError(
                f"--encoder-max-replicas {self.encoder_max_replicas} is less than --encoder-min-replicas "
                f"{self.encoder_min_replicas}",
                hint="the same number for both keeps the number fixed",
            )
        if self.encoder_gpus > 1 and self.encoder_gpus != int(self.encoder_gpus):
            raise ConfigError(
                f"--encoder-gpus {self.encoder_gpus:g}: above 1 Ray knows whole GPUs only", hint="for example 0.5 or 1"
            )
        return self

    @property
    def is_public(self) -> bool:
        """True when the address can be reached from other machines."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"
