"""Settings of `query` and `swap`: the commands that talk to a service which runs somewhere."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pyarrow as pa
import pydantic
import tyro

from clipgap_ray import schema
from clipgap_ray.config.base import Settings
from clipgap_ray.errors import ConfigError

CONDITION = re.compile(r"(?P<name>[A-Za-z_0-9]+)\s*(?P<sign>>=|<=|=)\s*(?P<value>.+)\Z", re.S)
EXAMPLE = "for example 'width>=512', 'class_name=cat|dog' or 'split=gap-sketch'"
KINDS = ("text", "image", "vector", "uid")


class _Asking(Settings):
    url: str = "http://127.0.0.1:8000"
    """Address of the service. Its bearer token comes from the environment, never from a flag."""

    @pydantic.field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        if not re.match(r"https?://[^/\s]+", value):
            raise ConfigError(f"--url {value!r} is no address of a service", hint="for example http://127.0.0.1:8000")
        return value.rstrip("/")


class QuerySettings(_Asking):
    """Ask a running service for the nearest rows of a text, an image file, a vector or a sample of its index.

    Its token is read from CLIPGAP_TOKEN, or from the file that CLIPGAP_TOKEN_FILE names."""

    text: str = ""
    """Words to search for."""
    image: str = ""
    """An image file."""
    vector: str = ""
    """An .npy file with one embedding, (d,), or with a batch of them, (n, d)."""
    uid: str = ""
    """A sample of the index, 32 hex characters."""
    k: pydantic.PositiveInt = 10
    """Neighbours per query."""
    index: str = ""
    """Which index; empty: the service's first one."""
    modality: Literal["", "image", "text"] = ""
    """Ask the first index of images, or of captions, where the service has both."""
    filter: tuple[str, ...] = ()
    """Conditions that every neighbour fulfils: `width>=512`, `clip_score<=0.3`, `class_name=cat|dog`, `split=NAME`."""
    collapse: float | None = None
    """Show near duplicates once: leave out a neighbour at least so alike (0 to 1) to a nearer one."""
    retry_s: pydantic.NonNegativeFloat = 10.0
    """Seconds in which the question is asked again while the service has no room for it or loses it; 0: ask once."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the service's answer as JSON instead of a table."""

    @pydantic.model_validator(mode="after")
    def _one_query(self) -> QuerySettings:
        given = [f"--{kind}" for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ConfigError(
                f"the query is {' and '.join(given) or 'not there'}: expected exactly one of --text, --image, "
                "--vector, --uid",
                hint='clipgap query --text "a red bird"',
            )
        read_conditions(self.filter)
        return self


class SwapCommand(_Asking):
    """Put another version of an index in place of the one that a running service answers from; waits until it is done.

    The admin's token is read from CLIPGAP_ADMIN_TOKEN, or from the file that CLIPGAP_ADMIN_TOKEN_FILE names."""

    name: tyro.conf.Positional[str]
    """Name of an index of the service."""
    version: tyro.conf.Positional[str] = ""
    """Folder of the new version, as the service's nodes see it; left out: the folder served now, built anew."""
    timeout_s: pydantic.PositiveFloat = 600.0
    """Seconds to wait; the swap itself goes on."""


def read_conditions(filters: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return conditions as `/v1/search` takes them.

    Args:
        filters: `column=value`, `column=one|other`, `column>=number`, `column<=number`, `split=name`.

    Raises:
        ConfigError: If one is no condition, or a number is expected and not there. Which columns and splits there are
            the service knows.
    """
    return [_read_condition(text) for text in filters]


def _read_condition(text: str) -> dict[str, Any]:
    match = CONDITION.match(text.strip())
    if match is None:
        raise ConfigError(f"--filter {text!r} is no condition", hint=EXAMPLE)
    name, sign, value = match.groups()
    if name == "split":
        if sign != "=":
            raise ConfigError(f"--filter {text!r}: a split keeps a row or does not", hint="split=NAME")
        return {"split": value}
    if sign != "=":
        return {"column": name, "at_least" if sign == ">=" else "at_most": _number(text, value)}
    values = [_value(text, name, one) for one in value.split("|")]
    return {"column": name, "equals": values[0]} if len(values) == 1 else {"column": name, "any_of": values}


def _value(text: str, name: str, one: str) -> str | float:
    """A value of a column; of one that only the service knows, a number where it reads as one."""
    known = name in schema.METADATA.names
    if known and pa.types.is_string(schema.METADATA.field(name).type):
        return one
    try:
        return _number(text, one)
    except ConfigError:
        if known:
            raise
        return one


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--filter {text!r}: {value!r} is no number", hint=EXAMPLE) from None
