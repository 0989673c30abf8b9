"""What one training worker does: batches by byte range in a given order, forward, loss, step, checkpoint.

Nothing random is drawn from a shared generator: order, crops and initial weights are functions of (seed, position).
So a worker that starts at sample p sees exactly what an uninterrupted one would have seen (design contract 6).
"""

from __future__ import annotations

import io
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from clipgap_ray import store
from clipgap_ray.encoder import register_models
from clipgap_ray.kernels.order import SampleOrder

PREFETCH_BATCHES = 4
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs; small, so that it travels in the loop's config.

    Attributes:
        tables: One `samples.SAMPLES` table per part, already filtered by the split.
        order: The order over these parts.
        num_classes: For the supervised objective.
        settings: `TrainSettings` as a dict.
        steps: Steps in all.
        image_size: Pixels.
    """

    tables: list[pa.Table]
    order: SampleOrder
    num_classes: int
    settings: dict[str, Any]
    steps: int
    image_size: int


class Classifier(nn.Module):
    """An open_clip image tower with a linear head, for the supervised objective."""

    def __init__(self, tower: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.visual = tower
        self.head = nn.Linear(dim, num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map (b, 3, s, s) normalised pixels to (b, num_classes) logits."""
        return self.head(self.visual(pixels))


class ContrastiveModel(nn.Module):
    """open_clip's model with one forward for both towers, as DDP wants it."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = model

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map pixels and tokens to unit image rows, unit text rows and the logit scale."""
        images = self.clip.encode_image(pixels, normalize=True)
        texts = self.clip.encode_text(tokens, normalize=True)
        return images, texts, self.clip.logit_scale.exp()


def build_model(settings: dict[str, Any], num_classes: int) -> nn.Module:
    """Build the model with weights that depend on the seed only."""
    register_models()
    torch.manual_seed(settings["seed"])
    model = open_clip.create_model(settings["model"])
    if settings["objective"] == "supervised":
        config = open_clip.get_model_config(settings["model"])
        return Classifier(model.visual, config["embed_dim"], num_classes)
    return ContrastiveModel(model)


def portable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict that users load: open_clip's own names for CLIP, ours for a classifier."""
    inner = unwrapped(model)
    return dict((inner.clip if isinstance(inner, ContrastiveModel) else inner).state_dict())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP's wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW as open_clip sets it up: no decay on gains, biases and the logit scale."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    ids = {id(p) for p in plain}
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": settings["wd"]},
    ]
    betas = (settings["beta1"], settings["beta2"])
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=betas, eps=settings["eps"], fused=True)


