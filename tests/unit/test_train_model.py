"""The model that is trained and its gradient, in one process: what options change and what they must not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from clipgap_ray.config.train import TrainSettings
from clipgap_ray.encoder import register_models
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels.order import SampleOrder
from clipgap_ray.stages import train
from clipgap_ray.stages.train_data import Batch, Plan
from clipgap_ray.stages.train_model import Objective, build_model, learning_rate, portable_state

VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# bfloat16 has 8 bits: of a loss of about 2, a dozen layers deep
BF16_TOLERANCE = 0.05
# Sums of float32 in another order: a few units in the last place, of the largest gradient or of 1.
ORDER_TOLERANCE = 5e-6


@pytest.fixture(scope="module", autouse=True)
def vit(tmp_path_factory: pytest.TempPathFactory) -> None:
    register_models()
    path = tmp_path_factory.mktemp("models") / "vit-32-test.json"
    path.write_text(json.dumps(VIT))
    open_clip.add_model_config(path)


def settings(**more: Any) -> dict[str, Any]:
    words = {"source": "s", "out": "o", "model": "vit-32-test", "batch_size": 8, "workers": 1, "warmup": 0}
    return TrainSettings(**{**words, **more}).model_dump(mode="json")


def batch(num_rows: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num_rows, 32, 32, 3), np.uint8)
    return pixels, [f"a picture number {i}" for i in range(num_rows)], np.arange(num_rows) % 3


def gradient(position: int = 0, **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one batch of 8."""
    values = settings(**more)
    plan = Plan([], SampleOrder(np.array([8]), 0, 8), ("a", "b", "c"), values, 1, 32, 8)
    model = build_model(values, 3).train()
    loss = Objective(plan, torch.device("cpu"), 0, 1).backward(model, batch(), position)
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    assert one.keys() == other.keys()
    largest = {name: max(1.0, float(grad.abs().max())) for name, grad in one.items()}
    return all((one[name] - other[name]).abs().max() <= tolerance * largest[name] for name in one)


@pytest.mark.parametrize(
    "more", [{"batch_size": 2}, {"grad_checkpointing": True}], ids=["accumulation", "checkpointing"]
)
@pytest.mark.parametrize("siglip", [False, True])
def test_memory_is_saved_without_changing_loss_or_gradient(more: dict[str, Any], siglip: bool) -> None:
    loss, grads = gradient(siglip=siglip)
    other_loss, other_grads = gradient(siglip=siglip, **more)
    assert other_loss == pytest.approx(loss, abs=ORDER_TOLERANCE)
    assert same(grads, other_grads, ORDER_TOLERANCE)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3


def test_a_classifier_accumulates_the_mean_of_its_losses() -> None:
    loss, grads = gradient(objective="supervised")
    other_loss, other_grads = gradient(objective="supervised", batch_size=2)
    assert other_loss == pytest.approx(loss, abs=ORDER_TOLERANCE)
    assert same(grads, other_grads, ORDER_TOLERANCE)


def test_patch_dropout_depends_on_the_position_alone() -> None:
    first = gradient(8, force_patch_dropout=0.5)
    torch.rand(100)  # somebody else draws in between
    again = gradient(8, force_patch_dropout=0.5)
    assert first[0] == again[0]
    assert same(first[1], again[1], 0.0)
    assert gradient(16, force_patch_dropout=0.5)[0] != first[0]
    # accumulation draws the same patches in both of its passes: its gradient is that of its loss
    accumulated = gradient(8, force_patch_dropout=0.5, batch_size=4)
    assert accumulated[0] == gradient(8, force_patch_dropout=0.5, batch_size=4)[0]


def test_bf16_is_close_to_fp32() -> None:
    assert abs(gradient(precision="amp_bf16")[0] - gradient()[0]) < BF16_TOLERANCE


def test_a_siglip_model_loads_into_the_plain_model(tmp_path: Path) -> None:
    values = settings(siglip=True)
    model = build_model(values, 0)
    assert model.clip.logit_bias.item() == -10  # type: ignore[union-attr,operator]
    assert model.clip.logit_scale.item() == pytest.approx(math.log(10))  # type: ignore[union-attr,operator]
    torch.save({"state_dict": portable_state(model, "vit-32-test")}, tmp_path / "checkpoint.pt")
    loaded, _, _ = open_clip.create_model_and_transforms("vit-32-test", pretrained=str(tmp_path / "checkpoint.pt"))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval().encode_image(pixels), model.eval().clip.encode_image(pixels))  # type: ignore[union-attr,operator]


def test_compiling_keeps_the_names_of_parameters() -> None:
    names = [name for name, _ in build_model(settings(), 0).named_parameters()]
    assert [name for name, _ in build_model(settings(torchcompile=True), 0).named_parameters()] == names


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    loss, grads = gradient()
    other_loss, other_grads = gradient(torchcompile=True)
    assert other_loss == pytest.approx(loss, abs=1e-5)
    assert same(grads, other_grads, 1e-4)


def test_patch_dropout_on_a_model_without_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="conv-64 has no patches"):
        train._check_model(TrainSettings(source="s", out="o", model="conv-64", force_patch_dropout=0.5))
    train._check_model(TrainSettings(source="s", out="o", model="vit-32-test", force_patch_dropout=0.5))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    values = settings(lr=1.0, warmup=4)
    rates = [learning_rate(step, 12, values) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.5)  # half way down
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
