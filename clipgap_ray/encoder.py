"""What turns images and captions into unit rows: open_clip models, timm models (`encoder_timm`), and a projection
that needs no weights.

The bits of an embedding depend on the batch it was computed in. So a batch never crosses a part, is padded to
`batch_size`, and batch size and threads are recorded: the same bytes give the same embedding on one machine
(design contract 3).

Decoding is separate from encoding: CPU tasks decode to uint8 with `Preprocess`, actors hold the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipgap_ray import __version__, store
from clipgap_ray.encoder_names import resolve_names
from clipgap_ray.encoder_projection import PROJECTION, ProjectionEncoder
from clipgap_ray.errors import ConfigError
from clipgap_ray.pixels import ImageError, Preprocess

MODELS = Path(__file__).parent / "models"
TIMM = "timm:"


class Encoder(Protocol):
    """Images and captions to unit rows. Implementations ship: `ClipEncoder`, `TimmEncoder`, `ProjectionEncoder`."""

    settings: EncoderSettings
    preprocess: Preprocess
    fingerprint: dict[str, Any]
    dim: int

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, dim) float32 unit rows."""
        ...

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n captions to (n, dim) float32 unit rows."""
        ...


@dataclass(frozen=True)
class EncoderSettings:
    """What builds the same encoder in any process.

    Attributes:
        model: open_clip name, `hf-hub:org/name`, `local-dir:path`, `timm:name`, "projection", or another spelling
            that `resolve_names` knows; the resolved name is kept.
        pretrained: open_clip tag, checkpoint file, run directory of `clipgap train`, or "random" (seeded, for tests).
        device: "cpu" or "cuda".
        precision: "fp32", "fp16" or "bf16" (autocast on GPUs).
        batch_size: Rows per forward pass; shorter batches are padded.
        threads: torch threads per encoder.
        crop_border: See `Preprocess`.
        shrink_to: See `Preprocess`.
    """

    model: str
    pretrained: str = ""
    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = 64
    threads: int = 1
    crop_border: int = 0
    shrink_to: int = 0

    def __post_init__(self) -> None:
        for name, value in zip(("model", "pretrained"), resolve_names(self.model, self.pretrained), strict=True):
            object.__setattr__(self, name, value)

    @property
    def has_text(self) -> bool:
        """Whether the encoder embeds captions too; timm's models know images only."""
        return not self.model.startswith(TIMM)

    def build(self) -> Encoder:
        """Build the encoder; errors are those of `check`."""
        if self.model == PROJECTION:
            return ProjectionEncoder(self)
        if self.model.startswith(TIMM):
            from clipgap_ray.encoder_timm import TimmEncoder

            return TimmEncoder(self)
        return ClipEncoder(self)


def register_models(folder: str | Path | None = None) -> None:
    """Make our small model configs (and those beside a checkpoint) known to open_clip in this process."""
    import open_clip

    open_clip.add_model_config(MODELS)
    if folder is not None:
        for path in sorted(Path(folder).glob("*.model.json")):
            # open_clip names a config after its file's stem
            name = path.name.removesuffix(".model.json")
            if name not in open_clip.list_models():
                open_clip.factory._MODEL_CONFIGS[name] = store.read_json(str(path))


def resolve_checkpoint(pretrained: str) -> str:
    """Return the checkpoint file behind a run directory of `clipgap train`; anything else comes back unchanged."""
    if pretrained and os.path.isdir(pretrained):
        latest = os.path.join(pretrained, "checkpoint.pt")
        if not os.path.isfile(latest):
            raise ConfigError(
                f"{pretrained} is a directory without checkpoint.pt", hint="give a run of `clipgap train`"
            )
        return latest
    return pretrained


