"""Read a study's directory. Whatever is missing is None, so that a page can say so instead of failing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError
from clipgap_ray.reporting import pool_side
from clipgap_ray.reporting.pool_side import PoolSide

LARGE_POOL = 20_000_000  # rows; below, one process reads a test set's scores in seconds


@dataclass(frozen=True)
class Run:
    """One trained model. `train_on` is "pool+reference", "pool" or "reference"; objective "clip" or "supervised"."""

    name: str
    split: str
    objective: str
    train_on: str
    seed: int
    num_samples_seen: int
    model: str


@dataclass(frozen=True)
class Queries:
    """Query side of the scores of one test set, row i = test image i.

    Attributes:
        row_ids: (n,) int64.
        uids: n strings.
        tau: (n,) float64 similarity to the nearest reference image; NaN without reference.
        reference_uids: n strings or None.
        similarity: (n,) float64 to the nearest pool image.
        neighbour_ids: n lists of int64 row ids, nearest pool images first.
        neighbour_similarities: n lists of float32.
    """

    row_ids: np.ndarray
    uids: list[str]
    tau: np.ndarray
    reference_uids: list[str | None]
    similarity: np.ndarray
    neighbour_ids: list[list[int]]
    neighbour_similarities: list[list[float]]

    @property
    def has_reference(self) -> bool:
        """Whether thresholds are known for every image."""
        return not bool(np.isnan(self.tau).any())


@dataclass(frozen=True)
class Predictions:
    """Per-image predictions of one model on one test set; `correct` is (n,) bool, the lists have n entries (`uids` may
    be empty where a file without them is read)."""

    uids: list[str]
    correct: np.ndarray
    groups: list[str]
    classes: list[str]


class Study:
    """A study's directory, opened for reading; every table is read once."""

    def __init__(self, uri: str, info: dict[str, Any]) -> None:
        self.uri = uri.rstrip("/")
        self.info = info
        self.name: str = info.get("name", self.uri.rsplit("/", 1)[-1])
        self.tests: list[str] = list(info.get("tests", []))
        self.main_test: str = info.get("main_test") or (self.tests[0] if self.tests else "")
        self.base_split: str = info.get("base_split", "full")
        self.reference: str = info.get("reference") or "reference"
        self.runs = [_run(entry) for entry in info.get("runs", [])]
        # Groups of test sets in the order of the settings, the base first (`groups`).
        self.groups: dict[str, tuple[str, ...]] = {t: tuple(g) for t, g in info.get("groups", {}).items()}
        # For pools that are too large to read here: (folder of score tables, slack) -> counts, by a cluster.
        self.count_pool: Callable[[str, float], PoolSide] | None = None

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open a study.

        Raises:
            DataError: If the directory has no study.json.
        """
        path = store.join(uri, "study.json")
        if not store.exists(path):
            raise DataError(f"{uri} is no study: expected {path}", hint="run `clipgap run STUDY.yaml` first")
        return cls(uri, store.read_json(path))

    def path(self, *names: str) -> str:
        """Return the URI of something in the study."""
        return store.join(self.uri, *names)

    def _json(self, *names: str) -> dict[str, Any] | None:
        path = self.path(*names)
        return store.read_json(path) if store.exists(path) else None

    def results(self, folder: str, file: str) -> dict[str, dict[str, Any]]:
        """Read what a command left in a folder of the study, or in folders in it, by name ("" is the folder itself)."""
        found = {}
        for name in ["", *store.list_names(self.path(folder))]:
            result = self._json(*filter(None, (folder, name, file)))
            if result is not None:
                found[name] = result
        return found

    def summary(self, stage: str) -> dict[str, Any] | None:
        """Read a stage's summary."""
        return self._json(stage, "summary.json")

    def diagnostics(self) -> list[dict[str, Any]]:
        """Read what `gaps` says of every cut and test set; empty when there is nothing."""
        path = self.path("gaps", "diagnostics.json")
        return store.read_json(path) if store.exists(path) else []  # type: ignore[return-value]

    def _table(self, *names: str) -> pa.Table | None:
        path = self.path(*names)
        return store.read_table(path) if store.exists(path) else None

    @functools.cache  # noqa: B019  a study lives as long as its report
    def embeddings(self, name: str) -> EmbeddingSet | None:
        """Open the embeddings of the pool, the reference or a test set."""
        uri = self.path("embed", name)
        return EmbeddingSet.open(uri) if store.exists(store.join(uri, "manifest.json")) else None

    @functools.cache  # noqa: B019
    def queries(self, test: str) -> Queries | None:
        """Read the query scores of a test set."""
        table = self._table("scores", "queries", f"{test}.parquet")
        if table is None or not table.num_rows:
            return None
        column = {name: table.column(name) for name in table.column_names}
        return Queries(
            column["row_id"].to_numpy(),
            column["uid"].to_pylist(),
            column["tau"].to_numpy(),
            column["reference_uid"].to_pylist(),
            column["similarity"].to_numpy(),
            column["nearest_row_ids"].to_pylist(),
            column["nearest_similarities"].to_pylist(),
        )

    def pool_scores(self, test: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the pool side of the scores part by part: bounded memory at any pool size."""
        folder = self.path("scores", "pool", test)
        for name in store.list_names(folder):
            if name.endswith(".parquet"):
                yield store.read_table(store.join(folder, name), columns)

    @functools.cache  # noqa: B019
    def pool_side(self, test: str, slack: float) -> PoolSide:
        """Count the pool side of the scores of a test set, by `count_pool` where it is set."""
        if self.count_pool is not None and self.num_pool_rows() >= LARGE_POOL:
            return self.count_pool(self.path("scores", "pool", test), slack)
        total = pool_side.merge([])
        for part in self.pool_scores(test, list(pool_side.COLUMNS)):
            total = pool_side.merge([total, pool_side.fold(part, slack)])
        return total

    def num_pool_rows(self) -> int:
        """Rows of the uncut pool by its recipe; 0 where there is none."""
        return int(self.recipes().get(self.base_split, {}).get("counts", {}).get("pool") or 0)

    @functools.cache  # noqa: B019
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Read the recipe of every split, in the study's order."""
        found = {}
        for name in self.info.get("splits", []):
            recipe = self._json("splits", f"{name}.recipe.json")
            if recipe is not None:
                found[name] = recipe
        return found

    def gap_matched(self, test: str) -> str | None:
        """Return the split that matches the gap on this test set, the one for the fewest sets if several do."""
        hits = [
            (len(recipe.get("tests", [])), name)
            for name, recipe in self.recipes().items()
            if recipe.get("kind") == "gap-match" and test in recipe.get("tests", [])
        ]
        return min(hits)[1] if hits else None

    @functools.cache  # noqa: B019
    def gaps(self, split: str, test: str) -> pa.Table | None:
        """Read the gap of a test set after a cut."""
        return self._table("gaps", split, f"{test}.parquet")

    @functools.cache  # noqa: B019
    def predictions(self, run: str, test: str) -> Predictions | None:
        """Read a model's per-image predictions."""
        table = self._table(self._evaluated(run, test), run, f"{test}.parquet")
        if table is None or not table.num_rows:
            return None
        return predictions_of(table)

    def _evaluated(self, run: str, name: str) -> str:
        """Folder of a result: `asked` has the further ways of asking that the study's file asks for."""
        return "asked" if name not in self.tests and name not in self._results("eval", run) else "eval"

    @functools.cache  # noqa: B019
    def _results(self, folder: str, run: str) -> tuple[str, ...]:
        names = store.list_names(self.path(folder, run))
        return tuple(name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))

    def result(self, run: str, name: str) -> dict[str, Any] | None:
        """Read what `evaluate` says of a result: prompts, candidates, counts."""
        return self._json(self._evaluated(run, name), run, f"{name}.json")

    @functools.cache  # noqa: B019
    def ways(self, run: str, test: str) -> tuple[str, ...]:
        """Name the results of a run that are `<test>-<way>`: the same test set, asked in other ways."""
        names = dict.fromkeys([*self._results("eval", run), *self._results("asked", run)])
        # A test set may be named like a way of another one ("in", "in-a"): the longest name owns a result.
        return tuple(
            name
            for name in names
            if name not in self.tests
            and max((t for t in self.tests if name.startswith(f"{t}-")), key=len, default="") == test
        )

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """Read a run's training log; empty when there is none."""
        path = self.path("runs", run, "metrics.jsonl")
        if not store.exists(path):
            return []
        return [json.loads(line) for line in store.read_bytes(path).splitlines() if line.strip()]

    def truth(self) -> pa.Table | None:
        """Read what was planted; None for real data."""
        return self._table("world", "truth.parquet")

    def dropped_rows(self, part: int) -> np.ndarray:
        """Read (k,) int64 row ids of a part of the pool that dedup removed."""
        table = self._table("dedup", "keep", f"part-{part:05d}.parquet")
        if table is None:
            return np.zeros(0, np.int64)
        return table.filter(pc.invert(table["keep"]))["row_id"].to_numpy()

    def keep_table(self, columns: list[str]) -> pa.Table | None:
        """Read the dedup decisions of all parts."""
        folder = self.path("dedup", "keep")
        names = [name for name in store.list_names(folder) if name.endswith(".parquet")]
        return pa.concat_tables([store.read_table(store.join(folder, n), columns) for n in names]) if names else None

    @functools.cache  # noqa: B019
    def digests(self) -> list[dict[str, str]]:
        """Name every artefact that the report reads by its content."""
        records = []
        for name in ["pool", self.reference, *self.tests]:
            embeddings = self.embeddings(name)
            if embeddings is not None:
                records.append({"artefact": f"embed/{name}", "digest": embeddings.digest})
        for stage in ("dedup", "scores"):
            manifest = self._json(stage, "manifest.json")
            if manifest is not None:
                records.append({"artefact": stage, "digest": str(manifest.get("digest", ""))})
        for name, recipe in self.recipes().items():
            records.append({"artefact": f"splits/{name}", "digest": store.digest(recipe)})
        for run in self.runs:
            names = [name for test in self.tests for name in (test, *self.ways(run.name, test))]
            results = [(self._evaluated(run.name, name), name) for name in names]
            results += [(folder, f"{test}.fewshot") for folder in ("probes", "linear") for test in self.tests]
            for folder, name in results:
                path = self.path(folder, run.name, f"{name}.parquet")
                if store.exists(path):
                    digest = store.sha256(store.read_bytes(path))
                    records.append({"artefact": f"{folder}/{run.name}/{name}", "digest": digest})
        for folder in ("agreement", "join", "discover"):
            for name, result in self.results(folder, f"{folder}.json").items():
                records.append({"artefact": "/".join(filter(None, (folder, name))), "digest": store.digest(result)})
        return records