def learning_rate(step: int, steps: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then cosine to zero (open_clip's `cosine_lr`)."""
    warmup = min(settings["warmup"], max(steps - 1, 0))
    if step < warmup:
        return settings["lr"] * (step + 1) / warmup
    return 0.5 * settings["lr"] * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# --- data ------------------------------------------------------------------------------------------------


def read_image(row: dict[str, Any]) -> bytes:
    """Read the encoded bytes of a row of `samples.SAMPLES`."""
    if row["offset"] < 0:
        return store.read_bytes(row["uri"])
    if store.is_local(row["uri"]):
        with open(row["uri"].removeprefix("file://"), "rb") as file:
            return os.pread(file.fileno(), row["num_bytes"], row["offset"])
    return store.read_bytes(row["uri"], row["offset"], row["num_bytes"])


def augment(image: bytes, size: int, scale: tuple[float, float], key: tuple[int, ...]) -> np.ndarray:
    """Random resized crop as open_clip's (area `scale`, aspect 3/4 to 4/3), drawn from `key` alone.

    Returns:
        (size, size, 3) uint8; grey where the bytes cannot be decoded, so that no rank falls out of step.
    """
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return np.full((size, size, 3), 128, np.uint8)
    rng = np.random.default_rng(key)
    area = picture.width * picture.height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(picture.width, math.sqrt(area * aspect))
    height = min(picture.height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.uint8)


Batch = tuple[np.ndarray, list[str], np.ndarray]


def batches(plan: Plan, rank: int, world_size: int, first_step: int) -> Iterator[Batch]:
    """Yield this rank's batches from a step on: (b, s, s, 3) uint8 pixels, b captions, (b,) int64 labels."""
    size = plan.settings["batch_size"]
    seed, scale = plan.settings["seed"], tuple(plan.settings["scale"])
    for step in range(first_step, plan.steps):
        start = (step * world_size + rank) * size
        epochs, parts, rows = plan.order.take(start, start + size)
        samples = [plan.tables[part].slice(row, 1).to_pylist()[0] for part, row in zip(parts, rows, strict=True)]
        pixels = np.stack(
            [
                augment(read_image(sample), plan.image_size, scale, (seed, int(epoch), start + i))
                for i, (sample, epoch) in enumerate(zip(samples, epochs, strict=True))
            ]
        )
        yield pixels, [s["caption"] or "" for s in samples], np.array([s["label"] for s in samples], np.int64)


def prefetched(batch_iterator: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Yield batches made in a background thread, each with the seconds that the consumer waited for it."""
    ready: queue.Queue[Any] = queue.Queue(PREFETCH_BATCHES)
    end = object()

    def produce() -> None:
        try:
            for batch in batch_iterator:
                ready.put(batch)
            ready.put(end)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            ready.put(error)

    threading.Thread(target=produce, name="batches", daemon=True).start()
    while True:
        started = time.perf_counter()
        item = ready.get()
        if item is end:
            return
        if isinstance(item, BaseException):
            raise item
        yield item, time.perf_counter() - started


# --- the loop --------------------------------------------------------------------------------------------


def train_loop(config: dict[str, Any]) -> None:
    """Run one worker: Ray Train calls it on every rank. `config` holds `plan` and `monitor` (an actor or None)."""
    import ray
    import ray.train
    import ray.train.torch

    plan: Plan = ray.get(config["plan"])
    settings = plan.settings
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = build_model(settings, plan.num_classes)
    step, history, optimizer_state, starts = 0, [], None, [0]
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        step, history, optimizer_state = state["step"], state["history"], state["optimizer"]
        starts = [*state["starts"], step]
    wrapped = ray.train.torch.prepare_model(
        model,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},  # one copy of the gradients less
    )
    optimizer = make_optimizer(wrapped, settings)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    compute = _Objective(plan, device, rank, world_size)
    wrapped.train()
    waited, started = 0.0, time.perf_counter()
    for batch, wait in prefetched(batches(plan, rank, world_size, step)):
        waited += wait
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, settings)
        loss = compute(wrapped, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        compute.after_step(wrapped)
        step += 1
        last = step == plan.steps
        if step % 10 == 0 or last:
            seconds = time.perf_counter() - started
            row = {
                "step": step,
                "samples": step * world_size * settings["batch_size"],
                "loss": float(loss.detach()),
                "lr": optimizer.param_groups[0]["lr"],
                "data_wait_share": round(waited / max(seconds, 1e-9), 4),
            }
            history.append(row)
            if rank == 0 and config["monitor"] is not None:
                config["monitor"].add.remote(row)
        if step % config["checkpoint_every"] == 0 or last:
            _report(wrapped, optimizer, {"step": step, "history": history, "starts": starts}, rank)


def _report(wrapped: nn.Module, optimizer: Any, position: dict[str, Any], rank: int) -> None:
    """Report on every rank; rank 0 brings the checkpoint. The directory is uploaded before this returns.

    `position` holds the step, the history of metrics, and the steps at which the run was started or resumed.
    """
    import ray.train

    metrics = {"step": position["step"]}
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": unwrapped(wrapped).state_dict(), "optimizer": optimizer.state_dict(), **position}
        torch.save(state, os.path.join(folder, "state.pt"))
        published = {"state_dict": portable_state(wrapped), "step": position["step"]}
        torch.save(published, os.path.join(folder, "checkpoint.pt"))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class _Objective:
    """The loss of a batch under either objective."""

    def __init__(self, plan: Plan, device: torch.device, rank: int, world_size: int) -> None:
        self.device = device
        self.supervised = plan.settings["objective"] == "supervised"
        self.bf16 = plan.settings["precision"] == "amp_bf16"
        mean = open_clip.OPENAI_DATASET_MEAN
        std = open_clip.OPENAI_DATASET_STD
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        if not self.supervised:
            self.tokenizer = open_clip.get_tokenizer(plan.settings["model"])
            self.loss = open_clip.ClipLoss(
                local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size
            )

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        raw, captions, labels = batch
        pixels = torch.from_numpy(raw).to(self.device, non_blocking=True)
        pixels = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.supervised:
                return nn.functional.cross_entropy(model(pixels), torch.from_numpy(labels).to(self.device))
            images, texts, scale = model(pixels, self.tokenizer(captions).to(self.device))
            return self.loss(images, texts, scale)

    def after_step(self, model: nn.Module) -> None:
        """Clamp the logit scale to ln(100), as CLIP does."""
        inner = unwrapped(model)
        if isinstance(inner, ContrastiveModel):
            with torch.no_grad():
                inner.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
