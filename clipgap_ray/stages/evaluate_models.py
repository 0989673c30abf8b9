"""What turns pixels into logits over a test set's classes: CLIP by prompts, or a classifier's outputs.

Classifiers are our own supervised runs, torchvision's (`torchvision:resnet50`) and timm's (`timm:resnet50.a1_in1k`).
Their outputs are brought into the set's label space by position, by name, or by a given map.
"""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipgap_ray import presets, store
from clipgap_ray.encoder import (
    TIMM,
    EncoderSettings,
    Preprocess,
    check,
    not_only_weights,
    register_models,
    resolve_checkpoint,
)
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import zero_shot
from clipgap_ray.stages.evaluate_sets import Question

TORCHVISION = "torchvision:"
IMAGENET_CLASSES = 1000
LogitsOf = Callable[[np.ndarray], np.ndarray]


def check_model(settings: EncoderSettings) -> Preprocess:
    """Check model and weights by name, and return the preprocessing; errors are those of `encoder.check`."""
    if not settings.model.startswith(TORCHVISION):
        return check(settings)
    transform = _torchvision_weights(settings.model).transforms()
    _torchvision_tag(settings)
    mode = transform.interpolation.value
    if mode not in ("bicubic", "bilinear"):
        raise ConfigError(f"{settings.model} resizes by {mode}: expected bicubic or bilinear", hint="choose another")
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return Preprocess(crop, mode, "shortest", settings.crop_border, resize if resize != crop else 0)


def class_counts(settings: EncoderSettings, asked: Sequence[Question]) -> None:
    """Refuse classifiers whose outputs cannot be brought into a test set's label space, before anything runs.

    Raises:
        DataError: Naming both numbers of classes.
    """
    outputs, names = _outputs(settings)
    for question in asked:
        if outputs and not question.predictions:
            columns(question, outputs, names, settings.pretrained or settings.model)


def logits_of(settings: EncoderSettings, question: Question) -> LogitsOf:
    """Return pixels (n, s, s, 3) uint8 -> logits (n, c) float32 over the set's classes, for any kind of model."""
    outputs, names = _outputs(settings)
    if not outputs:
        return _by_prompts(settings, question)
    model, mean, std = _classifier(settings, outputs)
    chosen = columns(question, outputs, names, settings.pretrained or settings.model)
    return _by_outputs(model, mean, std, settings, chosen)


def columns(question: Question, outputs: int, names: Sequence[str], what: str) -> list[list[int]]:
    """Return which of a classifier's outputs stand for each class of a test set.

    Args:
        question: The test set, with or without a class map.
        outputs: Number of the classifier's outputs.
        names: What they are called; empty if unknown.
        what: The classifier, for the error.

    Raises:
        DataError: If numbers differ and names do not help.
    """
    classes = question.test_set.class_names
    if question.class_map is not None:
        chosen = [question.class_map[name] for name in classes]
        if max(max(one) for one in chosen) >= outputs or min(min(one) for one in chosen) < 0:
            raise DataError(f"--class-map of {question.name} names outputs beyond the {outputs} of {what}")
        return chosen
    if len(classes) == outputs:
        return [[index] for index in range(outputs)]
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(name, []).append(index)
    lacking = [name for name in classes if name not in by_name]
    if lacking:
        detail = f"; it has no output called {lacking[0]!r}" if names else ""
        raise DataError(
            f"the classifier {what} has {outputs} classes, {question.test_set.uri} names {len(classes)}{detail}",
            hint="train it on a reference with the same classnames.txt, or give --class-map",
        )
    return [by_name[name] for name in classes]


def _outputs(settings: EncoderSettings) -> tuple[int, Sequence[str]]:
    """Number and names of a classifier's outputs; 0 for CLIP."""
    if settings.model.startswith((TORCHVISION, TIMM)):
        return IMAGENET_CLASSES, presets.imagenet_class_names()
    state = _own_state(settings)
    if "head.weight" not in state.get("state_dict", {}):
        return 0, ()
    return len(state["state_dict"]["head.weight"]), tuple(state.get("class_names", ()))


def _own_state(settings: EncoderSettings) -> dict[str, Any]:
    import torch

    path = resolve_checkpoint(settings.pretrained)
    if not path.endswith(".pt") or not os.path.isfile(path):
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):  # OpenAI's archives are programs, not tables: open_clip reads them
        return {}
    return state if isinstance(state, dict) else {}


