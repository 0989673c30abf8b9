"""After gap-matching, every test image sees exactly the reference's gap; other cuts see what brute force says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.split import GapMatch, GapsSettings, Near
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError
from clipgap_ray.stages import gaps, split
from clipgap_ray.stages.keep import read_split
from tests import made, twins

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def cuts(tiny_scores: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("splits")
    outs = [str(folder / f"{name}.npy") for name in ("matched", "sketch-only", "near", "nothing")]
    split.run(GapMatch(scores=tiny_scores, out=outs[0], test=made.TESTS))
    split.run(GapMatch(scores=tiny_scores, out=outs[1], test=("sketch",)))
    split.run(Near(scores=tiny_scores, out=outs[2], test=("val",), size="300"))
    split.run(Near(scores=tiny_scores, out=outs[3], test=("val",), size="0"))
    return outs


def test_gaps_equal_brute_force_and_the_matched_gap_equals_tau(
    tiny_embeddings: dict[str, str], tiny_scores: str, cuts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "GROUP_BYTES", 15_000)
    out = str(tmp_path / "gaps")
    settings = GapsSettings(pool=tiny_embeddings["pool"], scores=tiny_scores, split=tuple(cuts), out=out)
    gaps.run(settings)
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    rows, row_ids = pool.all_images(), made.all_row_ids(pool)
    beyond = 0
    for uri in cuts:
        masks = read_split(uri, pool)
        keep = np.concatenate([masks[part.number] for part in pool.parts])
        for name in made.TESTS:
            table = store.read_table(f"{out}/{Path(uri).stem}/{name}.parquet")
            assert table.schema == schema.GAPS
            tests = EmbeddingSet.open(tiny_embeddings[name]).all_images()
            best, ids = twins.nearest(tests, rows[keep], row_ids[keep], 1)
            tau = twins.similarities(tests, EmbeddingSet.open(tiny_embeddings["reference"]).all_images()).max(axis=1)
            assert np.array_equal(table.column("similarity").to_numpy(), best[:, 0])
            assert table.column("nearest_row_id").to_pylist() == ids[:, 0].tolist()
            assert np.array_equal(table.column("tau").to_numpy(), tau)
            gap = table.column("gap").to_numpy()
            assert np.array_equal(gap, np.maximum(tau, best[:, 0]))
            if Path(uri).stem == "matched" or (Path(uri).stem, name) == ("sketch-only", "sketch"):
                assert np.array_equal(gap, tau)  # for every test point, to the last bit
            else:
                beyond += int((gap > tau).sum())
    assert beyond > 0  # the other cuts leave rows closer than the reference: the check above can fail

    before = made.stamps_below(f"{out}/matched")
    gaps.run(settings)
    assert made.stamps_below(f"{out}/matched") == before


def test_diagnostics_say_what_is_left_around_the_test_images(
    tiny_embeddings: dict[str, str], tiny_scores: str, cuts: list[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "gaps")
    settings = GapsSettings(
        pool=tiny_embeddings["pool"], scores=tiny_scores, split=tuple(cuts), out=out, neighbours=3, deltas=(0.0, 0.1),
        duplicates=(0.95,),
    )  # fmt: skip
    gaps.run(settings)
    records = {(r["split"], r["test"]): r for r in store.read_json(f"{out}/diagnostics.json")}
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    reference = EmbeddingSet.open(tiny_embeddings["reference"]).all_images()
    tests = EmbeddingSet.open(tiny_embeddings["val"]).all_images()
    to_pool, to_reference = twins.similarities(tests, pool.all_images()), twins.similarities(tests, reference)
    tau, best = to_reference.max(axis=1), to_pool.max(axis=1)
    before, own = records["pool", "val"], records["reference", "val"]
    assert before["share_closer_than_reference"] == (best > tau).mean()
    assert before["duplicate_rate"] == {"0.95": (best >= 0.95).mean()}
    assert before["median_gap"] == np.median(np.maximum(best, tau))
    kth = np.median(-np.sort(-to_pool)[:, :3], axis=0)
    assert before["median_kth_similarity"] == pytest.approx(kth.tolist(), abs=1e-5)
    assert own["median_kth_similarity"] == pytest.approx(
        np.median(-np.sort(-to_reference)[:, :3], axis=0).tolist(), abs=1e-12
    )
    assert before["mean_rows_within"]["0.1"] == pytest.approx((to_pool > tau[:, None] - 0.1).sum(axis=1).mean(), abs=1)
    assert records["matched", "val"]["share_closer_than_reference"] == 0.0
    # The reference is counted as the cuts are: "denser just outside the hull" is answered in numbers.
    assert set(own["mean_rows_within"]) == set(before["mean_rows_within"])
    for delta, counted in own["mean_rows_within"].items():
        excess = to_reference - (tau - float(delta))[:, None]
        sure, possible = ((excess > edge).sum(axis=1).mean() for edge in (1e-5, -1e-5))
        assert sure <= counted <= possible
    assert records["matched", "val"]["mean_rows_within"]["0"] == 0.0
    assert records["nothing", "val"]["median_kth_similarity"] == [None, None, None]
    wanted = EmbeddingSet.open(tiny_embeddings["val"]).all_metadata(["sha256"]).column("sha256").to_pylist()
    for cut in ("pool", "matched", "nothing"):
        masks = None if cut == "pool" else read_split(cuts[["matched", "", "", "nothing"].index(cut)], pool)
        there = {
            digest
            for part in pool.parts
            for at, digest in enumerate(pool.metadata(part.number, ["sha256"]).column("sha256").to_pylist())
            if masks is None or masks[part.number][at]
        }
        assert records[cut, "val"]["same_bytes_rate"] == np.mean([digest in there for digest in wanted])
    assert before["same_bytes_rate"] > 0, "the world leaks test images into its pool"
    assert own["same_bytes_rate"] == 0
    assert set(records) == {(cut, test) for cut in ("pool", "matched", "sketch-only", "near", "nothing", "reference")
                            for test in made.TESTS}  # fmt: skip


def test_a_split_of_another_pool_is_refused(
    tiny_embeddings: dict[str, str], tiny_scores: str, cuts: list[str], tmp_path: Path
) -> None:
    settings = GapsSettings(
        pool=tiny_embeddings["reference"], scores=tiny_scores, split=(cuts[0],), out=str(tmp_path / "g")
    )
    with pytest.raises(DataError, match=r"cut from another pool than .*: coverage 0 %"):
        gaps.run(settings)
