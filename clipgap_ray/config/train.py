"""Settings of `train` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.errors import ConfigError


class TrainSettings(Settings):
    """Train CLIP on a source or a split of it, straight from the original shards; or a classifier on labelled data."""

    source: str
    """Tars, parquet of images or folders, or a labelled set; as for `embed`."""
    out: str
    """Run directory; running again resumes it."""
    model: str
    """open_clip model name (its image tower alone under `--objective supervised`)."""
    split: str = ""
    """NAME.npy: train on these uids only (the virtual split: shards are read where they are)."""
    reference: str = ""
    """Labelled set to mix in, captioned with its first template ("a photo of a {class}")."""
    objective: Literal["clip", "supervised"] = "clip"
    """clip: contrastive on image-text pairs; supervised: classify the labels of the source."""
    num_samples: pydantic.PositiveInt = 100_000
    """Samples seen in all; a source with fewer is seen in several epochs."""
    batch_size: pydantic.PositiveInt = 64
    """Samples per worker and step."""
    lr: pydantic.PositiveFloat = 1e-3
    """Peak learning rate (open_clip's ViT default is 5e-4)."""
    warmup: pydantic.NonNegativeInt = 50
    """Steps of linear warm-up; a cosine follows."""
    wd: pydantic.NonNegativeFloat = 0.2
    """Weight decay, not applied to gains and biases."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.98
    """AdamW."""
    eps: float = 1e-6
    """AdamW."""
    seed: int = 0
    """Seed of initial weights, sample order and augmentation."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image (open_clip's default)."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """amp_bf16: bfloat16 autocast."""
    workers: pydantic.NonNegativeInt = 2
    """DDP workers. Part of the run: batch statistics depend on it. 0 trains in this process (for tests)."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""
    window: pydantic.PositiveInt = 50_000
    """Samples that are shuffled together."""
    samples: Annotated[str, Operational()] = ""
    """Directory of the sample index of `source`, to share between runs; default RUN/samples."""
    checkpoint_every: Annotated[pydantic.PositiveInt, Operational()] = 200
    """Steps between checkpoints."""


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
