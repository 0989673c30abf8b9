"""The miniature world's knob: without correlation of class and background nothing drops, with much of it all does.

The model is a vote of the nearest training pictures (projection encoder, labels from the truth): it learns what the
pool holds and nothing else, so its drop is the pool's doing and needs no training run.
"""

import dataclasses

import numpy as np
import pytest

from clipgap_ray import world
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import neighbours, overlap, shift
from clipgap_ray.world.classes import BACKGROUNDS
from tests import made

VOTES = 7

pytestmark = pytest.mark.slow


def world_of(folder, correlation: float) -> made.World:
    spec = dataclasses.replace(
        world.preset("tiny", rows=2000, seed=5), correlation=correlation, counter_rows=14, reference_rows=1,
        test_rows=1, leak_rate=0.0, exact_rate=0.0, near_rate=0.0, style_shares=(("photo", 1.0),), difficulty=0.0,
    )  # fmt: skip
    return made.render_world(folder, spec)


def voted(folder, correlation: float) -> tuple[overlap.Photos, np.ndarray, np.ndarray]:
    """Photos of both groups with the vote's outcome; pool rows and photos' backgrounds by class, from the truth."""
    rendered = world_of(folder / "world", correlation)
    pool = EmbeddingSet.open(made.embed_without_ray(rendered.path("pool"), str(folder / "pool")))
    test = EmbeddingSet.open(made.embed_without_ray(rendered.path("counteranimal"), str(folder / "test")))
    label_of = {row["uid"]: row["label"] for row in rendered.of("pool")}
    labels = np.array([label_of[uid] for uid in pool.all_metadata(["uid"])["uid"].to_pylist()])
    similarity = test.all_images().astype(np.float32) @ pool.all_images().astype(np.float32)[labels >= 0].T
    nearest = np.argsort(-similarity, axis=1)[:, :VOTES]
    given = np.array([np.bincount(labels[labels >= 0][row]).argmax() for row in nearest])
    facts = test.all_metadata(["label", "class_name", "group"])
    right = given == facts["label"].to_numpy()
    photos, _, _ = overlap.take(
        facts["class_name"].to_pylist(), facts["group"].to_pylist(), right, similarity.max(axis=1)
    )
    counts = np.zeros((len(photos.classes), len(BACKGROUNDS)), np.int64)
    usual = np.zeros((len(photos.classes), 2), np.int64)
    for row in rendered.of("pool"):
        if row["class_name"] in photos.classes and row["background"] in BACKGROUNDS:
            counts[photos.classes.index(row["class_name"]), BACKGROUNDS.index(row["background"])] += 1
    for row in rendered.of("counteranimal"):
        side = photos.pair.index(row["group"])
        usual[photos.classes.index(row["class_name"]), side] = BACKGROUNDS.index(row["background"])
    return photos, counts, usual


def drop_of(photos: overlap.Photos) -> dict:
    groups = np.where(photos.second, *photos.pair[::-1])
    names = [photos.classes[at] for at in photos.class_at]
    return shift.summarise(shift.count(names, groups.tolist(), photos.rate > 0.5), np.random.default_rng(0), draws=500)


def test_without_correlation_the_drop_is_nothing_within_its_interval(tmp_path) -> None:
    photos, counts, usual = voted(tmp_path, 0.0)
    low, high = drop_of(photos)["intervals"]["drop_pp_classes"]
    assert low < 0 < high
    found = neighbours.prevalence(counts, usual, np.zeros(len(counts)), np.random.default_rng(0))
    assert found["first_more_common"]["low"] < 0.5 < found["first_more_common"]["high"]


def test_with_much_correlation_classes_drop_and_the_planted_backgrounds_are_found(tmp_path) -> None:
    photos, counts, usual = voted(tmp_path, 0.9)
    result = drop_of(photos)
    low, _ = result["intervals"]["drop_pp_classes"]
    assert low > 10
    drops = np.array([record["drop_pp"] for record in result["classes"]])
    found = neighbours.prevalence(counts, usual, drops, np.random.default_rng(0))
    assert found["first_more_common"]["rate"] == 1.0
    assert min(ratio for ratio in found["log_ratio"] if ratio is not None) > np.log(5)
