"""Splits equal the definitions on every row, exactly, and their invariants hold (train_test_similarity.md 12.4)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import (
    AnySplit,
    Core,
    DensityMatch,
    Far,
    Full,
    GapMatch,
    Near,
    PreviewSettings,
    Random,
    Score,
    Threshold,
)
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import core_set, preview, score, split
from clipgap_ray.stages.keep import read_keep
from tests import made, twins

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Truth:
    """Exact m and margin per uid and test set, by brute force over the stored rows."""

    def __init__(self, embeddings: dict[str, str]) -> None:
        self.pool = EmbeddingSet.open(embeddings["pool"])
        self.uids = self.pool.all_metadata(["uid"]).column("uid").to_pylist()
        rows, reference = self.pool.all_images(), EmbeddingSet.open(embeddings["reference"]).all_images()
        self.m: dict[str, dict[str, float]] = {}
        self.margin: dict[str, dict[str, float]] = {}
        for name in made.TESTS:
            tests = EmbeddingSet.open(embeddings[name]).all_images()
            tau = twins.similarities(tests, reference).max(axis=1)
            m, margin = twins.pool_scores(rows, tests, tau)
            self.m[name], self.margin[name] = self.per_uid(m), self.per_uid(margin)

    def per_uid(self, values: np.ndarray) -> dict[str, float]:
        """The largest value over the copies of a uid."""
        result: dict[str, float] = {}
        for uid, value in zip(self.uids, values.tolist(), strict=True):
            result[uid] = max(value, result.get(uid, -np.inf))
        return result

    def most(self, column: str, tests: tuple[str, ...]) -> dict[str, float]:
        return {uid: max(getattr(self, column)[t][uid] for t in tests) for uid in sorted(set(self.uids))}


@pytest.fixture(scope="module")
def truth(tiny_embeddings: dict[str, str]) -> Truth:
    return Truth(tiny_embeddings)


def cut(kind: type, scores: str, out: Path, **more: Any) -> set[str]:
    """Cut a split, and return its uids after checking that file, bitmap and recipe agree."""
    settings: AnySplit = kind(scores=scores, out=str(out), **more)
    recipe = split.run(settings)
    kept = schema.unpack_uids(store.read_array(str(out)))
    assert kept == sorted(set(kept))
    assert recipe == store.read_json(str(out).removesuffix(".npy") + ".recipe.json")
    assert recipe["counts"]["kept"] == len(kept) == recipe["counts"]["pool"] - recipe["counts"]["removed"]
    pool = EmbeddingSet.open(recipe["inputs"]["pool"]["uri"])
    masks = read_keep(str(out), pool)
    rows = [
        uid
        for part in pool.parts
        for uid, stays in zip(
            pool.metadata(part.number, ["uid"]).column("uid").to_pylist(), masks[part.number], strict=True
        )
        if stays
    ]
    assert set(rows) == set(kept)
    assert len(rows) == recipe["rows"]["kept"]
    return set(kept)


@pytest.mark.parametrize("tests", [("val",), ("sketch",), ("r",), ("val", "sketch", "r")], ids="+".join)
@pytest.mark.parametrize("slack", [0.0, 0.02, -0.02])
def test_gap_match_removes_exactly_what_is_closer_than_the_reference(
    truth: Truth, tiny_scores: str, tmp_path: Path, tests: tuple[str, ...], slack: float
) -> None:
    margin = truth.most("margin", tests)
    expected = {uid for uid, value in margin.items() if not value > slack}
    assert cut(GapMatch, tiny_scores, tmp_path / "gap.npy", test=tests, slack=slack) == expected
    assert 0 < len(expected) < len(margin)


def test_a_cut_at_a_row_s_own_margin_is_decided_exactly(truth: Truth, tiny_scores: str, tmp_path: Path) -> None:
    margin = truth.most("margin", ("val",))
    for uid in sorted(margin)[:4]:
        slack = margin[uid]
        expected = {u for u, value in margin.items() if not value > slack}
        assert uid in expected
        assert cut(GapMatch, tiny_scores, tmp_path / "at.npy", test=("val",), slack=slack) == expected
        below = float(np.nextafter(slack, -2))
        assert uid not in cut(GapMatch, tiny_scores, tmp_path / "below.npy", test=("val",), slack=below)
        assert store.read_json(str(tmp_path / "below.recipe.json"))["rescored"] >= 1


@pytest.mark.parametrize("size", ["100", "0.25", "0", "1.0"])
@pytest.mark.parametrize("tests", [("sketch",), ("val", "r")], ids="+".join)
def test_near_and_far_equal_a_sort_by_exact_value_and_uid(
    truth: Truth, tiny_scores: str, tmp_path: Path, tests: tuple[str, ...], size: str
) -> None:
    m = truth.most("m", tests)
    order = sorted(m, key=lambda uid: (m[uid], uid))
    keep = round(float(size) * len(m)) if "." in size else int(size)
    assert cut(Near, tiny_scores, tmp_path / "near.npy", test=tests, size=size) == set(order[:keep])
    assert cut(Far, tiny_scores, tmp_path / "far.npy", test=tests, size=size) == set(order[len(m) - keep :])
    assert cut(Core, tiny_scores, tmp_path / "core.npy", test=tests, size=size) == set(order[len(m) - keep :])
    rest = cut(Near, tiny_scores, tmp_path / "rest.npy", test=tests, size=str(len(m) - keep))
    assert rest == set(order) - set(order[len(m) - keep :])  # near(N - n) and far(n) are complementary


@pytest.mark.parametrize("at", [0, 200, 500])
def test_threshold_removes_what_is_at_least_as_similar(truth: Truth, tiny_scores: str, tmp_path: Path, at: int) -> None:
    m = truth.most("m", ("val", "r"))
    value = sorted(m.values())[at]  # exactly a row's own value
    kept = cut(Threshold, tiny_scores, tmp_path / "t.npy", test=("val", "r"), max_similarity=value)
    assert kept == {uid for uid, s in m.items() if s < value}


@pytest.mark.parametrize("size", [0, 60, 61, 62, 63, 400])
def test_core_sets_by_rank_go_round_the_lists(truth: Truth, tiny_scores: str, tmp_path: Path, size: int) -> None:
    tests = ("val", "sketch", "r")
    kept = cut(Core, tiny_scores, tmp_path / "core.npy", test=tests, size=str(size), policy="rank")
    lists = [sorted(truth.m[name], key=lambda uid: (truth.m[name][uid], uid), reverse=True) for name in tests]
    expected: set[str] = set()
    for depth in range(len(lists[0])):
        new = sorted({one[depth] for one in lists} - expected, reverse=True)  # ties of a round go by uid
        expected |= set(new[: size - len(expected)])
    assert kept == expected
    assert len(kept) == size


def test_core_sets_by_zscore_equal_their_definition(
    truth: Truth, tiny_scores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_set, "SAMPLE_UIDS", 200)
    tests = ("val", "sketch", "r")
    kept = cut(Core, tiny_scores, tmp_path / "core.npy", test=tests, size="60", policy="zscore")
    uids = sorted(truth.m["val"])
    columns = np.array([[truth.m[name][uid] for uid in uids] for name in tests])
    sample = columns[:, :200]
    z = ((columns - sample.mean(axis=1, keepdims=True)) / sample.std(axis=1, keepdims=True)).max(axis=0)
    order = sorted(range(len(uids)), key=lambda i: (z[i], uids[i]))
    assert kept == {uids[i] for i in order[-60:]}


def test_random_is_uniform_over_uids_and_follows_its_seed(truth: Truth, tiny_scores: str, tmp_path: Path) -> None:
    near = cut(Near, tiny_scores, tmp_path / "near.npy", test=("val",), size="123")
    one = cut(Random, tiny_scores, tmp_path / "a.npy", size="123", seed=1)
    assert len(one) == 123 == len(near)
    assert one == cut(Random, tiny_scores, tmp_path / "b.npy", match=str(tmp_path / "near.npy"), seed=1)
    other = cut(Random, tiny_scores, tmp_path / "c.npy", size="0.2", seed=2)
    assert len(other) == round(0.2 * len(set(truth.uids)))
    assert not other <= one
    assert cut(Full, tiny_scores, tmp_path / "full.npy") == set(truth.uids)


def test_invariants_of_gap_matching(truth: Truth, tiny_scores: str, tmp_path: Path) -> None:
    single = {t: cut(GapMatch, tiny_scores, tmp_path / f"{t}.npy", test=(t,)) for t in made.TESTS}
    combined = cut(GapMatch, tiny_scores, tmp_path / "all.npy", test=made.TESTS)
    assert combined == set.intersection(*single.values())
    everything = set(truth.uids)
    assert len(everything - combined) <= sum(len(everything - kept) for kept in single.values())
    kept = [
        cut(GapMatch, tiny_scores, tmp_path / "s.npy", test=("val",), slack=s) for s in (-0.05, 0.0, 0.01, 0.05, 1.0)
    ]
    for less, more in itertools.pairwise(kept):
        assert less <= more
    assert kept[0] < kept[3]


def test_copies_of_a_uid_stand_or_fall_together(
    tiny_world: made.World, truth: Truth, tiny_scores: str, tmp_path: Path
) -> None:
    (uid,) = {row["uid"] for row in tiny_world.of("pool") if row["fault"] == "repeated_uid"}
    assert truth.uids.count(uid) == 2
    m = truth.most("m", ("val",))
    rank = sorted(m, key=lambda u: (m[u], u)).index(uid)
    cut(Near, tiny_scores, tmp_path / "out.npy", test=("val",), size=str(rank))
    cut(Near, tiny_scores, tmp_path / "in.npy", test=("val",), size=str(rank + 1))
    for name, stays in (("out", False), ("in", True)):
        masks = read_keep(str(tmp_path / f"{name}.npy"), truth.pool)
        rows = np.concatenate([masks[part.number] for part in truth.pool.parts])
        assert rows[[i for i, u in enumerate(truth.uids) if u == uid]].tolist() == [stays, stays]


def test_impossible_cuts_are_named(tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    out = str(tmp_path / "a.npy")
    with pytest.raises(ConfigError, match=r"no scores for \['imagenet'\]; it has \['r', 'sketch', 'val'\]"):
        split.run(GapMatch(scores=tiny_scores, out=out, test=("imagenet",)))
    with pytest.raises(ConfigError, match=r"of 5.. uids"):
        split.run(Near(scores=tiny_scores, out=out, test=("val",), size="10000"))
    with pytest.raises(DataError, match="expected the output of `clipgap score`"):
        split.run(Full(scores=str(tmp_path), out=out))
    words = made.score_words(tiny_embeddings, ("val",))
    del words["reference"]
    score.run(ScoreSettings(**words, out=str(tmp_path / "s")))
    with pytest.raises(ConfigError, match=r"gap-match needs thresholds for \['val'\]"):
        split.run(GapMatch(scores=str(tmp_path / "s"), out=out, test=("val",)))
    assert not Path(out).exists()


# --- by a column of the metadata ---------------------------------------------------------------------------


def column_of(truth: Truth, name: str) -> dict[str, float]:
    """The largest value over the copies of a uid; a missing value is below every number."""
    values = truth.pool.all_metadata([name]).column(name).to_pylist()
    return truth.per_uid(np.array([-np.inf if value is None else value for value in values], np.float64))


def test_score_keeps_the_highest_values_and_ties_go_by_uid(truth: Truth, tiny_scores: str, tmp_path: Path) -> None:
    values = column_of(truth, "clip_score")
    order = sorted(values, key=lambda uid: (values[uid], uid))
    assert sum(value == -np.inf for value in values.values()) > 0  # samples without caption have no CLIP score
    for size in ("0.3", "77"):
        keep = round(0.3 * len(values)) if size == "0.3" else 77
        assert cut(Score, tiny_scores, tmp_path / "a.npy", column="clip_score", size=size) == set(order[-keep:])
    assert cut(Score, tiny_scores, tmp_path / "b.npy", preset="clip-score-30") == set(
        order[-round(0.3 * len(values)) :]
    )
    middle = sorted(values.values())[len(values) // 2]
    kept = cut(Score, tiny_scores, tmp_path / "c.npy", column="clip_score", min=middle)
    assert kept == {uid for uid, value in values.items() if value >= middle}
    kept = cut(Score, tiny_scores, tmp_path / "d.npy", column="clip_score", max=middle)
    assert kept == {uid for uid, value in values.items() if -np.inf < value <= middle}


def test_the_basic_preset_is_datacomp_s_rules_on_captions_and_sizes(
    truth: Truth, tiny_scores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "BASIC", (("caption_words", 5, np.inf), ("caption_chars", 24, np.inf),
                                         ("min_side", 64, np.inf), ("aspect_ratio", 0, 3.0)))  # fmt: skip
    kept = cut(Score, tiny_scores, tmp_path / "a.npy", preset="basic")
    meta = truth.pool.all_metadata(["uid", "caption", "width", "height"]).to_pylist()
    passes = {
        row["uid"]
        for row in meta
        if row["caption"] is not None
        and len(row["caption"].split()) >= 5
        and len(row["caption"]) >= 24
        and min(row["width"], row["height"]) >= 64
    }
    assert kept == passes
    assert 0 < len(kept) < len(set(truth.uids))


def test_impossible_columns_are_named(tiny_scores: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no numeric column 'caption'"):
        split.run(Score(scores=tiny_scores, out=str(tmp_path / "a.npy"), column="caption", size="3"))
    with pytest.raises(ConfigError, match="needs either --size or --min/--max"):
        Score.load({"scores": tiny_scores, "out": "a.npy", "column": "clip_score"}, "split")
    with pytest.raises(ConfigError, match="needs one of --column"):
        Score.load({"scores": tiny_scores, "out": "a.npy"}, "split")


# --- density -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 4])
def test_density_matching_leaves_no_test_image_closer_or_denser_than_the_reference(
    truth: Truth, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path, neighbours: int
) -> None:
    tests = ("val", "r")
    kept = cut(DensityMatch, tiny_scores, tmp_path / "d.npy", test=tests, neighbours=neighbours)
    matched = cut(GapMatch, tiny_scores, tmp_path / "g.npy", test=tests)
    assert kept == matched if neighbours == 1 else kept < matched
    queries = np.concatenate([EmbeddingSet.open(tiny_embeddings[name]).all_images() for name in tests])
    reference = -np.sort(-twins.similarities(queries, EmbeddingSet.open(tiny_embeddings["reference"]).all_images()))
    similarity = twins.similarities(queries, truth.pool.all_images())
    best = {uid: np.full(len(queries), -np.inf) for uid in truth.uids}
    for column, uid in enumerate(truth.uids):
        best[uid] = np.maximum(best[uid], similarity[:, column])
    left = -np.sort(-np.stack([best[uid] for uid in sorted(kept)], axis=1))[:, :neighbours]
    assert (left <= reference[:, :neighbours]).all()
    for uid in sorted(matched - kept):  # and nothing else could have stayed
        more = -np.sort(-np.concatenate([left, best[uid][:, None]], axis=1))[:, :neighbours]
        assert (more > reference[:, :neighbours]).any()


def test_density_matching_needs_the_reference_s_embeddings(
    tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path
) -> None:
    words = made.score_words(tiny_embeddings, ("val",))
    del words["reference"]
    words["thresholds"] = (f"val={tiny_scores}/thresholds/val.parquet",)
    score.run(ScoreSettings(**words, out=str(tmp_path / "s")))
    with pytest.raises(ConfigError, match=r"density-match needs the reference's embeddings for \['val'\]"):
        split.run(DensityMatch(scores=str(tmp_path / "s"), out=str(tmp_path / "a.npy"), test=("val",)))


def test_a_reference_smaller_than_the_curve_is_named(tiny_scores: str, tmp_path: Path) -> None:
    settings = DensityMatch(scores=tiny_scores, out=str(tmp_path / "a.npy"), test=("val",), neighbours=500)
    with pytest.raises(ConfigError, match="the reference has fewer than 500 rows"):
        split.run(settings)


# --- preview -----------------------------------------------------------------------------------------------


def test_a_preview_tells_the_size_of_the_cut(truth: Truth, tiny_scores: str, tmp_path: Path) -> None:
    out = tmp_path / "preview"
    result = preview.run(PreviewSettings(scores=tiny_scores, test=("val", "r"), out=str(out)))
    sizes = {(row["cut"], row["value"]): row["kept"] for row in result["rows"]}
    for slack in (-0.02, 0.0, 0.05):
        kept = cut(GapMatch, tiny_scores, tmp_path / "g.npy", test=("val", "r"), slack=slack)
        assert abs(sizes["gap-match", slack] - len(kept)) <= 2  # float32 at the very edge
    m = sorted(truth.most("m", ("val", "r")).values())
    near = {row["kept"]: row["value"] for row in result["rows"] if row["cut"] == "near"}
    assert near[round(0.5 * len(m))] == pytest.approx(m[round(0.5 * len(m)) - 1], abs=1e-6)
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "preview.csv").read_text().splitlines()) == 1 + len(result["rows"])
    assert result["pool"] == len(m)
