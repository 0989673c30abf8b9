"""A service of this process over embeddings that exist: index, metadata, and scores if wanted; no Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from clipgap_ray import rundir, schema
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.hidden import Hidden
from clipgap_ray.index import IndexShard, LocalIndex, shard_uri
from clipgap_ray.kernels import faiss_index
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.metadata import Metadata
from tests.waiting import until


def serve_locally(
    pool: str, folder: Path, hidden: Hidden | None = None, coverage: Coverage | None = None, version: str = "v1"
) -> LocalBackend:
    """A flat index of one shard over a pool embedded by projection, and what answers for it."""
    embeddings, uri = EmbeddingSet.open(pool), str(folder)
    with rundir.RunDirectory(uri, "index", {}) as directory:
        shard = IndexShard(faiss_index.train_empty("Flat", embeddings.dim, np.zeros((0, embeddings.dim)), seed=0), 0)
        for part in embeddings.parts:
            rows = np.asarray(embeddings.images(part.number))
            shard.add(rows, schema.row_ids(part.number, part.num_rows), part.number)
        shard.save(shard_uri(uri, 0))
        directory.finish(
            {"num_shards": 1, "dim": embeddings.dim, "nprobe": 0, "key": "Flat", "recall_at_10": 1.0,
             "modality": "image", "encoder": embeddings.encoder, "index_version": version,
             "shards": [{"number": 0, "rows": embeddings.num_rows}], "embeddings": {"uri": pool}}
        )  # fmt: skip
    encoder = EncoderSettings("projection", batch_size=embeddings.encoder.get("batch_size", 64)).build()
    return LocalBackend(LocalIndex.open(uri), encoder, Metadata(pool, hidden=hidden), name="pool", coverage=coverage)


@contextlib.contextmanager
def over_http(app: Any) -> Iterator[str]:
    """Where an ASGI application listens on loopback, for clients that need a socket."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "uvicorn")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
