"""Settings of `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError


class EvaluateSettings(Settings):
    """Zero-shot (or supervised) accuracy of a model on test sets, with every prediction kept."""

    model: str
    """open_clip model name."""
    pretrained: str
    """Tag, checkpoint file, or run directory of `clipgap train`."""
    test: tuple[str, ...]
    """Test sets, NAME=DIR."""
    out: str
    """Directory: OUT/<test>.json, OUT/<test>.parquet, eval_results.jsonl."""
    batch_size: Annotated[pydantic.PositiveInt, Operational()] = 256
    """Images per forward pass."""
    crop_border: int = 0
    """Pixels to cut from every side first (ObjectNet's red border: 2); the same as for `embed`."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""

    @pydantic.field_validator("test")
    @classmethod
    def _tests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ConfigError("--test names no test set", hint="for example --test val=world/tests/val")
        schema.named(value, "--test")
        return value