def _by_prompts(settings: EncoderSettings, question: Question) -> LogitsOf:
    """Zero-shot by the prompt ensemble (train_test_similarity.md 2.10)."""
    encoder = settings.build()
    classes, templates = question.test_set.class_names, question.test_set.templates
    prompts = [template.format(c=name) for name in classes for template in templates]
    weights = zero_shot.class_weights(encoder.encode_texts(prompts), len(classes))
    return lambda pixels: encoder.encode_images(pixels) @ weights.T


def _classifier(settings: EncoderSettings, outputs: int) -> tuple[Any, Sequence[float], Sequence[float]]:
    """Return the model in evaluation mode, and mean and standard deviation of its pixels."""
    import open_clip
    import torch

    torch.manual_seed(0)  # "random" weights are the same everywhere
    if settings.model.startswith(TORCHVISION):
        return _torchvision(settings)
    if settings.model.startswith(TIMM):
        return _timm(settings)
    from clipgap_ray.stages.train_model import Classifier

    register_models()  # this process may be a fresh Ray worker
    state = _own_state(settings)["state_dict"]
    model = Classifier(open_clip.create_model(settings.model).visual, state["head.weight"].shape[1], outputs)
    model.load_state_dict(state)
    return model.eval(), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def _by_outputs(
    model: Any, mean: Sequence[float], std: Sequence[float], settings: EncoderSettings, chosen: list[list[int]]
) -> LogitsOf:
    import torch

    model = model.to(settings.device)
    shift, scale = (torch.tensor(v, device=settings.device).view(1, 3, 1, 1) for v in (mean, std))
    single = [one[0] for one in chosen] if all(len(one) == 1 for one in chosen) else None
    plain = single == list(range(len(chosen)))

    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tensor = torch.from_numpy(pixels).to(settings.device).permute(0, 3, 1, 2).float()
            found = model((tensor / 255 - shift) / scale).float().cpu().numpy()
        if single is not None:
            return found if plain and found.shape[1] == len(chosen) else found[:, single]
        return np.stack([found[:, one].max(axis=1) for one in chosen], axis=1)

    return logits


def _torchvision_weights(model: str) -> Any:
    """The model's ImageNet weights of the first kind, whose transforms are those of the papers' baselines."""
    import torchvision

    name = model.removeprefix(TORCHVISION)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise ConfigError(
            f"unknown model {model!r}; nearest names: {', '.join(TORCHVISION + n for n in near) or 'none'}"
        )
    return torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]


def _torchvision_tag(settings: EncoderSettings) -> str:
    """Return the tag among torchvision's weights; empty for a file or random weights."""
    tags = [one.name for one in type(_torchvision_weights(settings.model))]
    if settings.pretrained in tags:
        return settings.pretrained
    if settings.pretrained != "random" and not os.path.isfile(settings.pretrained):
        raise ConfigError(
            f"--pretrained {settings.pretrained!r} is neither a file nor weights of {settings.model}",
            hint=f"tags: {', '.join(tags)}; files are torchvision's own .pth",
        )
    return ""


def _torchvision(settings: EncoderSettings) -> tuple[Any, Sequence[float], Sequence[float]]:
    import torch
    import torchvision

    name = settings.model.removeprefix(TORCHVISION)
    tag = _torchvision_tag(settings)
    model = torchvision.models.get_model(name, weights=tag or None)
    if not tag and settings.pretrained != "random":
        try:
            model.load_state_dict(torch.load(settings.pretrained, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:
            raise not_only_weights(settings.pretrained) from None
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"{settings.pretrained} does not load into {settings.model}: {first}") from None
    transform = _torchvision_weights(settings.model).transforms()
    return model.eval(), transform.mean, transform.std


def _timm(settings: EncoderSettings) -> tuple[Any, Sequence[float], Sequence[float]]:
    from clipgap_ray import encoder_timm

    name = settings.model.removeprefix(TIMM)
    model, config = encoder_timm.classifier(name, settings.pretrained, IMAGENET_CLASSES)
    return model.eval(), config["mean"], config["std"]


def weights_id(settings: EncoderSettings) -> str:
    """Return the sha256 of the weights' file, or the tag."""
    checkpoint = resolve_checkpoint(settings.pretrained)
    return store.sha256(store.read_bytes(checkpoint)) if store.exists(checkpoint) else checkpoint


def with_border(preprocess: Preprocess, question: Question) -> Preprocess:
    """Return the preprocessing with the crop of one test set."""
    return replace(preprocess, crop_border=question.crop_border)
