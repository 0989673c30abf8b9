"""How covered is an image by the training set, how does that compare with the test sets, and what would a split do?

Answers come from a score run: its test rows and thresholds in memory, its similarities as distributions, and the
recipes of splits. Similarities to test rows are exact (design contract 3); the nearest training rows come from the
index. Memory: (2 d + 40) bytes per test row and 16 bytes per uid of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import subsets
from clipgap_ray.kernels.vectors import exact_matrix, to_storage
from clipgap_ray.serving.messages import SetCoverage, SetInfo, SetNeighbour, SplitInfo, SplitVerdict

HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class SetRows:
    """A test set of the score run.

    Attributes:
        name: Its name.
        rows: (q, d) float16.
        tau: (q,) float64 thresholds; NaN without a reference.
        nearest: (q,) float64 similarities to the nearest pool row, sorted.
        uids: q uids.
        class_names: q class names.
    """

    name: str
    rows: np.ndarray
    tau: np.ndarray
    nearest: np.ndarray
    uids: list[str]
    class_names: list[str]


@dataclass(frozen=True)
class Split:
    """A split: its recipe and its sorted uids, memory-mapped when local."""

    recipe: dict[str, Any]
    uids: np.ndarray

    def __contains__(self, uid: str) -> bool:
        """Whether a uid stays."""
        return bool(subsets.contains(self.uids, schema.pack_uids([uid]))[0])


class Coverage:
    """A score run and splits, opened for questions.

    Args:
        scores: Output of `clipgap score`.
        splits: Splits NAME.npy of the same pool.

    Raises:
        DataError: If something is missing.
        ConfigError: If a split was cut from another pool.
    """

    def __init__(self, scores: str, splits: tuple[str, ...] = ()) -> None:
        manifest = rundir.read_manifest(scores, "score")
        self.encoder: dict[str, Any] = manifest["encoder"]
        self.tests = [_open_test(scores, name, test["uri"]) for name, test in manifest["tests"].items()]
        self.splits = [_open_split(uri, manifest["pool"]["digest"]) for uri in splits]

    def check(self, encoder: dict[str, Any]) -> None:
        """Raise IndexMismatchError unless the encoder of the queries made the scores."""
        check_same_encoder(self.encoder, encoder, ("the scores", "the service's encoder"))

    def compare(self, row: np.ndarray, nearest: float, k: int) -> list[SetCoverage]:
        """Compare a row with every test set.

        Args:
            row: (d,) float32 unit row.
            nearest: Its similarity to the nearest training row.
            k: Test rows to name per test set.
        """
        return [_compare(test, row, nearest, k) for test in self.tests]

    def judge(self, row: np.ndarray, uid: str | None) -> list[SplitVerdict]:
        """Say which splits would drop a row: by their own lists for a uid of the pool, else by their rules."""
        own = {test.name: exact_matrix(to_storage(row[None]), test.rows)[0] for test in self.tests}
        tau = {test.name: test.tau for test in self.tests}
        return [_judge(split, own, tau, uid) for split in self.splits]

    def keeping(self, uids: list[str]) -> list[list[str]]:
        """Return for each uid the names of the splits that keep it."""
        if not uids:
            return []
        packed = schema.pack_uids(uids)
        stays = [subsets.contains(split.uids, packed) for split in self.splits]
        return [
            [split.recipe["name"] for split, own in zip(self.splits, stays, strict=True) if own[at]]
            for at in range(len(uids))
        ]

    def uids(self) -> dict[str, np.ndarray]:
        """Return the sorted uids of every split by its name, memory-mapped when local."""
        return {split.recipe["name"]: split.uids for split in self.splits}

    def sets(self) -> list[SetInfo]:
        """Return the test sets with the histograms of their nearest similarities."""
        return [_histograms(test) for test in self.tests]

    def describe(self) -> list[SplitInfo]:
        """Return the splits with their kinds, test sets and sizes."""
        return [
            SplitInfo(
                name=split.recipe["name"],
                kind=split.recipe["kind"],
                tests=split.recipe.get("tests", []),
                pool=split.recipe["counts"]["pool"],
                kept=split.recipe["counts"]["kept"],
            )
            for split in self.splits
        ]


def _open_test(scores: str, name: str, uri: str) -> SetRows:
    embeddings = EmbeddingSet.open(uri)
    table = store.read_table(store.join(scores, "queries", f"{name}.parquet"), ["uid", "tau", "similarity"])
    classes = embeddings.all_metadata(["class_name"]).column("class_name").to_pylist()
    return SetRows(
        name,
        embeddings.all_images(),
        table.column("tau").to_numpy(),
        np.sort(table.column("similarity").to_numpy()),
        table.column("uid").to_pylist(),
        [value or "" for value in classes],
    )


def _histograms(test: SetRows) -> SetInfo:
    tau = test.tau[~np.isnan(test.tau)]
    both = np.concatenate([test.nearest, tau])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), HISTOGRAM_BINS + 1)
    return SetInfo(
        name=test.name,
        rows=len(test.nearest),
        edges=edges.tolist(),
        train=np.histogram(test.nearest, edges)[0].tolist(),
        reference=np.histogram(tau, edges)[0].tolist() if len(tau) else None,
    )


def recipe_uri(split: str) -> str:
    """Return where the recipe of a split NAME.npy lies."""
    return split.removesuffix(".npy") + ".recipe.json"


def _open_split(uri: str, pool: str) -> Split:
    recipe = store.read_json(recipe_uri(uri))
    if recipe["inputs"]["pool"]["digest"] != pool:
        raise ConfigError(
            f"split {uri} was cut from another pool than the scores", hint="give splits of this score run"
        )
    return Split(recipe, store.read_array(uri))


def _compare(test: SetRows, row: np.ndarray, nearest: float, k: int) -> SetCoverage:
    similarity = exact_matrix(to_storage(row[None]), test.rows)[0]
    order = np.argsort(-similarity, kind="stable")[:k]
    margin = similarity - test.tau
    known = bool(len(margin)) and not np.isnan(test.tau).any()
    below = int(np.searchsorted(test.nearest, nearest, side="left"))
    return SetCoverage(
        test=test.name,
        similarity=float(similarity.max()) if len(similarity) else None,
        margin=float(margin.max()) if known else None,
        percentile=100.0 * below / len(test.nearest) if len(test.nearest) else None,
        neighbours=[
            SetNeighbour(
                uid=test.uids[i],
                class_name=test.class_names[i],
                similarity=float(similarity[i]),
                tau=None if np.isnan(test.tau[i]) else float(test.tau[i]),
            )
            for i in order.tolist()
        ],
    )


def _judge(split: Split, own: dict[str, np.ndarray], tau: dict[str, np.ndarray], uid: str | None) -> SplitVerdict:
    recipe = split.recipe
    verdict = SplitVerdict(name=recipe["name"], kind=recipe["kind"])
    if uid is not None:
        verdict.drops, verdict.decided_by = uid not in split, "list"
        return verdict
    if any(test not in own for test in recipe.get("tests", [])):
        return verdict
    drops = _by_rule(recipe, own, tau)
    if drops is not None:
        verdict.drops, verdict.decided_by = drops, "rule"
    return verdict


def _by_rule(recipe: dict[str, Any], own: dict[str, np.ndarray], tau: dict[str, np.ndarray]) -> bool | None:
    """Whether the recipe's rule drops a row that is not in the pool; None where it depends on more than similarity."""
    kind, tests = recipe["kind"], recipe.get("tests", [])
    if kind == "full":
        return False
    if kind == "gap-match":
        return bool(max((own[test] - tau[test]).max() for test in tests) > recipe["slack"])
    if kind == "threshold":
        return bool(max(own[test].max() for test in tests) >= recipe["max_similarity"])
    cut = recipe.get("cut_similarity")
    if cut is None:
        return None
    most = max(own[test].max() for test in tests)
    return bool(most > cut if kind == "near" else most < cut)
