"""Settings of `index`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.config.limits import Limits, LimitsSettings
from clipgap_ray.errors import ConfigError


class IndexSettings(Settings):
    """Build a sharded FAISS index over a folder of embeddings; running again adds the parts that are new."""

    out: str
    """Directory for the index."""
    embeddings: str = ""
    """Complete folder of embeddings."""
    follow: str = ""
    """Instead of --embeddings: a folder that `clipgap embed` is writing; parts are added as they are committed."""
    key: str = "auto"
    """FAISS factory string (Flat, IVF1024,Flat, IVF4096,PQ64, HNSW32, ...); auto chooses by rows, memory and recall."""
    shards: pydantic.PositiveInt = 2
    """Index shards: FAISS indexes that are built and searched side by side. Part p goes to shard p % N."""
    min_recall: Annotated[float | None, Operational()] = None
    """Fail unless recall@10, measured against exact search, reaches this (0 to 1); approximate keys aim at 0.95
    without it, and 1 makes auto choose an exact index."""
    modality: Literal["image", "text"] = "image"
    """Which rows to index."""
    seed: int = 0
    """Of the training sample and the quantisers."""
    memory_gb: Annotated[float, Operational()] = 0.0
    """Memory that all shards together may take, for auto; 0 = 60 % of the cluster's."""
    gpus: Annotated[float, pydantic.Field(ge=0, le=1), Operational()] = 0.0
    """GPU of the training and of each builder, where faiss-gpu is installed (`EXTRAS=gpu`): 0.5 lets two share one.
    The cells of IVF keys are found there; the index is the same kind of file."""
    recall_queries: Annotated[pydantic.PositiveInt, Operational()] = 200
    """Rows of the pool to measure recall with; each is searched for its neighbours other than itself."""
    merge: Annotated[str, Operational()] = ""
    """Folder for the index as one FAISS file with its metadata, as clip-retrieval reads it (image.index, metadata/).
    With --out alone: of an index that is there. Needs as much memory as the merged index."""
    blocklist: Annotated[str, Operational()] = ""
    """Takedown list, as for `embed`: its rows stay in the index, but no search finds them (tombstones); it takes the
    place of the list before. With --out alone: of an index that is there."""
    poll_s: Annotated[pydantic.PositiveFloat, Operational()] = 1.0
    """Seconds between looks at the folder that --follow watches."""
    limits: Limits = LimitsSettings()
    """When to stop: between two batches of parts. Builders keep what they saved, about every half minute."""

    @property
    def source(self) -> str:
        """The folder of embeddings, growing or complete."""
        return self.follow or self.embeddings

    @pydantic.field_validator("min_recall")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--min-recall {value} is not between 0 and 1", hint="for example --min-recall 0.95")
        return value

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> IndexSettings:
        of_one_that_is_there = (self.merge or self.blocklist) and not self.source
        if bool(self.embeddings) == bool(self.follow) and not of_one_that_is_there:
            raise ConfigError(
                f"--embeddings is {self.embeddings!r} and --follow is {self.follow!r}: expected exactly one of them",
                hint="clipgap index --embeddings EMB --out INDEX",
            )
        return self
