"""The model that is trained, its loss and its optimizer: open_clip's parts, put together as DDP wants them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import SigLipLoss
from torch import nn

from clipgap_ray.encoder import register_models
from clipgap_ray.stages.train_data import Batch, Plan

MAX_LOGIT_SCALE = math.log(100)
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # arXiv 2303.15343, section 3.2


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

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map pixels and tokens to unit image rows, unit text rows, the logit scale, and SigLIP's bias if any."""
        images = self.clip.encode_image(pixels, normalize=True)
        texts = self.clip.encode_text(tokens, normalize=True)
        bias = () if self.clip.logit_bias is None else (self.clip.logit_bias,)
        return images, texts, self.clip.logit_scale.exp(), *bias


def build_model(settings: dict[str, Any], num_classes: int) -> nn.Module:
    """Build the model with weights that depend on the seed only."""
    register_models()
    torch.manual_seed(settings["seed"])
    extra = dict(SIGLIP_START) if settings["siglip"] else {}
    model = open_clip.create_model(settings["model"], force_patch_dropout=settings["force_patch_dropout"], **extra)
    if settings["grad_checkpointing"]:
        model.set_grad_checkpointing()
    if settings["objective"] == "supervised":
        config = open_clip.get_model_config(settings["model"])
        built: nn.Module = Classifier(model.visual, config["embed_dim"], num_classes)
    else:
        built = ContrastiveModel(model)
    if settings["torchcompile"]:
        built.compile()  # in place: names of parameters stay open_clip's
    return built


def portable_state(model: nn.Module, model_name: str) -> dict[str, torch.Tensor]:
    """Return the state dict that users load: open_clip's own names for CLIP, ours for a classifier.

    SigLIP's bias moves all logits alike, so a model whose configuration has none is published without it.
    """
    inner = unwrapped(model)
    if not isinstance(inner, ContrastiveModel):
        return dict(inner.state_dict())
    state = dict(inner.clip.state_dict())
    if "init_logit_bias" not in (open_clip.get_model_config(model_name) or {}):
        state.pop("logit_bias", None)
    return state


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


def make_loss(siglip: bool, rank: int, world_size: int) -> nn.Module:
    """Return open_clip's loss over the whole batch: features of all ranks are gathered with their gradients."""
    if siglip:
        return SigLipLoss(cache_labels=True, rank=rank, world_size=world_size)
    return open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size
    )


Forward = Callable[[nn.Module, int], tuple[torch.Tensor, ...]]


def accumulate(
    model: nn.Module, forward: Forward, num_passes: int, loss_of: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Backpropagate a contrastive loss whose batch does not fit into one forward pass; every pair is a negative.

    First all features without gradients, then the loss and its gradient with respect to them, then every forward pass
    again, backwards from its features' gradient. That is the chain rule, so the gradient is the whole batch's; it costs
    one more forward pass per step. (open_clip's own loop computes the loss once per pass, and so adds up the gradient
    of the temperature as often.) Gradients are exchanged between ranks once, with the last pass.

    Args:
        model: DDP or bare.
        forward: Runs pass i of a model: (image rows, text rows, logit scale[, bias]). Called twice for each pass, it
            must do the same both times.
        num_passes: Forward passes.
        loss_of: Maps the same, the rows of all passes together, to the loss.

    Returns:
        The loss, detached.
    """
    with torch.no_grad(), _batch_statistics_untouched(model):
        passes = [forward(unwrapped(model), number) for number in range(num_passes)]
    images, texts = (torch.cat([found[i] for found in passes]).requires_grad_() for i in range(2))
    scalars = [scalar.detach().clone().requires_grad_() for scalar in passes[0][2:]]
    loss = loss_of(images, texts, *scalars)
    image_grad, text_grad, *scalar_grads = torch.autograd.grad(loss, [images, texts, *scalars])
    start = 0
    for number in range(num_passes):
        last = number == num_passes - 1
        with contextlib.nullcontext() if last else _no_sync(model):
            own_images, own_texts, *own_scalars = forward(model, number)
            rows = slice(start, start + len(own_images))
            start += len(own_images)
            surrogate = (own_images * image_grad[rows]).sum() + (own_texts * text_grad[rows]).sum()
            for own, grad in zip(own_scalars, scalar_grads, strict=True):
                surrogate = surrogate + (own * grad).sum() * last  # once; times 0 keeps the graph whole for DDP
            surrogate.backward()
    return loss.detach()


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _batch_statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by the batch without moving their running statistics: that pass comes again."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class Objective:
    """The loss of a batch under either objective, and its gradient."""

    def __init__(self, plan: Plan, device: torch.device, rank: int, world_size: int) -> None:
        self.device = device
        self.size = plan.settings["batch_size"]
        self.seed = plan.settings["seed"]
        self.supervised = plan.settings["objective"] == "supervised"
        self.bf16 = plan.settings["precision"] == "amp_bf16"
        mean = open_clip.OPENAI_DATASET_MEAN
        std = open_clip.OPENAI_DATASET_STD
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        if not self.supervised:
            self.tokenizer = open_clip.get_tokenizer(plan.settings["model"])
            self.loss = make_loss(plan.settings["siglip"], rank, world_size)

    def backward(self, model: nn.Module, batch: Batch, position: int) -> torch.Tensor:
        """Add the gradient of a batch to the parameters.

        Args:
            model: Wrapped or not.
            batch: This rank's samples of the step.
            position: Of the first of them in the stream: seeds what the model draws (patch dropout).

        Returns:
            The loss, detached.
        """
        inputs = [self._inputs(batch, start) for start in range(0, len(batch[2]), self.size)]

        def forward(module: nn.Module, number: int) -> Any:
            state = np.random.SeedSequence([self.seed, position + number * self.size]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
            with self._autocast():
                return module(*inputs[number]) if not self.supervised else module(inputs[number][0])

        def loss_of(*features: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                return self.loss(*features)

        if self.supervised:
            return self._classify(model, forward, [labels for _, labels in inputs])
        if len(inputs) > 1:
            return accumulate(model, forward, len(inputs), loss_of)
        loss = loss_of(*forward(model, 0))
        loss.backward()
        return loss.detach()

    def _classify(self, model: nn.Module, forward: Forward, labels: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for number, own in enumerate(labels):
            with contextlib.nullcontext() if number == len(labels) - 1 else _no_sync(model):
                logits: Any = forward(model, number)
                with self._autocast():
                    loss = nn.functional.cross_entropy(logits, own) / len(labels)
                loss.backward()
                total += loss.detach()
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _inputs(self, batch: Batch, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        raw, captions, labels = (column[start : start + self.size] for column in batch)
        pixels = torch.from_numpy(raw).to(self.device, non_blocking=True)
        pixels = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        second = torch.from_numpy(labels) if self.supervised else self.tokenizer(captions)
        return pixels, second.to(self.device)

    def after_step(self, model: nn.Module) -> None:
        """Clamp the logit scale to ln(100), as CLIP does."""
        inner = unwrapped(model)
        if isinstance(inner, ContrastiveModel):
            with torch.no_grad():
                inner.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
