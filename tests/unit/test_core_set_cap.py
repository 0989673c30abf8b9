"""Core sets with a cap per partition, on a study of made-up embeddings; no Ray below half a million rows."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from clipgap_ray import schema, store
from clipgap_ray.config.base import Settings
from clipgap_ray.config.split import Core
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, StaleOutputError
from clipgap_ray.reporting import figures_models, tables, theme
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import pool_partitions, split
from tests.unit.study_fixture import ENCODER, Built, build_study
from tests.unit.test_splits_kernel import walk

TESTS = ("val", "sketch")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    built = build_study(tmp_path_factory.mktemp("study"), pool_rows=300, test_rows=24, num_supervised=1)
    pool = EmbeddingSet.open(str(built.root / "embed" / "pool"))
    tests = {t: {"uri": str(built.root / "embed" / t), "digest": t} for t in TESTS}
    manifest = {"stage": "score", "digest": "5" * 64, "encoder": ENCODER, "tests": tests,
                "pool": {"uri": pool.uri, "digest": pool.digest}}  # fmt: skip
    store.write_json(str(built.root / "scores" / "manifest.json"), manifest)
    return built


def core(built: Built, folder: Path, **more: object) -> Core:
    values = {"scores": str(built.root / "scores"), "out": str(folder / "core.npy"), "test": TESTS, "size": "60",
              "partitions": 6}  # fmt: skip
    return Core(**{**values, **more})  # type: ignore[arg-type]


def test_a_capped_core_set_is_a_walk_down_the_list_past_full_partitions(built: Built, tmp_path: Path) -> None:
    recipe = split.run(core(built, tmp_path, cap="1.5"))
    folder = tmp_path / "partitions-6-s0"
    centroids = np.load(folder / "centroids.npy")
    nearest = (built.pool.rows.astype(np.float64) @ centroids.astype(np.float64).T).argmax(axis=1)
    order = np.argsort(np.array(built.pool.uids))  # the pool's uids are unique
    m = np.max([built.similarity[test].max(axis=0) for test in TESTS], axis=0)
    expected = order[walk(m[order], nearest[order], 60, 15)]
    kept = set(schema.unpack_uids(np.load(tmp_path / "core.npy")))
    assert kept == {built.pool.uids[at] for at in expected}
    counts = np.bincount(nearest[expected], minlength=len(centroids))
    assert recipe["capped"] == {"rows_per_partition": 15, "partitions": len(centroids),
                                "at_the_cap": int((counts == 15).sum()), "empty": int((counts == 0).sum())}  # fmt: skip
    assert (recipe["cap"], recipe["counts"]["kept"]) == ("1.5", 60)
    assert recipe["capped"]["at_the_cap"] > 0
    plain = split.run(core(built, tmp_path, out=str(tmp_path / "plain.npy")))
    assert plain["cut_similarity"] > recipe["cut_similarity"], "the cap makes room for less similar rows"
    wide = split.run(core(built, tmp_path, out=str(tmp_path / "wide.npy"), cap="300"))
    assert np.array_equal(np.load(tmp_path / "wide.npy"), np.load(tmp_path / "plain.npy"))
    assert wide["capped"]["at_the_cap"] == 0


def test_partitions_are_made_once_and_go_on_after_a_stop(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pool_partitions._part
    calls: list[int] = []

    def stops(*words: Any) -> dict[str, Any]:
        calls.append(words[-1].number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(pool_partitions, "_part", stops)
    with pytest.raises(KeyboardInterrupt):
        split.run(core(built, tmp_path, cap="1.5"))
    trained = (tmp_path / "partitions-6-s0" / "centroids.npy").stat().st_mtime_ns
    first = split.run(core(built, tmp_path, cap="1.5"))
    assert calls == [0, 1, 1], "one part done, one stopped and done again"
    again = split.run(core(built, tmp_path, cap="1.5"))
    assert len(calls) == 3
    assert again == first
    assert (tmp_path / "partitions-6-s0" / "centroids.npy").stat().st_mtime_ns == trained


def test_partitions_of_another_pool_are_refused(built: Built, tmp_path: Path) -> None:
    split.run(core(built, tmp_path, cap="1.5"))
    other = tmp_path / "scores"
    shutil.copytree(built.root / "scores", other)
    manifest = store.read_json(str(other / "manifest.json"))
    manifest["pool"] = {"uri": str(built.root / "embed" / "reference"), "digest": "r"}
    store.write_json(str(other / "manifest.json"), manifest)
    with pytest.raises(StaleOutputError, match="pool was"):
        split.run(core(built, tmp_path, cap="1.5", scores=str(other)))


def test_a_cap_that_leaves_too_few_is_refused(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--cap 9 is 9 of each of \d partitions: too little for 60"):
        split.run(core(built, tmp_path, cap="9"))
    with pytest.raises(ConfigError, match=r"300 uids|fewer than 300") as caught:
        split.run(core(built, tmp_path, cap="1.0", size="300"))
    assert "a larger --cap" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="--policy rank"):
        Core.load({"scores": "s", "out": "o.npy", "test": TESTS, "size": "60", "cap": "2.0", "policy": "rank"}, "split")


def test_copies_of_a_uid_share_the_lowest_of_their_partitions(built: Built, tmp_path: Path) -> None:
    table = split.open_table(str(built.root / "scores"), TESTS)
    alone, number = pool_partitions.of_uids(table, str(tmp_path), 6, 0)
    assert alone.max() < number
    pairs = np.arange(len(alone)) // 2  # two neighbouring uids become one with two copies
    merged = split.Table(table.scores, table.manifest, table.row_ids, table.uids[::2], pairs[table.position], 1e-6)
    together, _ = pool_partitions.of_uids(merged, str(tmp_path / "merged"), 6, 0)
    near = {}
    for part in (0, 1):
        of_rows = np.load(tmp_path / "merged" / "partitions-6-s0" / f"part-{part:05d}.npy")
        near |= {(part << 32) | row: int(value) for row, value in enumerate(of_rows)}
    for uid in range(0, len(together), 37):
        assert together[uid] == min(near[int(row)] for row in table.row_ids[merged.position == uid])


def test_a_split_without_a_cap_has_the_fingerprint_it_always_had() -> None:
    settings: Settings = Core(scores="s", out="o.npy", test=("val",), size="0.5")
    assert settings.fingerprint().keys() == {"scores", "out", "kind", "test", "size", "policy"}


def test_the_report_draws_capped_core_sets_as_a_curve_of_their_own(built: Built) -> None:
    study = Study.open(str(built.root))
    study.recipes = lambda: {  # type: ignore[method-assign]
        "full": {"kind": "full", "counts": {"kept": 300}},
        "plain": {"kind": "core", "tests": ["val"], "cap": ""},
        "capped": {"kind": "core", "tests": ["val"], "cap": "2.0"},
    }
    level = {"objective": "clip", "train_on": "pool", "pool_rows_kept": 60, "test": "val", "num_images": 24,
             "accuracy": 0.5, "low": 0.3, "high": 0.7, "sd_seeds": None}  # fmt: skip
    curves = tables.pruning_curves(study, [{**level, "split": name} for name in ("full", "plain", "capped")])
    assert [(r["kind"], r["rows"]) for r in curves] == [("full", 300), ("core", 60), ("capped", 60)]
    figure = figures_models.pruning_curves(curves, theme.LIGHT)
    assert "core set, capped per partition" in [text.get_text() for text in figure.legends[0].get_texts()]
    pyplot.close(figure)


def test_the_whole_pool_on_the_curve_was_trained_as_the_cuts(built: Built) -> None:
    """Near, random and far are trained without the reference here: the model with it is no end of their curve."""
    study = Study.open(str(built.root))
    study.recipes = lambda: {  # type: ignore[method-assign]
        "full": {"kind": "full", "counts": {"kept": 300}}, "plain": {"kind": "near", "tests": ["val"]},
    }  # fmt: skip
    level = {"objective": "clip", "train_on": "pool", "test": "val", "acc1": 0.5, "pool_rows_kept": 10}
    ends_of = {"pool": 0.6, "pool+reference": 0.8}
    whole = [{**level, "split": "full", "train_on": on, "acc1": acc1} for on, acc1 in ends_of.items()]
    cut = {**level, "split": "plain"}
    ends = [curve["acc1"] for curve in tables.pruning_curves(study, [*whole, cut]) if curve["kind"] == "full"]
    assert ends == [0.6]
    ends = [c["acc1"] for c in tables.pruning_curves(study, [whole[1], cut]) if c["kind"] == "full"]
    assert ends == [0.8]  # better than no end


def test_ticks_keep_room_for_their_words() -> None:
    for low, high in ((-1.3, 1.3), (-0.9, 1.1), (-3.0, 3.0), (0.2, 1.1)):
        places = figures_models.round_ticks(low, high)
        assert len(places) >= 2
        assert all(b - a >= figures_models.WORD * (high - low) for a, b in itertools.pairwise(places))
