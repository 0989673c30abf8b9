"""timm encoders: timm's own features and transform, weights from a file that must fit, images only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from clipgap_ray.encoder import EncoderSettings, check
from clipgap_ray.encoder_timm import TimmEncoder
from clipgap_ray.errors import ConfigError
from clipgap_ray.pixels import Preprocess

NAME = "test_vit.r160_in1k"
SETTINGS = EncoderSettings(f"timm:{NAME}", "random", batch_size=4)


@pytest.fixture(scope="module")
def encoder() -> Iterator[TimmEncoder]:
    threads = torch.get_num_threads()
    built = SETTINGS.build()
    assert isinstance(built, TimmEncoder)
    yield built
    torch.set_num_threads(threads)


def pixels(num: int, size: int = 160) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, size, size, 3), np.uint8)


def test_rows_are_timm_s_own_pooled_features(encoder: TimmEncoder) -> None:
    config = resolve_data_config({}, model=encoder.model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images = pixels(5)
    with torch.inference_mode():
        tensor = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = torch.nn.functional.normalize(encoder.model(tensor), dim=-1).numpy()
    rows = encoder.encode_images(images)
    assert rows.shape == (5, encoder.dim) == (5, 64)
    assert rows.dtype == np.float32
    assert np.allclose(rows, expected, atol=1e-5)
    assert rows[:1].tobytes() == encoder.encode_images(images[:1]).tobytes()  # alone or among others
    assert encoder.encode_images(images[:0]).shape == (0, 64)


@pytest.mark.parametrize(
    "name", [NAME, "resnet50.a1_in1k", "vit_small_patch14_dinov2.lvd142m", "efficientnet_b0.ra_in1k"]
)
@pytest.mark.parametrize(("width", "height"), [(300, 200), (160, 160), (90, 233)])
def test_pixels_are_those_of_timm_s_transform(name: str, width: int, height: int) -> None:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    config = timm.get_pretrained_cfg(name).to_dict()
    transform = create_transform(
        **{**resolve_data_config({}, pretrained_cfg=config), "mean": (0, 0, 0), "std": (1, 1, 1)}
    )
    expected = (transform(Image.fromarray(noise)).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    found = check(EncoderSettings(f"timm:{name}", "random")).decode(buffer.getvalue())
    assert np.array_equal(found, expected)


def test_squashed_pixels_are_timm_s_too() -> None:
    name = next(n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).crop_mode == "squash"
                and timm.get_pretrained_cfg(n).input_size == (3, 224, 224))  # fmt: skip
    test_pixels_are_those_of_timm_s_transform(name, 300, 200)


def test_the_fingerprint_names_weights_and_pixels(encoder: TimmEncoder) -> None:
    found = encoder.fingerprint
    assert found["model"] == f"timm:{NAME}"
    assert found["preprocess"]["resize_to"] == 168
    assert found["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert len(found["weights_sha256"]) == 64
    assert TimmEncoder(SETTINGS).fingerprint == found
    assert "resize_to" not in Preprocess(224).as_dict()


def test_weights_come_from_a_file_and_must_fit(encoder: TimmEncoder, tmp_path: Path) -> None:
    torch.manual_seed(7)
    trained = timm.create_model(NAME, pretrained=False)  # with a classifier, as published
    path = tmp_path / "weights.pth"
    torch.save(trained.state_dict(), path)
    loaded = TimmEncoder(EncoderSettings(f"timm:{NAME}", str(path), batch_size=4))
    assert loaded.fingerprint["pretrained"] == "weights.pth"
    assert loaded.fingerprint["weights_sha256"] != encoder.fingerprint["weights_sha256"]
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key])
    half = {key: tensor for key, tensor in trained.state_dict().items() if "blocks.1" not in key}
    torch.save(half, path)
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors of timm:test_vit\.r160_in1k, the first is blocks\.1"):
        TimmEncoder(EncoderSettings(f"timm:{NAME}", str(path)))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="does not load into"):
        TimmEncoder(EncoderSettings(f"timm:{NAME}", str(path)))


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("timm:test_vitt", "random", ["unknown model 'timm:test_vitt'", "timm:test_vit"]),
        ("timm:test_vit.nope", "random", ["unknown model 'timm:test_vit.nope'", "timm:test_vit"]),
        (f"timm:{NAME}", "", ["needs its weights as a local file"]),
        (f"timm:{NAME}", "/nowhere.pth", ["'/nowhere.pth' is no file"]),
    ],
)
def test_impossible_settings_are_refused_by_name(model: str, pretrained: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(EncoderSettings(model, pretrained))
    for word in words:
        assert word in str(error.value)


def test_a_model_that_pads_a_border_is_refused() -> None:
    name = next(n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).crop_mode == "border")
    with pytest.raises(ConfigError, match="crop mode 'border'"):
        check(EncoderSettings(f"timm:{name}", "random"))


def test_captions_are_refused(encoder: TimmEncoder) -> None:
    assert not SETTINGS.has_text
    with pytest.raises(ConfigError, match="embeds images only"):
        encoder.encode_texts(["a cat"])
