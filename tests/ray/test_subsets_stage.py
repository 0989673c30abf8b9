"""Splits made without scores go where any split goes: score --keep, gaps, train's filter, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import Full, GapMatch, GapsSettings
from clipgap_ray.config.subsets import And, DedupSplit, Minus
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError
from clipgap_ray.stages import dedup, export, gaps, score, split, subsets
from clipgap_ray.stages.keep import read_keep
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def keep(ray_session: None, tiny_embeddings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("keep") / "dedup")
    dedup.run(DedupSettings(pool=tiny_embeddings["pool"], min_similarity=0.97, out=out))
    return out


def uids_of(uri: Path) -> set[str]:
    return set(schema.unpack_uids(store.read_array(str(uri))))


def test_a_dedup_split_is_the_keep_table(keep: str, tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    recipe = subsets.dedup(DedupSplit(keep=keep, out=str(tmp_path / "d.npy")))
    expected, found = read_keep(keep, pool), read_keep(str(tmp_path / "d.npy"), pool)
    assert all(np.array_equal(expected[part], found[part]) for part in expected)
    assert 0 < recipe["rows"]["kept"] == sum(mask.sum() for mask in found.values()) < pool.num_rows
    assert recipe["min_similarity"] == 0.97
    words = made.score_words(tiny_embeddings, ("val",))
    for name, uri in (("table", keep), ("split", str(tmp_path / "d.npy"))):
        score.run(ScoreSettings(**words, keep=uri, out=str(tmp_path / name)))
    tables = [made.files_below(str(tmp_path / name / "pool")) for name in ("table", "split")]
    assert tables[0] == tables[1]


def test_a_dedup_split_of_what_was_scored(keep: str, tiny_scores: str, tmp_path: Path) -> None:
    all_of_it = subsets.dedup(DedupSplit(keep=keep, out=str(tmp_path / "d.npy")))
    scored = subsets.dedup(DedupSplit(keep=keep, scores=tiny_scores, out=str(tmp_path / "s.npy")))
    assert scored["counts"] == all_of_it["counts"]  # tiny_scores scored every row
    assert scored["inputs"]["scores"]["uri"] == tiny_scores
    foreign = tmp_path / "foreign"
    for name, data in made.files_below(tiny_scores).items():
        store.write_bytes(str(foreign / name), data)
    changed = store.read_json(str(foreign / "manifest.json"))
    changed["pool"]["digest"] = "another"
    store.write_json(str(foreign / "manifest.json"), changed)
    with pytest.raises(DataError, match="scored another pool than"):
        subsets.dedup(DedupSplit(keep=keep, scores=str(foreign), out=str(tmp_path / "x.npy")))


def test_intersection_of_gap_matched_splits_is_the_combined_one(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path
) -> None:
    def cut(name: str, tests: tuple[str, ...]) -> str:
        out = str(tmp_path / f"{name}.npy")
        split.run(GapMatch(scores=tiny_scores, out=out, test=tests))
        return out

    single = tuple(cut(test, (test,)) for test in made.TESTS)
    combined = cut("combined", made.TESTS)
    recipe = subsets.combine(And(splits=single, out=str(tmp_path / "and.npy")))
    assert (tmp_path / "and.npy").read_bytes() == Path(combined).read_bytes()
    assert recipe["tests"] == sorted(made.TESTS)
    assert recipe["inputs"]["scores"]["uri"] == tiny_scores
    split.run(Full(scores=tiny_scores, out=str(tmp_path / "full.npy")))
    pair = (str(tmp_path / "full.npy"), combined)
    removed = subsets.combine(Minus(splits=pair, out=str(tmp_path / "removed.npy")))
    assert uids_of(tmp_path / "removed.npy") == uids_of(tmp_path / "full.npy") - uids_of(Path(combined))
    assert removed["counts"]["kept"] > 0

    names = ("and.npy", "combined.npy")
    files: tuple[Any, ...] = tuple(str(tmp_path / name) for name in names)
    gaps.run(GapsSettings(pool=tiny_embeddings["pool"], scores=tiny_scores, split=files, out=str(tmp_path / "gaps")))
    assert made.files_below(str(tmp_path / "gaps" / "and")) == made.files_below(str(tmp_path / "gaps" / "combined"))
    words = {"source": tiny_world.path("pool"), "split": files[0]}
    assert export.run(ExportSettings(**words, out=str(tmp_path / "tars"))).extra["coverage"]["missing"] == 0