def check(settings: EncoderSettings) -> Preprocess:
    """Check model and weights by name, without loading weights, and return the preprocessing.

    Raises:
        ConfigError: Unknown model (with the nearest names), unknown tag, missing file, or an activation that does
            not fit the weights (QuickGELU costs 2-3 points silently, train_test_similarity.md 4.1).
    """
    return dataclasses.replace(_preprocess(settings), shrink_to=settings.shrink_to)


def _preprocess(settings: EncoderSettings) -> Preprocess:
    if settings.model == PROJECTION:
        return Preprocess(ProjectionEncoder.SIZE, crop_border=settings.crop_border)
    if settings.model.startswith(TIMM):
        from clipgap_ray import encoder_timm

        return encoder_timm.check(settings)
    import difflib

    import open_clip

    checkpoint = resolve_checkpoint(settings.pretrained)
    register_models(os.path.dirname(checkpoint) if os.path.isfile(checkpoint) else None)
    if settings.model.startswith(("hf-hub:", "local-dir:")):
        return Preprocess(_schema_image_size(settings.model), crop_border=settings.crop_border)
    model = settings.model
    config = open_clip.get_model_config(model)
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        raise ConfigError(
            f"unknown model {settings.model!r}; nearest names: {', '.join(near) or 'none'}",
            hint="open_clip.list_models() lists all; 'projection' needs no weights",
        )
    tag = open_clip.get_pretrained_cfg(model, checkpoint) if checkpoint else {}
    if checkpoint and checkpoint != "random" and not tag and not os.path.isfile(checkpoint):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"--pretrained {settings.pretrained!r} is neither a file nor a tag of {model}",
            hint=f"tags: {', '.join(tags) or 'none'}",
        )
    if not checkpoint:
        raise ConfigError(f"model {model} needs --pretrained: a tag or a checkpoint file")
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        wanted = f"{model}-quickgelu" if tag.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise ConfigError(
            f"weights {checkpoint!r} were trained with quick_gelu={bool(tag.get('quick_gelu'))}, "
            f"model {model} has {bool(config.get('quick_gelu'))}",
            hint=f"use --model {wanted}",
        )
    size = config["vision_cfg"].get("image_size", 224)
    size = size[0] if isinstance(size, list | tuple) else size
    return Preprocess(
        size, tag.get("interpolation", "bicubic"), tag.get("resize_mode", "shortest"), settings.crop_border
    )


def _schema_image_size(model: str) -> int:
    import huggingface_hub.errors
    import open_clip

    schema, name = model.split(":", 1)
    try:
        config = (
            store.read_json(store.join(name, "open_clip_config.json"))
            if schema == "local-dir"
            else open_clip.factory._get_hf_config(name)
        )
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(
            f"no open_clip_config.json for {model}: {str(error).splitlines()[0]}",
            hint="the repository must hold weights in open_clip's format, and the machine must reach it",
        ) from None
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def not_only_weights(path: str) -> ConfigError:
    """Return the error for a checkpoint that torch refuses to read as weights only."""
    return ConfigError(
        f"{path} holds more than weights and is not loaded: a pickle can run any program",
        hint="save the state dict alone: torch.save(model.state_dict(), path)",
    )


