"""What the join reads of a pool: captions and backgrounds of the photos' neighbours, and backgrounds per class.

Only tables of the test photos and (classes, backgrounds) counts are held; the pool's captions and labels are streamed
part by part, by Ray tasks where the pool is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import DataError
from clipgap_ray.kernels.concepts import Concepts
from clipgap_ray.stages.waits import each_part


@dataclass(frozen=True)
class Neighbours:
    """The k nearest pool rows of n photos; a missing neighbour is False everywhere.

    Attributes:
        names_class: (n, k) bool.
        same_background: (n, k) bool; None without labels of both sides.
        names_wrong: (n, k) bool, names the class that the model gave instead of the right one.
    """

    names_class: np.ndarray
    same_background: np.ndarray | None
    names_wrong: np.ndarray


class PoolReader:
    """A pool with its captions and, if somebody labelled it, backgrounds.

    Args:
        uri: Embeddings of the pool.
        labels: Output of `clipgap attributes` for them, or "".

    Raises:
        DataError: If the labels are those of other embeddings.
    """

    def __init__(self, uri: str, labels: str) -> None:
        self.pool = EmbeddingSet.open(uri)
        self.labels = labels
        self.backgrounds: list[str] = []
        if labels:
            manifest = rundir.read_manifest(labels, "attributes")
            if manifest["digest_of_embeddings"] != self.pool.digest:
                raise DataError(f"{labels} labels {manifest['embeddings']}, not {uri}", hint="label this pool")
            self.backgrounds = manifest["attributes"]

    def neighbours(
        self,
        row_ids: np.ndarray,
        class_names: Sequence[str],
        wrong_names: Sequence[str | None],
        backgrounds: Sequence[str | None] | None,
    ) -> Neighbours:
        """Look at the neighbours of n photos.

        Args:
            row_ids: (n, k) int64 pool rows, -1 where there are fewer.
            class_names: n names of the photos' classes; commas separate synonyms.
            wrong_names: n names of the class that the model gave instead; None where it was right or has no name.
            backgrounds: n backgrounds of the photos, None where unknown; None without labels.
        """
        unique = np.unique(row_ids[row_ids >= 0])
        facts = self._facts(unique)
        names = sorted({*class_names, *(name for name in wrong_names if name)})
        concepts = Concepts(names)
        number = {name: i for i, name in enumerate(names)}
        named = [set(concepts.named(caption)) for caption, _ in facts]
        at = np.where(row_ids >= 0, np.searchsorted(unique, row_ids), -1)

        def mark(wanted: Sequence[Any], holds: Any) -> np.ndarray:
            found = np.zeros(row_ids.shape, bool)
            for (i, j), row in np.ndenumerate(at):
                found[i, j] = row >= 0 and wanted[i] is not None and holds(wanted[i], row)
            return found

        right = mark(class_names, lambda name, row: number[name] in named[row])
        wrong = mark(wrong_names, lambda name, row: number[name] in named[row])
        same = None
        if backgrounds is not None and self.labels:
            same = mark(backgrounds, lambda background, row: facts[row][1] == background)
        return Neighbours(right, same, wrong)

    def _facts(self, row_ids: np.ndarray) -> list[tuple[str | None, str | None]]:
        """Caption and background of some rows, reading only the parts they lie in."""
        parts, inside = schema.split_row_ids(row_ids)
        facts: list[tuple[str | None, str | None]] = []
        for part in np.unique(parts).tolist():
            at = pa.array(inside[parts == part])
            captions = self.pool.metadata(part, ["caption"]).column("caption").take(at).to_pylist()
            labels = self._labels(part).take(at).to_pylist() if self.labels else [None] * len(captions)
            facts += list(zip(captions, labels, strict=True))
        return facts

    def _labels(self, part: int) -> pa.ChunkedArray:
        path = store.join(self.labels, "labels", f"part-{part:05d}.parquet")
        return store.read_table(path, ["attribute"]).column("attribute")

    def counts(self, class_names: Sequence[str]) -> np.ndarray:
        """Count the pool rows that name each class before each background: (C, B) int64."""
        work = partial(_count, self, Concepts(class_names))
        total = np.zeros((len(class_names), len(self.backgrounds)), np.int64)
        for found in each_part(work, self.pool.parts, self.pool.num_rows):
            total += found
        return total


def _count(reader: PoolReader, concepts: Concepts, part: Part) -> np.ndarray:
    captions = reader.pool.metadata(part.number, ["caption"]).column("caption").to_pylist()
    column = {name: i for i, name in enumerate(reader.backgrounds)}
    counts = np.zeros((len(concepts.names), len(column)), np.int64)
    for caption, label in zip(captions, reader._labels(part.number).to_pylist(), strict=True):
        if label is not None:
            for concept in concepts.named(caption):
                counts[concept, column[label]] += 1
    return counts
