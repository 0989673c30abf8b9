"""How many of the true neighbours an index finds, measured through its actors, and the effort that it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from clipgap_ray.config.index import IndexSettings
from clipgap_ray.embeddings import Part
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.nearest_exact import nearest
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.sharded import ShardedIndex, Source
from clipgap_ray.stages.waits import bounded

GROUP_BYTES = 1 << 28  # rows that a task of the exact search reads
RECALL_K = 10
TARGET_RECALL = 0.95


def calibrate(index: ShardedIndex, source: Source, settings: IndexSettings, key: str) -> tuple[int, float]:
    """Return the smallest nprobe that reaches the target recall@10 (0 where a key has none) and that recall."""
    queries, own = source.sample(settings.recall_queries, settings.seed + 1)
    if not len(queries):
        return 0, 1.0
    true_similarities, true_ids = _drop_own(*_exact(source, queries), own)
    target = TARGET_RECALL if settings.min_recall is None else settings.min_recall
    nprobe, most = max(ray.get([actor.efforts.remote() for actor in index.actors]))
    while True:
        _, found = _drop_own(*index.search(queries, RECALL_K + 1, nprobe=nprobe or None), own)
        recall = faiss_index.recall_at_k(found, true_ids, true_similarities, RECALL_K)
        if recall >= target or nprobe >= most:
            break
        nprobe = min(2 * nprobe, most)
    logger.info("index: recall@10 %.4f over %d queries, nprobe %d", recall, len(queries), nprobe)
    if settings.min_recall is not None and recall < settings.min_recall:
        raise ConfigError(
            f"recall@10 of key {key} is {recall:.4f} over {len(queries)} queries (nprobe {nprobe} of at most {most}), "
            f"below --min-recall {settings.min_recall:g}",
            hint="use --key Flat, a key with longer codes or a refinement, or a lower --min-recall",
        )
    return nprobe, recall


def _exact(source: Source, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact neighbours of (nq, d) queries over the whole source, enough of them to see ties at the tenth."""
    width = 2 * RECALL_K + 1
    shared = ray.put((source, queries))
    # Half a CPU: builders hold theirs meanwhile, and where each is on a node of one CPU, no node has a whole one free.
    task = ray.remote(num_cpus=0.5)(_exact_in_group)
    parts = bounded(lambda group: task.remote(shared, group, width), source.rows.groups(GROUP_BYTES),
                    needs={"CPU": 0.5})  # fmt: skip
    return merge_topk(list(parts), width)


def _exact_in_group(shared: Any, group: list[Part], width: int) -> tuple[np.ndarray, np.ndarray]:
    source, queries = shared
    similarities, row_ids = nearest(queries, (source.read(part.number) for part in group), width)
    return similarities.astype(np.float32), row_ids


def _drop_own(similarities: np.ndarray, row_ids: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove every query itself from its neighbours: finding oneself says nothing about recall."""
    others = np.where(row_ids == own[:, None], np.int64(-1), row_ids)
    return merge_topk([(similarities, others)], row_ids.shape[1])