class ClipEncoder:
    """An open_clip model in evaluation mode."""

    def __init__(self, settings: EncoderSettings) -> None:
        import open_clip
        import torch

        self.preprocess = check(settings)
        self.settings = settings
        self._torch = torch
        torch.set_num_threads(settings.threads)
        checkpoint = resolve_checkpoint(settings.pretrained)
        name = settings.model
        torch.manual_seed(0)  # "random" weights are the same everywhere
        pretrained = None if checkpoint in ("", "random") else checkpoint
        try:
            self.model = open_clip.create_model(name, pretrained=pretrained, device=settings.device).eval()
        except pickle.UnpicklingError:
            raise not_only_weights(checkpoint) from None
        self.tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_preprocess_cfg(self.model)
        self._mean = torch.tensor(config["mean"], device=settings.device).view(1, 3, 1, 1)
        self._std = torch.tensor(config["std"], device=settings.device).view(1, 3, 1, 1)
        self.dim = int(self._probe_dim())
        quick_gelu = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
        self.fingerprint = fingerprint(self.model, settings, self.preprocess, config, self.dim, quick_gelu)

    def _probe_dim(self) -> int:
        size = self.preprocess.size
        with self._torch.inference_mode():
            pixels = self._torch.zeros(1, 3, size, size, device=self.settings.device)
            return int(self.model.encode_image(pixels).shape[1])

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, dim) float32 unit rows, in padded batches."""
        torch = self._torch

        def forward(batch: np.ndarray) -> Any:
            tensor = torch.from_numpy(np.ascontiguousarray(batch)).to(self.settings.device)
            tensor = tensor.permute(0, 3, 1, 2).float().div_(255).sub_(self._mean).div_(self._std)
            return self.model.encode_image(tensor)

        return in_batches(pixels, forward, self.settings, self.dim)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n captions to (n, dim) float32 unit rows, in padded batches."""
        tokens = self.tokenizer(texts).numpy() if texts else np.zeros((0, 1), np.int64)

        def forward(batch: np.ndarray) -> Any:
            return self.model.encode_text(self._torch.from_numpy(batch).to(self.settings.device))

        return in_batches(tokens, forward, self.settings, self.dim)


def in_batches(
    rows: np.ndarray, forward: Callable[[np.ndarray], Any], settings: EncoderSettings, dim: int
) -> np.ndarray:
    """Run a torch model over rows in batches of one size, the last one padded, and make its features unit.

    Args:
        rows: (n, ...) inputs; n may be 0.
        forward: Maps a batch of `settings.batch_size` inputs to a torch tensor (batch, dim).
        settings: Device, precision and batch size.
        dim: Dimension d of the features.

    Returns:
        (n, d) float32 unit rows.
    """
    import torch

    size = settings.batch_size
    result = np.zeros((len(rows), dim), np.float32)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.precision)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        padding = size - len(batch)
        if padding:
            batch = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
        with (
            torch.inference_mode(),
            torch.autocast(settings.device, dtype=dtype or torch.float16, enabled=dtype is not None),
        ):
            features = forward(batch)[: size - padding].float()
            features = torch.nn.functional.normalize(features, dim=-1)
        result[start : start + size] = features.cpu().numpy()
    return result


def fingerprint(
    model: Any,
    settings: EncoderSettings,
    preprocess: Preprocess,
    normalisation: Mapping[str, Any],
    dim: int,
    quick_gelu: bool,
) -> dict[str, Any]:
    """Return what a manifest says of a torch encoder.

    Args:
        model: The torch module; its weights are hashed.
        settings: What it was built from.
        preprocess: Its pixels.
        normalisation: Three numbers each for `mean` and `std`, of pixels in 0..1.
        dim: Dimension of its rows.
        quick_gelu: Its activation.
    """
    import torch

    pixels = {name: list(normalisation[name]) for name in ("mean", "std")}
    return {
        "model": settings.model,
        "pretrained": os.path.basename(settings.pretrained.rstrip("/")),
        "weights_sha256": weights_sha256(model),
        "quick_gelu": quick_gelu,
        "preprocess": {**preprocess.as_dict(), **pixels},
        "crop_border": settings.crop_border,
        "dim": dim,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "torch": torch.__version__,
        "version": __version__,
    }


def weights_sha256(model: Any) -> str:
    """Return the sha256 over a torch module's parameters and buffers, by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).tobytes())
    return hasher.hexdigest()


__all__ = [
    "PROJECTION",
    "ClipEncoder",
    "Encoder",
    "EncoderSettings",
    "ImageError",
    "Preprocess",
    "ProjectionEncoder",
    "check",
    "fingerprint",
    "in_batches",
    "register_models",
    "resolve_checkpoint",
    "resolve_names",
    "weights_sha256",
]
