"""The same maths with device="cuda": encoder, loss, and the precision that contract 3 promises of tensor cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.kernels.contrastive import contrastive_loss
from clipgap_ray.kernels.vectors import error_bound
from tests import made, twins
from tests.conftest import GPU_FP16_TOLERANCE, GPU_FP32_TOLERANCE, LOSS_TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no CUDA device here"),
]


def pixels(num: int) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", GPU_FP32_TOLERANCE), ("fp16", GPU_FP16_TOLERANCE)])
def test_the_encoder_gives_the_cpu_s_rows(precision: str, tolerance: float) -> None:
    cpu = EncoderSettings("conv-64-test", "random", batch_size=8).build()
    gpu = EncoderSettings("conv-64-test", "random", "cuda", precision, batch_size=8).build()
    assert gpu.fingerprint["weights_sha256"] == cpu.fingerprint["weights_sha256"]
    assert np.abs(gpu.encode_images(pixels(11)) - cpu.encode_images(pixels(11))).max() <= tolerance
    texts = ["a photo of a cat", "a sketch"]
    assert np.abs(gpu.encode_texts(texts) - cpu.encode_texts(texts)).max() <= tolerance
    assert np.allclose(np.linalg.norm(gpu.encode_images(pixels(11)), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("neighbours", [1, 7, 12])
def test_an_image_s_bits_do_not_depend_on_its_neighbours(neighbours: int) -> None:
    gpu = EncoderSettings("conv-64-test", "random", "cuda", "fp16", batch_size=8).build()
    image = pixels(1)
    among = gpu.encode_images(np.concatenate([image, pixels(neighbours)]))
    assert gpu.encode_images(image).tobytes() == among[:1].tobytes()


def test_the_loss_and_its_gradient_equal_the_cpu_s() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(32, 16).double(), dim=1) for _ in range(2))
    results = {}
    for device in ("cpu", "cuda"):
        left, right = (rows.to(device).requires_grad_() for rows in (images, texts))
        loss = contrastive_loss(left, right, torch.tensor(14.0, device=device))
        loss.backward()
        results[device] = loss.item(), left.grad.cpu(), right.grad.cpu()
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], abs=LOSS_TOLERANCE)
    for on_cpu, on_gpu in zip(results["cpu"][1:], results["cuda"][1:], strict=True):
        assert (on_cpu - on_gpu).abs().max() <= LOSS_TOLERANCE


@pytest.mark.parametrize("dim", [64, 512, 1024])
def test_tensor_cores_stay_within_the_bound_with_float16_inputs_and_float32_sums(dim: int) -> None:
    rows = made.unit_rows(512, dim, dim)
    rows = np.concatenate([rows, rows[:64]])
    device_rows = torch.from_numpy(rows).cuda()
    product = torch.mm(device_rows, device_rows.T, out_dtype=torch.float32).cpu().numpy()
    assert np.abs(product - twins.similarities(rows, rows)).max() <= error_bound(dim)
