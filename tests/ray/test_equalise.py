"""Cuts for the causal arm on made-up embeddings: equalised groups, class counts of another cut, two encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import Equalise, GapMatch, Random
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels.equalise import constrained_classes, largest_difference
from clipgap_ray.stages import agreement, score, split
from clipgap_ray.stages.keep import read_keep
from tests import made, twins

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

DIM, POOL, PHOTOS, REFERENCE = 16, 4000, 120, 400
NAMES = ("fox", "owl", "crab")


def rows_of(rng: np.random.Generator, labels: np.ndarray, counter: np.ndarray, spread: float) -> np.ndarray:
    """Unit rows around a class centre on one of two backgrounds."""
    basis = np.random.default_rng(0).normal(size=(len(NAMES) + 2, DIM))
    latent = 1.2 * basis[labels] + 0.9 * basis[len(NAMES) + counter.astype(int)]
    latent = latent + spread * rng.normal(size=latent.shape)
    return latent / np.linalg.norm(latent, axis=1, keepdims=True)


class Made:
    """A pool with few counter backgrounds, a grouped test set and a reference, embedded and scored."""

    def __init__(self, root: Path, transform: np.ndarray, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, len(NAMES), POOL)
        pool = rows_of(rng, self.labels, rng.random(POOL) < 0.01, 0.5)
        labels, counter = rng.integers(0, len(NAMES), PHOTOS), rng.random(PHOTOS) < 0.4
        tests = rows_of(rng, labels, counter, 0.5)
        labels_r = rng.integers(0, len(NAMES), REFERENCE)
        reference = rows_of(rng, labels_r, rng.random(REFERENCE) < 0.5, 0.5)
        self.classes = [NAMES[label] for label in labels]
        self.groups = ["counter" if c else "common" for c in counter]
        captions = [f"a {NAMES[label]}" + (" and an owl" if i % 7 == 0 else "") for i, label in enumerate(self.labels)]
        self.pool = self._write(root / "pool", pool @ transform, {"caption": captions})
        about = {"class_name": self.classes, "group": self.groups}
        self.tests = self._write(root / "animals", tests @ transform, about)
        made_reference = self._write(root / "reference", reference @ transform, {})
        words = {"pool": self.pool.uri, "test": (f"animals={self.tests.uri}",), "reference": (made_reference.uri,)}
        self.scores = str(root / "scores")
        score.run(ScoreSettings(**words, k=5, out=self.scores))

    @staticmethod
    def _write(out: Path, rows: np.ndarray, columns: dict[str, list[str]]) -> EmbeddingSet:
        halves = np.array_split(np.arange(len(rows)), 2)
        uids = [f"{int(i):032x}" for i in np.random.default_rng(len(rows)).permutation(len(rows))]
        more = {name: [[values[i] for i in half] for half in halves] for name, values in columns.items()}
        stored = [rows[half].astype(np.float16) for half in halves]
        return made.write_embeddings(str(out), stored, [[uids[i] for i in half] for half in halves], **more)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("equal"), np.eye(DIM))


def cut(settings: Any) -> tuple[dict[str, Any], set[str]]:
    recipe = split.run(settings)
    return recipe, set(schema.unpack_uids(store.read_array(settings.out)))


def test_after_equalising_both_groups_see_the_same_similarity(built: Made, tmp_path: Path) -> None:
    out = str(tmp_path / "equal.npy")
    recipe, kept = cut(Equalise(scores=built.scores, out=out, test=("animals",), slack=0.01))
    masks = read_keep(out, built.pool)
    keep = np.concatenate([masks[part.number] for part in built.pool.parts])
    assert keep.sum() == len(kept) == recipe["counts"]["kept"]
    similarity = twins.similarities(built.tests.all_images(), built.pool.all_images())
    class_at, second = constrained_classes(built.classes, built.groups, ("common", "counter"))
    before, after = similarity.max(axis=1), similarity[:, keep].max(axis=1)
    found = recipe["equalised"]
    assert largest_difference(before, class_at, second) == pytest.approx(found["before"]["largest_difference"])
    assert largest_difference(after, class_at, second) == pytest.approx(found["after"]["largest_difference"])
    assert found["after"]["largest_difference"] <= 0.01 + 1e-12
    assert found["before"]["difference"] > 0.02 > 0.01 >= abs(found["after"]["difference"])
    assert (found["num_classes"], found["num_images"]) == (3, PHOTOS)
    assert 0.3 * POOL < keep.sum() < POOL  # the cut is no massacre
    # Rows that nobody is too near to stay: every row that went was above some photo's final ceiling at its time.
    assert (similarity[:, ~keep] > after.min()).any(axis=0).all()


def test_the_cut_does_not_depend_on_how_far_the_first_pass_looked(
    built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = cut(Equalise(scores=built.scores, out=str(tmp_path / "a.npy"), test=("animals",), slack=0.004))
    monkeypatch.setattr("clipgap_ray.stages.equalise.REACH", 1e-4)
    near = cut(Equalise(scores=built.scores, out=str(tmp_path / "b.npy"), test=("animals",), slack=0.004))
    assert near[0]["equalised"]["passes"] > far[0]["equalised"]["passes"]
    assert near[1] == far[1]


def test_impossible_groups_are_named(built: Made, tmp_path: Path) -> None:
    words = {"scores": built.scores, "out": str(tmp_path / "a.npy"), "test": ("animals",)}
    with pytest.raises(ConfigError, match="groups are common, counter"):
        split.run(Equalise(**words, groups=("easy", "hard")))
    with pytest.raises(ConfigError, match="no difference of similarities"):
        Equalise.load({**words, "slack": 0}, "split")


def test_a_frequency_matched_control_has_the_class_counts_of_the_other_cut(built: Made, tmp_path: Path) -> None:
    gap = str(tmp_path / "gap.npy")
    _, other = cut(GapMatch(scores=built.scores, out=gap, test=("animals",)))
    words = {"scores": built.scores, "match": gap, "seed": 3}
    recipe, kept = cut(Random(**words, out=str(tmp_path / "r.npy"), same_classes=("test:animals",)))
    captions = dict(zip(*(built.pool.all_metadata([c])[c].to_pylist() for c in ("uid", "caption")), strict=True))

    def counts(uids: set[str]) -> dict[str, int]:
        return {name: sum(name in captions[uid].split() for uid in uids) for name in NAMES}

    assert counts(kept) == counts(other) == {n: c["kept"] for n, c in recipe["same_classes"]["counts"].items()}
    assert len(kept) == len(other)
    assert kept != other
    (tmp_path / "names.txt").write_text("crab\n\nfox\n")
    again = cut(Random(**words, out=str(tmp_path / "s.npy"), same_classes=(f"@{tmp_path}/names.txt", "owl")))
    assert again[1] == kept  # nor does the order of the names matter
    with pytest.raises(ConfigError, match=r"no caption of .* names any of 1 classes"):
        split.run(Random(**words, out=gap, same_classes=("walrus",)))
    with pytest.raises(ConfigError, match="needs --match"):
        Random.load({"scores": built.scores, "out": gap, "size": "0.5", "same_classes": ["fox"]}, "split")


def test_encoders_that_differ_by_a_rotation_agree_and_unrelated_ones_do_not(
    built: Made, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(DIM, DIM)))[0]
    turned = Made(tmp_path_factory.mktemp("turned"), rotation)
    unrelated = Made(tmp_path_factory.mktemp("unrelated"), rotation, seed=77)
    results = {}
    for name, other in {"turned": turned, "unrelated": unrelated}.items():
        agreement.run(AgreementSettings(scores=(built.scores, other.scores), out=str(tmp_path / name)))
        results[name] = json.loads((tmp_path / name / "agreement.json").read_text())["tests"][0]
    same, chance = results["turned"], results["unrelated"]
    assert min(same[f"rank_correlation_{c}"] for c in ("m", "margin", "tau", "similarity")) > 0.99
    assert same["same_nearest"] > 0.9
    assert abs(chance["rank_correlation_tau"]) < 0.5
    assert chance["same_nearest"] < 0.1
    assert [p["cut"] for p in same["pruned"]][:3] == ["gap-match", "near 0.1", "far 0.1"]
    for one, none in zip(same["pruned"], chance["pruned"], strict=True):
        assert one["jaccard"] > 0.9
        assert none["jaccard"] == pytest.approx(none["chance"], abs=0.1)
    assert (
        same["pruned"][0]["removed_first"]
        == cut(GapMatch(scores=built.scores, out=str(tmp_path / "g.npy"), test=("animals",)))[0]["counts"]["removed"]
    )
    with pytest.raises(ConfigError, match=r"\['cats'\] scored in both"):
        agreement.run(AgreementSettings(scores=(built.scores, built.scores), out=str(tmp_path), test=("cats",)))
