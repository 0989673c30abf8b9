"""Two ranks with open_clip's distributed loss compute what one process computes on the whole batch."""

from __future__ import annotations

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
from tests.conftest import LOSS_TOLERANCE

# Each rank wraps the same towers in DDP, feeds its half of the batch and writes its loss and gradients.
RANK = """
import sys
import numpy as np, open_clip, torch, torch.distributed as dist
from tests.unit.test_contrastive import batch, towers
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(towers())
images, texts = (half.chunk(2)[rank] for half in batch())
loss_of = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=2)
loss = loss_of(*model(images, texts))
loss.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
grads = {name: p.grad.numpy() for name, p in model.module.named_parameters()}
np.savez(f"{out}/rank{rank}.npz", loss=(mean / 2).numpy(), **grads)
dist.destroy_process_group()
"""


class Towers(torch.nn.Module):
    """Two linear towers and a temperature: all that the loss touches."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Linear(12, 8)
        self.text = torch.nn.Linear(10, 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07)))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normalize = torch.nn.functional.normalize
        return normalize(self.image(images), dim=-1), normalize(self.text(texts), dim=-1), self.logit_scale.exp()


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers().double()


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


def test_two_ranks_equal_one_process_in_loss_and_gradient(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port, str(tmp_path)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=120)
            assert rank.returncode == 0, stderr.decode()[-2000:]
    finally:
        for rank in ranks:
            rank.kill()

    model = towers()
    loss = contrastive_loss(*model(*batch()))
    loss.backward()
    for rank in range(2):
        found = np.load(tmp_path / f"rank{rank}.npz")
        assert float(found["loss"]) == pytest.approx(loss.item(), abs=LOSS_TOLERANCE)
        for name, parameter in model.named_parameters():
            assert np.abs(found[name] - parameter.grad.numpy()).max() <= LOSS_TOLERANCE, name
    assert max(float(p.grad.abs().max()) for p in model.parameters()) > 1e-2  # there was something to compare
