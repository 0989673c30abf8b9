"""Encoders: unit rows, the same bytes give the same row, wrong weights are refused before any download."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipgap_ray.encoder import (
    ClipEncoder,
    EncoderSettings,
    ImageError,
    Preprocess,
    ProjectionEncoder,
    check,
    register_models,
)
from clipgap_ray.errors import ConfigError
from tests import made

CLIP = EncoderSettings("conv-64-test", "random", batch_size=8)


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a check by name opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def clip() -> Iterator[ClipEncoder]:
    threads = torch.get_num_threads()
    encoder = CLIP.build()
    assert isinstance(encoder, ClipEncoder)
    yield encoder
    torch.set_num_threads(threads)


def pixels(num: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, size, size, 3), np.uint8)


# --- projection ------------------------------------------------------------------------------------------


def test_the_projection_is_deterministic_and_unit() -> None:
    a, b = (ProjectionEncoder(EncoderSettings("projection")) for _ in range(2))
    images = pixels(5)
    rows = a.encode_images(images)
    assert rows.shape == (5, a.dim)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.array_equal(rows, b.encode_images(images))
    assert np.array_equal(rows[2:3], a.encode_images(images[2:3]))  # alone or among others
    assert a.fingerprint == b.fingerprint
    texts = a.encode_texts(["a cat", "a dog", "cat a"])
    assert np.array_equal(texts, b.encode_texts(["a cat", "a dog", "cat a"]))
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert not np.allclose(texts[0], texts[1])
    assert a.encode_images(images[:0]).shape == a.encode_texts([]).shape == (0, a.dim)


def test_close_images_get_close_rows() -> None:
    encoder = ProjectionEncoder(EncoderSettings("projection"))
    images = pixels(2).astype(int)
    images[1] = np.clip(images[0] + np.random.default_rng(0).integers(-4, 5, images[0].shape), 0, 255)
    smooth = np.repeat(np.repeat(pixels(1, 8), 8, axis=1), 8, axis=2)
    rows = encoder.encode_images(np.concatenate([images.astype(np.uint8), smooth]))
    assert rows[0] @ rows[1] > 0.99 > rows[0] @ rows[2]


def test_a_flat_image_has_a_row_too() -> None:
    rows = ProjectionEncoder(EncoderSettings("projection")).encode_images(np.zeros((1, 64, 64, 3), np.uint8))
    assert np.isfinite(rows).all()
    assert np.linalg.norm(rows) == pytest.approx(1, abs=1e-6)


# --- open_clip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [0, 1, 6, 7, 20])
def test_an_image_s_bits_do_not_depend_on_its_neighbours(clip: ClipEncoder, neighbours: int) -> None:
    image = pixels(1)
    alone = clip.encode_images(image)
    among = clip.encode_images(np.concatenate([image, pixels(neighbours)]))
    assert alone.tobytes() == among[:1].tobytes()
    assert len(among) == neighbours + 1
    text = clip.encode_texts(["a photo of a cat"])
    assert text.tobytes() == clip.encode_texts(["a photo of a cat", *["x y"] * neighbours])[:1].tobytes()


def test_rows_are_open_clip_s_own_features(clip: ClipEncoder) -> None:
    images = pixels(3)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.inference_mode():
        tensor = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = torch.nn.functional.normalize(clip.model.encode_image(tensor), dim=-1).numpy()
        tokens = open_clip.get_tokenizer("conv-64-test")(["a cat"])
        text = torch.nn.functional.normalize(clip.model.encode_text(tokens), dim=-1).numpy()
    assert np.allclose(clip.encode_images(images), expected, atol=1e-5)
    assert np.allclose(clip.encode_texts(["a cat"]), text, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert clip.encode_images(images[:0]).shape == clip.encode_texts([]).shape == (0, clip.dim)


def test_random_weights_are_the_same_in_every_process(clip: ClipEncoder) -> None:
    torch.manual_seed(99)
    again = CLIP.build()
    assert again.fingerprint == clip.fingerprint
    assert again.encode_images(pixels(2)).tobytes() == clip.encode_images(pixels(2)).tobytes()


def test_the_fingerprint_knows_weights_batch_size_and_threads(clip: ClipEncoder) -> None:
    assert clip.fingerprint["batch_size"] == 8
    assert clip.fingerprint["threads"] == 1
    other = CLIP.build()
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)  # type: ignore[attr-defined]
    from clipgap_ray.encoder import weights_sha256

    assert weights_sha256(other.model) != clip.fingerprint["weights_sha256"]  # type: ignore[attr-defined]


# --- checks by name --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B-32", "laion400m_e32", ["quick_gelu=True", "model ViT-B-32 has False", "--model ViT-B-32-quickgelu"]),
        (
            "ViT-B-32-quickgelu",
            "laion2b_s34b_b79k",
            ["is neither a file nor a tag of ViT-B-32-quickgelu", "laion400m_e32"],
        ),
        ("ViT-B-23", "openai", ["unknown model 'ViT-B-23'", "ViT-B-32"]),
        ("ViT-B-32", "laion400m_e99", ["'laion400m_e99' is neither a file nor a tag", "laion2b_s34b_b79k"]),
        ("conv-64-test", "openai", ["is neither a file nor a tag of conv-64-test", "tags: none"]),
        ("conv-64-test", "", ["needs --pretrained"]),
    ],
)
def test_impossible_weights_are_refused_without_a_download(model: str, pretrained: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(EncoderSettings(model, pretrained))
    for word in words:
        assert word in str(error.value)


@pytest.mark.usefixtures("_offline")
def test_right_weights_pass_and_give_their_preprocessing() -> None:
    assert check(EncoderSettings("ViT-B-32-quickgelu", "laion400m_e32")) == Preprocess(224)
    assert check(EncoderSettings("ViT-B/32", "laion2b_s34b_b79k")) == Preprocess(224)
    assert check(EncoderSettings("conv-64-test", "random", crop_border=2)) == Preprocess(64, crop_border=2)
    assert check(EncoderSettings("projection")).size == 64


def test_a_directory_without_checkpoint_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"without checkpoint\.pt"):
        check(EncoderSettings("conv-64-test", str(tmp_path)))


# --- pixels ----------------------------------------------------------------------------------------------


def encoded(mode: str, width: int, height: int, form: str) -> bytes:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode if mode == "RGBA" else "RGB").convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "width", "height", "form"),
    [("RGB", 64, 64, "PNG"), ("RGB", 100, 70, "JPEG"), ("RGB", 33, 90, "PNG"), ("L", 80, 64, "PNG"),
     ("RGBA", 70, 80, "PNG"), ("CMYK", 90, 66, "JPEG"), ("P", 70, 70, "PNG"), ("RGB", 65, 64, "WEBP")],
)  # fmt: skip
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_decoding_equals_open_clip_s_transform_before_normalisation(
    mode: str, width: int, height: int, form: str, resize_mode: str
) -> None:
    data = encoded(mode, width, height, form)
    transform = open_clip.image_transform(
        64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", resize_mode=resize_mode
    )
    expected = (transform(Image.open(io.BytesIO(data))).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(Preprocess(64, resize_mode=resize_mode).decode(data), expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "broken_image"), (b"not an image", "broken_image"), (made.jpeg(0, 64)[:-200], "broken_image"),
     (made.jpeg(0)[:2] + bytes(500), "broken_image")],
)  # fmt: skip
def test_what_cannot_be_decoded_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        Preprocess(64).decode(data)
    assert error.value.reason == reason
    assert " at 0x" not in str(error.value)  # the ledger holds this text, and must be the same on every run


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("L", 40, 40, "PNG")
    monkeypatch.setattr("clipgap_ray.pixels.MAX_IMAGE_PIXELS", 1_599)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("unpacked"))
    with pytest.raises(ImageError) as error:
        Preprocess(64).decode(data)
    assert error.value.reason == "too_many_pixels"


def test_the_border_is_cut_first() -> None:
    framed = np.full((68, 68, 3), 255, np.uint8)
    framed[2:-2, 2:-2] = pixels(1)[0]
    buffer = io.BytesIO()
    Image.fromarray(framed).save(buffer, "PNG")
    assert np.array_equal(Preprocess(64, crop_border=2).decode(buffer.getvalue()), pixels(1)[0])


def test_our_models_are_known_after_registering() -> None:
    register_models()
    assert {"conv-64", "conv-64-test"} <= set(open_clip.list_models())


# --- spellings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-B/32", "", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-B/32", "openai", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L/14@336px", "", ("ViT-L-14-336-quickgelu", "openai")),
        ("ViT-B/32", "laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("open_clip:ViT-B-32", "laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("ViT-B-32-quickgelu,laion400m_e32", "", ("ViT-B-32-quickgelu", "laion400m_e32")),
        ("hf_clip:org/name", "", ("hf-hub:org/name", "")),
        ("conv-64-test", "random", ("conv-64-test", "random")),
    ],
)
@pytest.mark.usefixtures("_offline")
def test_other_tools_spellings_mean_the_same_model(model: str, pretrained: str, expected: tuple[str, str]) -> None:
    settings = EncoderSettings(model, pretrained)
    assert (settings.model, settings.pretrained) == expected
    assert EncoderSettings(*expected) == settings
    if not model.startswith("hf_clip"):
        check(settings)  # a model and a tag that open_clip knows, with the right activation


def test_two_tags_are_refused() -> None:
    with pytest.raises(ConfigError, match="names the weights 'openai', --pretrained 'laion2b_s34b_b79k'"):
        EncoderSettings("ViT-B-32,openai", "laion2b_s34b_b79k")
