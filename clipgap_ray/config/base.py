"""What every stage's settings share: strictness, a fingerprint, and errors that name the nearest key.

A settings class is the one truth for YAML keys, command-line flags and `--help`; the docstring under a field is
its help text. Fields marked `Operational` (workers, devices, progress) do not change the output: they are free to
differ between a run and its resumption, the others are guarded (`rundir.guard`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self

import pydantic
import tyro
import yaml

from clipgap_ray import filesystems, store
from clipgap_ray.errors import ConfigError
from clipgap_ray.redaction import ADVICE, addresses_with_secrets


class Operational:
    """Marker for `Annotated[type, Operational()]`: the field does not change the output."""


class Later:
    """Marker for `Annotated[type, Later()]`: the field is younger than directories that people have.

    At its default it means what they were written with, so it is left out of the fingerprint.
    """


class Settings(pydantic.BaseModel):
    """Base of all settings: frozen, unknown keys refused, field docstrings as descriptions."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @pydantic.model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name, value in self:
            for shown in addresses_with_secrets(value):
                raise ConfigError(
                    f"{name} is {shown}: a secret in a setting would be shown by Ray and kept in manifests",
                    hint=ADVICE,
                )
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Return the fields that decide the output, as JSON values."""
        without = {
            name
            for name, field in type(self).model_fields.items()
            if any(isinstance(mark, Operational) for mark in field.metadata)
            or (any(isinstance(mark, Later) for mark in field.metadata) and getattr(self, name) == field.default)
        }
        return self.model_dump(mode="json", exclude=without)

    @classmethod
    def load(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate a mapping (a YAML section).

        Args:
            values: Keys and values.
            where: What to name in the error ("studies/miniature.yaml: train").

        Raises:
            ConfigError: On the first wrong key or value, with the value, the expectation and the nearest key.
        """
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise explain(error, cls, where) from None


class StorageSettings(Settings):
    """How S3 stores are reached; what is left out is what s3fs and botocore read (AWS_ENDPOINT_URL, AWS_PROFILE)."""

    endpoint_url: str = ""
    """Address of an S3 server other than AWS, for example http://minio:9000."""
    anonymous: bool = False
    """Do not sign requests: public buckets without an account."""
    profile: str = ""
    """Profile of the AWS configuration; every node needs it."""

    def options(self) -> filesystems.StorageOptions:
        """Return the same as `filesystems` wants it."""
        return filesystems.StorageOptions(self.endpoint_url, self.anonymous, self.profile)


# Flags without a prefix (`--endpoint-url`), in a group of their own at the end of `--help`.
Storage = Annotated[StorageSettings, Operational(), tyro.conf.arg(name="")]


def explain(error: pydantic.ValidationError, settings: type[pydantic.BaseModel], where: str) -> ConfigError:
    """Turn pydantic's report into one line: the key, the value, what was expected, the nearest known key."""
    # An unknown key explains a missing one: it is usually that key, misspelled.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = _fields_at(settings, first["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return ConfigError(f"{where}: unknown setting {path!r}", hint=hint)
    if first["type"] == "missing":
        return ConfigError(f"{where}: setting {path!r} is required")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    return ConfigError(f"{where}: {path} is {first['input']!r}: {first['msg']}")


def _fields_at(settings: type[pydantic.BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the (nested) settings at a path, looking through lists, dicts and optionals."""
    current: Any = settings
    for step in path:
        if isinstance(current, type) and issubclass(current, pydantic.BaseModel) and step in current.model_fields:
            current = _model_in(current.model_fields[str(step)].annotation)
    is_model = isinstance(current, type) and issubclass(current, pydantic.BaseModel)
    return list(current.model_fields) if is_model else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def read_yaml(uri: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: If the file is missing, not YAML, or not a mapping.
    """
    if not store.exists(uri):
        raise ConfigError(f"{uri} does not exist", hint="studies/miniature.yaml is a working example")
    try:
        values = yaml.safe_load(store.read_bytes(uri))
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{uri} holds {type(values).__name__}, expected a mapping of settings")
    return values
