"""Two ranks with open_clip's distributed loss compute what one process computes on the whole batch."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from clipgap_ray.kernels.contrastive import contrastive_loss
from clipgap_ray.stages.train_model import accumulate
from tests.conftest import LOSS_TOLERANCE

# Each rank wraps the same towers in DDP, feeds its half of the batch and writes its loss and gradients; `accumulated`
# feeds it in three forward passes.
RANK = """
import sys
import numpy as np, open_clip, torch, torch.distributed as dist
from clipgap_ray.stages.train_model import accumulate, make_loss
from tests.unit.test_contrastive import CASES, batch, towers
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
images, texts = (half.chunk(2)[rank] for half in batch())
for case in CASES:
    siglip = "siglip" in case
    model = torch.nn.parallel.DistributedDataParallel(towers(siglip))
    loss_of = make_loss(siglip, rank, 2)
    if case == "whole matrix":
        loss_of = open_clip.ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=2)
    if "accumulated" in case:
        pieces = list(zip(images.chunk(3), texts.chunk(3)))
        loss = accumulate(model, lambda module, number: module(*pieces[number]), 3, loss_of)
    else:
        loss = loss_of(*model(images, texts))
        loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    grads = {name: p.grad.numpy() for name, p in model.module.named_parameters()}
    np.savez(f"{out}/{case}-{rank}.npz", loss=(mean / 2).numpy(), **grads)
dist.destroy_process_group()
"""
CASES = ("local loss", "whole matrix", "accumulated", "siglip", "siglip accumulated")


class Towers(torch.nn.Module):
    """Two linear towers and a temperature: all that the loss touches."""

    def __init__(self, siglip: bool) -> None:
        super().__init__()
        self.image = torch.nn.Linear(12, 8)
        self.text = torch.nn.Linear(10, 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07)))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0)) if siglip else None

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = tuple(
            torch.nn.functional.normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts))
        )
        return *rows, self.logit_scale.exp(), *(() if self.logit_bias is None else (self.logit_bias,))


def towers(siglip: bool = False) -> Towers:
    torch.manual_seed(0)
    return Towers(siglip).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(12, width, generator=generator, dtype=torch.float64) for width in (12, 10))  # type: ignore[return-value]


@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_it_equals_open_clip_s_loss_in_one_process(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    images, texts = (torch.randn(num_rows, 8, generator=generator) for _ in range(2))
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    scale = torch.tensor(14.0)
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(
        open_clip.ClipLoss()(images, texts, scale).item(), abs=LOSS_TOLERANCE
    )


def test_by_hand_on_two_pairs() -> None:
    rows = torch.eye(2)
    # logits [[s, 0], [0, s]]: both cross-entropies are log(1 + exp(-s))
    assert contrastive_loss(rows, rows, torch.tensor(2.0)).item() == pytest.approx(np.log1p(np.exp(-2.0)), abs=1e-6)
    assert contrastive_loss(rows, rows.flip(0), torch.tensor(2.0)).item() == pytest.approx(
        np.log1p(np.exp(2.0)), abs=1e-6
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks computed, CASE-RANK.npz."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port, str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=120)
            assert rank.returncode == 0, stderr.decode()[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_in_loss_and_gradient(two_ranks: Path, case: str) -> None:
    siglip = "siglip" in case
    model = towers(siglip)
    loss = (sigmoid_loss if siglip else contrastive_loss)(*model(*batch()))
    loss.backward()
    for rank in range(2):
        found = np.load(two_ranks / f"{case}-{rank}.npz")
        assert float(found["loss"]) == pytest.approx(loss.item(), abs=LOSS_TOLERANCE)
        for name, parameter in model.named_parameters():
            assert np.abs(found[name] - parameter.grad.numpy()).max() <= LOSS_TOLERANCE, name
    assert max(float(p.grad.abs().max()) for p in model.parameters()) > 1e-2  # there was something to compare


def sigmoid_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss by its definition (arXiv 2303.15343, equation 1): every pair is a binary question."""
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return torch.log1p(torch.exp(-signs * (scale * images @ texts.T + bias))).sum() / len(images)


@pytest.mark.parametrize("num_passes", [1, 2, 4])
def test_accumulation_in_one_process_equals_one_pass(num_passes: int) -> None:
    images, texts = batch()
    expected, found = towers(), towers()
    whole = contrastive_loss(*expected(images, texts))
    whole.backward()
    pieces = list(zip(images.chunk(num_passes), texts.chunk(num_passes), strict=True))
    loss = accumulate(found, lambda module, number: module(*pieces[number]), num_passes, contrastive_loss)
    assert loss.item() == pytest.approx(whole.item(), abs=LOSS_TOLERANCE)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= LOSS_TOLERANCE


def test_accumulation_moves_running_statistics_once() -> None:
    images, texts = (part.float() for part in batch())
    model = Towers(False)
    model.image = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8))
    twin = copy.deepcopy(model)
    accumulate(model, lambda module, i: module(images.chunk(3)[i], texts.chunk(3)[i]), 3, contrastive_loss)
    for i in range(3):
        twin(images.chunk(3)[i], texts.chunk(3)[i])
    assert torch.equal(model.image[1].running_mean, twin.image[1].running_mean)
    assert torch.equal(model.image[1].running_var, twin.image[1].running_var)
    assert model.image[1].momentum == 0.1