def _run(entry: dict[str, Any]) -> Run:
    return Run(
        entry["name"],
        entry.get("split") or "",
        entry.get("objective", "clip"),
        entry.get("train_on", "pool"),
        int(entry.get("seed", 0)),
        int(entry.get("num_samples_seen", 0)),
        entry.get("model", ""),
    )


def predictions_of(table: pa.Table) -> Predictions:
    """Take what reports need out of a table with `class_name, group, correct` and, if it has them, `uid`."""
    return Predictions(
        table.column("uid").to_pylist() if "uid" in table.column_names else [],
        table.column("correct").to_numpy(zero_copy_only=False).astype(bool),
        [group or "" for group in table.column("group").to_pylist()],
        [name or "" for name in table.column("class_name").to_pylist()],
    )


def aligned(found: list[Predictions], what: str) -> tuple[Predictions, np.ndarray]:
    """Put several models' predictions of one test set on the images that all of them have.

    Args:
        found: Of r models, at least one; those that share their uids (or have none) are taken as they are.
        what: Whose they are, for the error.

    Returns:
        The first's predictions on the n shared images, and (r, n) bool outcomes of all in that order.

    Raises:
        DataError: If they share no image.
    """
    first = found[0]
    if all(p.uids == first.uids for p in found):
        return first, np.stack([p.correct for p in found])
    at = np.stack([positions(first.uids, p.uids) for p in found])
    shared = (at >= 0).all(axis=0)
    kept = np.nonzero(shared)[0].tolist()
    if not kept:
        raise DataError(f"{what} share no photo", hint="predictions of one test set must be read the same way")
    uids, groups, classes = ([values[i] for i in kept] for values in (first.uids, first.groups, first.classes))
    outcomes = np.stack([p.correct[own[shared]] for p, own in zip(found, at, strict=True)])
    return Predictions(uids, outcomes[0], groups, classes), outcomes


def positions(uids: list[str], among: list[str]) -> np.ndarray:
    """Return where each of n uids stands in another list: (n,) int64, -1 where it does not."""
    at = {uid: i for i, uid in reversed(list(enumerate(among)))}
    return np.array([at.get(uid, -1) for uid in uids], dtype=np.int64)
