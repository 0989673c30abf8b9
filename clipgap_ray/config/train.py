"""Settings of `train`; names are open_clip's where it has the setting."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray.config.base import Later, Operational, Settings
from clipgap_ray.config.evaluate import EvaluateSettings as EvaluateSettings  # its place before it had its own module
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError

Reporter = Literal["tensorboard", "wandb", "mlflow"]


class TrainSettings(Settings):
    """Train CLIP on a source or a split of it, straight from the original shards; or a classifier on labelled data."""

    source: str
    """Tars, parquet of images or folders, or a labelled set; as for `embed`."""
    out: str
    """Run directory; running again resumes it."""
    model: str
    """open_clip model name (its image tower alone under `--objective supervised`)."""
    split: str = ""
    """NAME.npy: train on these uids only (the virtual split: shards are read where they are)."""
    reference: str = ""
    """Labelled set to mix in, captioned with its first template ("a photo of a {class}")."""
    objective: Literal["clip", "supervised"] = "clip"
    """clip: contrastive on image-text pairs; supervised: classify the labels of the source."""
    num_samples: pydantic.PositiveInt = 100_000
    """Samples seen in all; a source with fewer is seen in several epochs."""
    batch_size: pydantic.PositiveInt = 64
    """Samples per worker and forward pass."""
    accum_freq: Annotated[pydantic.PositiveInt, Later()] = 1
    """Forward passes per step: the global batch is workers x batch_size x accum_freq, all of it negatives."""
    siglip: Annotated[bool, Later()] = False
    """SigLIP's pairwise sigmoid loss instead of CLIP's; needs no gather of the whole batch."""
    lr: pydantic.PositiveFloat = 1e-3
    """Peak learning rate (open_clip's ViT default is 5e-4)."""
    warmup: pydantic.NonNegativeInt = 50
    """Steps of linear warm-up; a cosine follows."""
    wd: pydantic.NonNegativeFloat = 0.2
    """Weight decay, not applied to gains and biases."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.98
    """AdamW."""
    eps: float = 1e-6
    """AdamW."""
    grad_clip_norm: Annotated[pydantic.PositiveFloat | None, Later()] = None
    """Scale gradients down to this norm."""
    seed: int = 0
    """Seed of initial weights, sample order and augmentation."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image (open_clip's default)."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """amp_bf16: bfloat16 autocast."""
    grad_checkpointing: Annotated[bool, Operational()] = False
    """Compute activations again in the backward pass instead of keeping them."""
    force_patch_dropout: Annotated[float | None, Later(), pydantic.Field(ge=0, lt=1)] = None
    """Share of patches that a vision transformer leaves out while it trains."""
    torchcompile: Annotated[bool, Later()] = False
    """Compile the model with torch.compile."""
    workers: pydantic.NonNegativeInt = 2
    """DDP workers. Part of the run: it sets the global batch. 0 trains in this process (for tests)."""
    min_workers: Annotated[pydantic.NonNegativeInt, Operational()] = 0
    """Go on with as few as these when nodes leave, and grow back: the global batch stays, by more forward passes per
    step. 0: wait for all workers."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""
    window: pydantic.PositiveInt = 50_000
    """Samples that are shuffled together."""
    dataset_resampled: Annotated[bool, Later()] = False
    """Draw samples with replacement instead of each once per epoch."""
    train_data_upsampling_factors: Annotated[str, Later()] = ""
    """With --dataset-resampled: weight of a sample by source, joined by `::` as the sources are; a last one more for
    the reference."""
    decoders: Annotated[pydantic.NonNegativeInt, Operational()] = 0
    """Ray Data actors per worker that read, decode and augment, on any CPUs of the cluster; 0: the worker's thread."""
    samples: Annotated[str, Operational()] = ""
    """Directory of the sample index of `source`, to share between runs; default RUN/samples."""
    checkpoint_every: Annotated[pydantic.PositiveInt, Operational()] = 200
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[pydantic.PositiveInt, Operational()] = 2
    """How many of the latest checkpoints stay in RUN/train."""
    max_failures: Annotated[pydantic.NonNegativeInt, Operational()] = 2
    """How often a run starts again from its last checkpoint after losing a worker; preempted nodes do not count."""
    report_to: Annotated[tuple[Reporter, ...], Operational()] = ("tensorboard",)
    """Where metrics go besides RUN/metrics.jsonl; tensorboard is RUN/tensorboard."""
    limits: Limits = LimitsSettings()
    """When to stop."""

    @property
    def global_batch(self) -> int:
        """Samples per step, over all workers and forward passes."""
        return max(1, self.workers) * self.batch_size * self.accum_freq

    @pydantic.model_validator(mode="after")
    def _possible(self) -> TrainSettings:
        if self.min_workers > self.workers:
            raise ConfigError(f"--min-workers {self.min_workers} is more than --workers {self.workers}")
        passes = self.workers * self.accum_freq
        uneven = [n for n in range(self.min_workers or self.workers, self.workers) if passes % n]
        if uneven:
            raise ConfigError(
                f"--min-workers {self.min_workers}: {passes} forward passes per step do not divide among {uneven[0]}",
                hint=f"choose --accum-freq so that workers x accum_freq is a multiple of {uneven[0]}",
            )
        if self.objective == "supervised" and self.siglip:
            raise ConfigError("--siglip is a loss on pairs: --objective supervised has none")
        if self.train_data_upsampling_factors and not self.dataset_resampled:
            raise ConfigError(
                "--train-data-upsampling-factors is for --dataset-resampled",
                hint="each sample once per epoch leaves nothing to weigh",
            )
        self.factors()
        return self

    def factors(self) -> list[float]:
        """Return the weights of the sources, the reference's last; empty: all alike.

        Raises:
            ConfigError: Unless they are positive numbers, one per source.
        """
        if not self.train_data_upsampling_factors:
            return []
        words = self.train_data_upsampling_factors.split("::")
        names = [*self.source.split("::"), *([self.reference] if self.reference else [])]
        try:
            factors = [float(word) for word in words]
        except ValueError:
            factors = []
        if len(factors) != len(names) or not all(factor > 0 for factor in factors):
            raise ConfigError(
                f"--train-data-upsampling-factors {self.train_data_upsampling_factors!r}: expected {len(names)} "
                f"positive numbers joined by '::', one for each of {', '.join(names)}"
            )
        return factors
