"""Image encoders of timm (`--model timm:vit_small_patch14_dinov2.lvd142m`): a second, non-CLIP notion of similarity.

Images only: a run with captions leaves the text rows out and says so. Weights come from a local file, since what a
study measured must not depend on what a hub serves later; the file's name and the weights' hash are recorded. timm
itself passes over tensors that a checkpoint lacks, which would leave them random; here that is an error.

Preprocessing is timm's evaluation transform (its data config: size, crop_pct, interpolation, mean and std), done by
`pixels.Preprocess`. Of timm's 1,826 pretrained models eleven pad a border or are not square; those are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import pickle
import sys
from typing import Any

import numpy as np

from clipgap_ray.encoder import TIMM, EncoderSettings, fingerprint, in_batches
from clipgap_ray.errors import ConfigError
from clipgap_ray.pixels import Preprocess


def check(settings: EncoderSettings) -> Preprocess:
    """Check model and weights by name, without building the model, and return the preprocessing.

    Raises:
        ConfigError: Unknown model (with the nearest names), no file of weights, or a preprocessing that
            `Preprocess` cannot do.
    """
    config = _data_config(settings.model)
    if settings.pretrained != "random" and not os.path.isfile(settings.pretrained):
        raise ConfigError(
            f"--pretrained {settings.pretrained!r} is no file; {settings.model} needs its weights as a local file",
            hint="timm's weights are on huggingface.co/timm: download model.safetensors and name it",
        )
    _, height, width = config["input_size"]
    mode = {"center": "shortest", "squash": "squash"}.get(config["crop_mode"])
    if height != width or mode is None or config["interpolation"] not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"{settings.model} wants {width} x {height} pixels, crop mode {config['crop_mode']!r}, "
            f"{config['interpolation']}: expected a square, 'center' or 'squash', bicubic or bilinear",
            hint="choose another model",
        )
    scaled = math.floor(width / config["crop_pct"])
    resize_to = scaled if scaled != width else 0
    return Preprocess(width, config["interpolation"], mode, settings.crop_border, resize_to, settings.shrink_to)


def _data_config(model: str) -> dict[str, Any]:
    import timm
    from timm.data import resolve_data_config

    name = model.removeprefix(TIMM)
    try:
        known = timm.is_model(name) and timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture exists, the tag does not
        known = None
    if not known:
        near = difflib.get_close_matches(name, [*timm.list_pretrained(), *timm.list_models()], n=3)
        raise ConfigError(
            f"unknown model {model!r}; nearest names: {', '.join(TIMM + one for one in near) or 'none'}",
            hint="timm.list_pretrained() lists all",
        )
    return dict(resolve_data_config({}, pretrained_cfg=dataclasses.asdict(known)))


class TimmEncoder:
    """A timm model without its classifier, in evaluation mode: pooled features as unit rows."""

    def __init__(self, settings: EncoderSettings) -> None:
        import timm
        import torch

        self.preprocess = check(settings)
        self.settings = settings
        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)  # "random" weights are the same everywhere
        name = settings.model.removeprefix(TIMM)
        model = timm.create_model(name, pretrained=False, num_classes=0)
        if settings.pretrained != "random":
            _load(model, name, settings.pretrained)
        self.model = model.to(settings.device).eval()
        config = _data_config(settings.model)
        self._mean, self._std = (
            torch.tensor(config[key], device=settings.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        size = self.preprocess.size
        with torch.inference_mode():
            self.dim = int(self.model(torch.zeros(1, 3, size, size, device=settings.device)).shape[1])
        self.fingerprint = fingerprint(self.model, settings, self.preprocess, config, self.dim, quick_gelu=False)

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, dim) float32 unit rows, in padded batches."""
        import torch

        def forward(batch: np.ndarray) -> Any:
            tensor = torch.from_numpy(np.ascontiguousarray(batch)).to(self.settings.device)
            return self.model(tensor.permute(0, 3, 1, 2).float().div_(255).sub_(self._mean).div_(self._std))

        return in_batches(pixels, forward, self.settings, self.dim)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Refuse: there is no text tower.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.settings.model} embeds images only", hint="use an open_clip model for captions")


def classifier(name: str, pretrained: str, num_classes: int) -> tuple[Any, dict[str, Any]]:
    """Build a timm model with its head, for its own logits.

    Args:
        name: timm's name, with or without tag.
        pretrained: File of weights, or "random".
        num_classes: Outputs that the weights must have.

    Returns:
        The torch module and its data config (mean, std, ...).

    Raises:
        ConfigError: Unknown model, or weights that are not this model's.
    """
    import timm

    config = _data_config(TIMM + name)
    model = timm.create_model(name, pretrained=False, num_classes=num_classes)
    if pretrained != "random":
        _load(model, name, pretrained, num_classes)
    return model, config


def _load(model: Any, name: str, path: str, num_classes: int = 0) -> None:
    """Load a checkpoint through timm's own conversion for the architecture; every tensor must be in it."""
    from timm.models import load_pretrained, load_state_dict

    missing: list[str] = []
    hook = model.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
    config = {**model.pretrained_cfg, "file": path}
    # The converter of old and foreign checkpoints lives beside the model's class under this name.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        if not config.get("custom_load"):  # numpy arrays; of the rest, weights only, whatever timm's default
            config["state_dict"] = load_state_dict(path, weights_only=True)
        load_pretrained(model, pretrained_cfg=config, num_classes=num_classes, filter_fn=convert, strict=False)
    except (RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} does not load into timm:{name}: {first}", hint="is it this model's file?") from None
    hook.remove()
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} tensors of timm:{name}, the first is {missing[0]}",
            hint="is it this model's file?",
        )
