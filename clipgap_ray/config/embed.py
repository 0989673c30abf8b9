"""Settings of `embed` and `import`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
import tyro

from clipgap_ray.config.base import Operational, Settings, Storage, StorageSettings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.embeddings import parse_part_range
from clipgap_ray.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Decode = Literal["exact", "fast"]


class EmbedSettings(Settings):
    """Embed every image (and caption) of a source into a folder of unit rows, one part per shard."""

    source: tyro.conf.Positional[str]
    """Tars, parquet of images or folders of images: a directory, glob, `{000..099}.tar`, `@list.txt`, joined by `::`;
    or a labelled test set (wds, CounterAnimal's tree, one folder per class, manifest.csv)."""
    out: str
    """Folder of embeddings to write; running again continues it."""
    model: str
    """open_clip model name, `hf-hub:org/name`, `local-dir:path`, `timm:NAME` (images only), or `projection`
    (deterministic, no weights); also clip-retrieval's `ViT-B/32` and `open_clip:NAME/TAG`, and `NAME,TAG`."""
    pretrained: str = ""
    """Tag of open_clip, checkpoint file (timm: always a file), or run directory of `clipgap train`."""
    also: tuple[str, ...] = ()
    """Further encoders in the same read of the data, each into a folder of its own: `FOLDER=MODEL,WEIGHTS`, spelled as
    in --model and --pretrained. Every folder is what `embed` would write for that encoder alone; part and row numbers
    are the same in all."""
    text: bool = True
    """Embed captions too; `--no-text` leaves them out."""
    decode: Decode = "exact"
    """exact: open_clip's pixels, bit by bit. fast: large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size and resized
    by other code; cosines to the exact rows are 0.998 to 1, 0.98 at worst (benchmarks/embed.md), hashes change too."""
    crop_border: int = 0
    """Pixels to cut from every side first (ObjectNet's red border: 2)."""
    batch_size: pydantic.PositiveInt = 128
    """Rows per forward pass. Part of the encoder's fingerprint: the last bits of an embedding depend on it."""
    precision: Precision = "auto"
    """Autocast on GPUs: auto is fp16 there and fp32 on CPUs."""
    blocklist: str = ""
    """Takedown list: leave out every sample whose uid, sha256 or url it names (one per line, # comments; or .npy of
    uids). Outputs record its digest, not its entries."""
    shards: str | None = None
    """Only the shards FIRST:END of the source, for a trial; marked in the manifest."""
    sample: pydantic.PositiveFloat = 1.0
    """Only this share of the samples, chosen by uid; marked in the manifest."""
    device: Annotated[Device, Operational()] = "auto"
    """auto: GPUs if the cluster has any, else CPUs."""
    workers: Annotated[int, Operational()] = 0
    """Encoder actors at most; 0 = as many as the GPUs hold, or one per CPU core."""
    min_workers: Annotated[pydantic.PositiveInt, Operational()] = 1
    """Encoder actors to start with and to keep; more are started while chunks wait for them."""
    gpus_per_worker: Annotated[pydantic.PositiveFloat, Operational()] = 1.0
    """GPUs that an encoder actor asks for; 0.5 puts two on each, so that one encodes while the other copies."""
    threads: int = 1
    """torch threads per encoder; part of the fingerprint."""
    max_skip_fraction: Annotated[float, Operational()] = 0.01
    """Exit with code 3 when a larger share of the samples had to be skipped."""
    yes: Annotated[bool, Operational()] = False
    """Embed on CPUs even if that is predicted to take more than two hours."""
    storage: Storage = StorageSettings()
    """How S3 stores are reached."""
    limits: Limits = LimitsSettings()
    """When to stop."""

    @pydantic.field_validator("shards")
    @classmethod
    def _range(cls, value: str | None) -> str | None:
        parse_part_range(value)
        return value

    @pydantic.model_validator(mode="after")
    def _workers_fit(self) -> Self:
        if self.workers and self.min_workers > self.workers:
            raise ConfigError(f"min_workers is {self.min_workers}, more than workers, {self.workers}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ConfigError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; Ray shares one GPU or gives whole ones: "
                "expected a fraction of one, or a whole number"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _folders_differ(self) -> Self:
        folders = [self.out.rstrip("/"), *(folder for folder, _ in self.also_pairs())]
        if len(set(folders)) < len(folders):
            twice = next(folder for folder in folders if folders.count(folder) > 1)
            raise ConfigError(f"--out and --also name the folder {twice} twice", hint="each encoder needs its own")
        if self.decode == "fast" and self.crop_border:
            raise ConfigError(
                f"--decode fast with --crop-border {self.crop_border}: a border is cut in pixels of the full size",
                hint="leave out --decode",
            )
        return self

    def also_pairs(self) -> list[tuple[str, str]]:
        """Return `also` as (folder, model with its weights).

        Raises:
            ConfigError: If an entry is not FOLDER=MODEL.
        """
        pairs = []
        for entry in self.also:
            folder, equals, model = entry.partition("=")
            if not (folder and equals and model):
                raise ConfigError(
                    f"--also {entry!r} is not FOLDER=MODEL,WEIGHTS", hint="for example --also out/dino=timm:NAME,FILE"
                )
            pairs.append((folder.rstrip("/"), model))
        return pairs


class PlanSettings(EmbedSettings):
    """What embedding a source would take: rows, disk, memory, time. The words of `embed`; writes nothing."""

    out: str = ""
    """As for `embed`; not looked at."""
    probe_rows: pydantic.PositiveInt = 256
    """Samples to read and decode."""
    cores: pydantic.NonNegativeInt = 0
    """Cores of the cluster to predict for; 0 = those of this machine. The probe is of one core, here."""
    gpus: pydantic.NonNegativeInt = 0
    """GPUs of that cluster, each like the one here; 0 = those of this machine."""


class ImportSettings(Settings):
    """Bring ready embeddings into the layout: a clip-retrieval folder, DataComp npz beside parquet, or parquet."""

    folder: tyro.conf.Positional[str]
    """Folder with img_emb/*.npy and metadata/*.parquet, or *.npz with *.parquet, or *.parquet with a vector column."""
    out: str
    """Folder of embeddings to write."""
    model: str
    """The open_clip model that made the rows; recorded as given, and compared with the other side of every score."""
    pretrained: str
    """Its pretrained tag; recorded as given."""
    embedding_column: str = "embedding"
    """Column with the vectors, for parquet folders; for npz the arrays' prefix (`l14`, `b32`)."""
    storage: Storage = StorageSettings()
    """How S3 stores are reached."""
