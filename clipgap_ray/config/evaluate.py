"""Settings of `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError

PER_TEST = ("classnames", "templates", "mask", "class_map", "crop", "expect", "metric", "candidates", "predictions")


class EvaluateSettings(Settings):
    """Accuracy of a model on test sets, with every prediction kept: zero-shot, by logits, or from features."""

    model: str
    """open_clip model; torchvision:NAME or timm:NAME for classifiers; with --predictions any name."""
    pretrained: str = ""
    """Tag, checkpoint file, or run directory of `clipgap train`; not with --predictions."""
    test: tuple[str, ...]
    """Test sets, NAME=DIR."""
    out: str
    """Directory: OUT/<test>.json, OUT/<test>.parquet, eval_results.jsonl."""
    task: Literal["zeroshot", "linear-probe", "retrieval"] = "zeroshot"
    """zeroshot: by prompts, or by a classifier's logits; linear-probe: logistic regression on the features of the set's
    train split; retrieval: captions to images and back."""
    shots: tuple[pydantic.PositiveInt, ...] = ()
    """With linear-probe: training images per class (1 2 4 8 16), each a result of its own; none: all of them."""
    seed: int = 0
    """Which images are the shots."""
    batch_size: Annotated[pydantic.PositiveInt, Operational()] = 256
    """Images per forward pass."""
    crop_border: int = 0
    """Pixels to cut from every side first (ObjectNet's red border: 2); the same as for `embed`."""
    crop: tuple[str, ...] = ()
    """The same for one test set: NAME=PIXELS."""
    classnames: tuple[str, ...] = ()
    """NAME=FILE (one class name per line, in the order of the labels) or NAME=imagenet (open_clip's 1000 names)."""
    templates: tuple[str, ...] = ()
    """NAME=FILE (one prompt per line, {c} for the class), NAME=openai (ImageNet's 80) or NAME=simple (7 of them)."""
    mask: tuple[str, ...] = ()
    """NAME=FILE: only these classes are candidates, by name or index, one per line (ImageNet-R and -A: 200)."""
    class_map: tuple[str, ...] = ()
    """NAME=FILE.json: {class name: [indices of a classifier's outputs]}; the largest counts (ObjectNet's 113)."""
    expect: tuple[str, ...] = ()
    """NAME=BENCHMARK: refuse a folder that does not have that benchmark's classes and images (imagenet-r, ...)."""
    metric: tuple[str, ...] = ()
    """NAME=METRIC: the main metric, acc1 or mean_per_class_recall; else what is customary for the folder's name."""
    candidates_k: pydantic.NonNegativeInt = 0
    """Also classify each image among the K labels that this model finds most alike its class (CounterAnimal: 20); the
    lists are written to OUT/<test>.candidates.json."""
    candidates: tuple[str, ...] = ()
    """NAME=FILE: the same among the lists of such a file, as another model made it."""
    predictions: tuple[str, ...] = ()
    """NAME=FILE: score a table (csv or parquet) of `uid` or `key` and `prediction` instead of running a model."""
    train: tuple[str, ...] = ()
    """With linear-probe: NAME=DIR of the training images, if they are not the set's own train split."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""
    decoders: Annotated[pydantic.PositiveInt, Operational()] = 2
    """Threads that decode while the model works."""
    limits: Limits = LimitsSettings()
    """When to stop."""

    @pydantic.field_validator("test")
    @classmethod
    def _tests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ConfigError("--test names no test set", hint="for example --test val=world/tests/val")
        schema.named(value, "--test")
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> EvaluateSettings:
        known = set(schema.named(self.test, "--test"))
        for field in (*PER_TEST, "train"):
            flag = f"--{field.replace('_', '-')}"
            unknown = sorted(set(schema.named(getattr(self, field), flag)) - known)
            if unknown:
                raise ConfigError(f"{flag} {unknown[0]}=...: no --test is named {unknown[0]!r}")
        if not self.pretrained and set(schema.named(self.predictions, "--predictions")) != known:
            raise ConfigError("--pretrained is required unless every --test has its --predictions")
        if (self.shots or self.train) and self.task != "linear-probe":
            raise ConfigError("--shots and --train are for --task linear-probe")
        for name, word in schema.named(self.crop, "--crop").items():
            if not word.isdigit():
                raise ConfigError(f"--crop {name}={word}: expected a number of pixels")
        for name, word in schema.named(self.metric, "--metric").items():
            if word not in ("acc1", "mean_per_class_recall"):
                raise ConfigError(f"--metric {name}={word}: expected acc1 or mean_per_class_recall")
        return self

    def of(self, field: str, test: str) -> str:
        """Return what a NAME=VALUE setting says of a test set; empty if nothing."""
        return schema.named(getattr(self, field), f"--{field}").get(test, "")
