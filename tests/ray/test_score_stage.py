"""Scores equal the definitions on every row, whatever the groups, and planted leaks are found by their bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError, IndexMismatchError, StaleOutputError
from clipgap_ray.kernels.vectors import error_bound
from clipgap_ray.stages import dedup, score
from tests import made, twins
from tests.index_fixture import DIM, FINGERPRINT, unit_rows, write_embeddings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def pool_table(scores: str, test: str) -> pa.Table:
    folder = Path(scores, "pool", test)
    return pa.concat_tables([store.read_table(str(path)) for path in sorted(folder.iterdir())])


def run(words: dict[str, Any], out: Path, **more: Any) -> rundir.Summary:
    return score.run(ScoreSettings(**{**words, "out": str(out), **more}))


def outputs(scores: Path) -> dict[str, bytes]:
    return {f"{kind}/{name}": data for kind in ("pool", "queries", "thresholds")
            for name, data in made.files_below(str(scores / kind)).items()}  # fmt: skip


def test_every_row_equals_brute_force(tiny_scores: str, tiny_embeddings: dict[str, str]) -> None:
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    rows, row_ids, bound = pool.all_images(), made.all_row_ids(pool), error_bound(pool.dim)
    uids = pool.all_metadata(["uid"]).column("uid").to_pylist()
    reference = EmbeddingSet.open(tiny_embeddings["reference"])
    for name in made.TESTS:
        test = EmbeddingSet.open(tiny_embeddings[name])
        tests = test.all_images()
        tau, tau_id = twins.nearest(tests, reference.all_images(), made.all_row_ids(reference), 1)
        m, margin = twins.pool_scores(rows, tests, tau[:, 0])
        table = pool_table(tiny_scores, name)
        assert table.schema == schema.POOL_SCORES
        assert table.column("row_id").to_pylist() == row_ids.tolist()
        assert table.column("uid").to_pylist() == uids
        assert np.abs(table.column("m").to_numpy() - m).max() <= bound
        assert np.abs(table.column("margin").to_numpy() - margin).max() <= 2 * bound
        # arg columns hold the row ids of test rows that attain the maximum
        own = dict(zip(made.all_row_ids(test).tolist(), tests.astype(np.float64), strict=True))
        best = np.stack([own[i] for i in table.column("arg_m").to_pylist()])
        assert np.abs((best * rows.astype(np.float64)).sum(axis=1) - m).max() <= 2 * bound

        queries = store.read_table(f"{tiny_scores}/queries/{name}.parquet")
        assert queries.schema == schema.QUERY_SCORES
        near, near_id = twins.nearest(tests, rows, row_ids, 5)
        assert np.array_equal(queries.column("tau").to_numpy(), tau[:, 0])  # float64, exact
        assert np.array_equal(queries.column("similarity").to_numpy(), near[:, 0])
        uid_of = dict(zip(row_ids.tolist(), uids, strict=True))
        assert queries.column("nearest_uid").to_pylist() == [uid_of[i] for i in near_id[:, 0].tolist()]
        found = np.array(queries.column("nearest_similarities").to_pylist())
        assert np.abs(found - near).max() <= bound
        meta = reference.all_metadata(["row_id", "uid"]).to_pylist()
        reference_uid = {row["row_id"]: row["uid"] for row in meta}
        assert queries.column("reference_uid").to_pylist() == [reference_uid[i] for i in tau_id[:, 0].tolist()]


def test_the_nearest_row_of_a_leaked_image_has_exactly_its_bytes(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tiny_scores: str
) -> None:
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    pool_rows = pool.all_metadata(["uid", "sha256"]).to_pylist()
    sha_of = {row["uid"]: row["sha256"] for row in pool_rows}
    checked = 0
    for name in made.TESTS:
        meta = EmbeddingSet.open(tiny_embeddings[name]).all_metadata(["image_path", "sha256"]).to_pylist()
        queries = store.read_table(f"{tiny_scores}/queries/{name}.parquet").to_pylist()
        found = {row["image_path"]: (row["sha256"], query) for row, query in zip(meta, queries, strict=True)}
        for row in tiny_world.of("pool"):
            if row["leak_of_set"] == name and row["leak_kind"] == "exact" and row["uid"] in sha_of:
                sha, query = found[row["leak_of_key"]]
                assert sha_of[query["nearest_uid"]] == sha
                checked += 1
    assert checked >= 6


@pytest.mark.parametrize("group_bytes", [15_000, 1 << 28])
def test_groups_do_not_change_a_byte(
    tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path, group_bytes: int
) -> None:
    run(made.score_words(tiny_embeddings), tmp_path / "s", group_bytes=group_bytes, query_share=1e9)
    assert outputs(tmp_path / "s") == outputs(Path(tiny_scores))
    groups = len(rundir.CommitLog(str(tmp_path / "s")).records)
    assert groups == 1 if group_bytes > 1e6 else 1 < groups < 11


def test_adding_test_sets_equals_scoring_them_together(
    tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path
) -> None:
    run(made.score_words(tiny_embeddings, ("val",)), tmp_path / "s", group_bytes=1, query_share=1e9)
    before = made.stamps_below(str(tmp_path / "s" / "pool" / "val"))
    run(made.score_words(tiny_embeddings, ("sketch", "r")), tmp_path / "s", group_bytes=1, query_share=1e9, add=True)
    assert outputs(tmp_path / "s") == outputs(Path(tiny_scores))
    assert made.stamps_below(str(tmp_path / "s" / "pool" / "val")) == before
    manifests = [rundir.read_manifest(uri, "score")["tests"] for uri in (str(tmp_path / "s"), tiny_scores)]
    assert manifests[0] == manifests[1]
    with pytest.raises(ConfigError, match=r"already scores \['r'\]"):
        run(made.score_words(tiny_embeddings, ("r",)), tmp_path / "s", add=True)


def test_adding_with_another_keep_is_refused(tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    keep = str(tmp_path / "dedup")
    dedup.run(DedupSettings(pool=tiny_embeddings["pool"], out=keep, min_similarity=0.97))
    run(made.score_words(tiny_embeddings, ("val",)), tmp_path / "s", keep=keep)
    with pytest.raises(DataError, match="scores other rows"):
        run(made.score_words(tiny_embeddings, ("r",)), tmp_path / "s", add=True)


def test_thresholds_of_one_run_serve_another(tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    words = made.score_words(tiny_embeddings, ("val", "sketch"))
    del words["reference"]
    files = tuple(f"{name}={tiny_scores}/thresholds/{name}.parquet" for name in ("val", "sketch"))
    run(words, tmp_path / "s", thresholds=files, group_bytes=1, query_share=1e9)
    for name in ("val", "sketch"):
        assert pool_table(str(tmp_path / "s"), name).equals(pool_table(tiny_scores, name))
    swapped = (f"val={tiny_scores}/thresholds/sketch.parquet",)
    with pytest.raises(DataError, match="thresholds of another test set"):
        run(words, tmp_path / "t", thresholds=swapped)
    with pytest.raises(DataError, match="is no thresholds file"):
        run(words, tmp_path / "t", thresholds=(f"val={tiny_scores}/queries/../pool/val/part-00000.parquet",))
    with pytest.raises(ConfigError, match=r"--thresholds names \['r'\]"):
        run(words, tmp_path / "t", thresholds=(f"r={tiny_scores}/thresholds/r.parquet",))


def test_without_thresholds_margins_are_nan_and_m_is_not(
    tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path
) -> None:
    words = made.score_words(tiny_embeddings, ("val", "r"))
    words["reference"] = (f"r={tiny_embeddings['reference']}",)
    run(words, tmp_path / "s", group_bytes=1, query_share=1e9)
    val = pool_table(str(tmp_path / "s"), "val")
    assert np.isnan(val.column("margin").to_numpy()).all()
    assert val.column("m").equals(pool_table(tiny_scores, "val").column("m"))
    assert pool_table(str(tmp_path / "s"), "r").equals(pool_table(tiny_scores, "r"))
    assert not (tmp_path / "s" / "thresholds" / "val.parquet").exists()


def test_only_kept_rows_are_scored(tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    keep = str(tmp_path / "dedup")
    kept = dedup.run(DedupSettings(pool=tiny_embeddings["pool"], out=keep, min_similarity=0.97)).kept
    summary = run(made.score_words(tiny_embeddings), tmp_path / "s", keep=keep)
    assert summary.kept == kept
    assert summary.dropped == {"not_kept": summary.read - kept}
    mask = np.concatenate([store.read_table(str(p)).column("keep").to_numpy(zero_copy_only=False)
                           for p in sorted(Path(keep, "keep").iterdir())])  # fmt: skip
    whole, table = pool_table(tiny_scores, "val"), pool_table(str(tmp_path / "s"), "val")
    assert table.column("row_id").equals(whole.filter(pa.array(mask)).column("row_id"))
    pool, test = EmbeddingSet.open(tiny_embeddings["pool"]), EmbeddingSet.open(tiny_embeddings["val"])
    near, _ = twins.nearest(test.all_images(), pool.all_images()[mask], made.all_row_ids(pool)[mask], 1)
    queries = store.read_table(str(tmp_path / "s" / "queries" / "val.parquet"))
    assert np.array_equal(queries.column("similarity").to_numpy(), near[:, 0])


def test_running_again_rewrites_no_pool_table_and_others_are_refused(
    tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    words = made.score_words(tiny_embeddings, ("val",))
    run(words, tmp_path / "s")
    before = made.stamps_below(str(tmp_path / "s" / "pool"))
    assert run(words, tmp_path / "s").parts_skipped == 1
    assert made.stamps_below(str(tmp_path / "s" / "pool")) == before
    with pytest.raises(StaleOutputError, match="k was 5, now 6"):
        run({**words, "k": 6}, tmp_path / "s")


def test_another_encoder_on_either_side_is_refused(
    tiny_embeddings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FINGERPRINT, "weights_sha256", "other weights")
    other = write_embeddings(tmp_path / "other", [unit_rows(3, 0)])
    monkeypatch.undo()
    for words in ({**made.score_words(tiny_embeddings, ("val",)), "test": (f"val={other}",)},
                  {**made.score_words(tiny_embeddings, ("val",)), "reference": (other,)}):  # fmt: skip
        with pytest.raises(IndexMismatchError, match="weights_sha256 is "):
            run(words, tmp_path / "s")


# --- the query side is written rarely ---------------------------------------------------------------------


def test_query_side_bytes_stay_below_one_percent_of_the_embeddings_read(tmp_path: Path) -> None:
    """Forty groups: the running lists are written whenever they are a small share of what was read, not per group."""
    pool = write_embeddings(tmp_path / "pool", [unit_rows(1000, seed) for seed in range(40)])
    test = write_embeddings(tmp_path / "test", [unit_rows(20, 99)])
    summary = run({"pool": pool, "test": (f"t={test}",), "k": 10}, tmp_path / "s", group_bytes=1)
    written = sum(path.stat().st_size for path in (tmp_path / "s" / "partial").iterdir())
    read = summary.extra["embedding_bytes"]
    assert read == 40 * 1000 * DIM * 2
    assert summary.extra["query_bytes"] == written
    assert 0 < written < 0.01 * read
    assert len(rundir.CommitLog(str(tmp_path / "s")).records) > 5  # and not only once at the end


# --- pools that grow ---------------------------------------------------------------------------------------


def grown_pool(folder: Path, parts: int, seed: int = 0) -> str:
    """A pool of a number of parts; the same seed gives the same first parts."""
    shutil.rmtree(folder, ignore_errors=True)
    return write_embeddings(folder, [unit_rows(30, seed + i) for i in range(parts)])


def test_parts_that_join_the_pool_are_scored_alone(tmp_path: Path) -> None:
    tests = [write_embeddings(tmp_path / f"test-{name}", [unit_rows(9, 50 + i)]) for i, name in enumerate("ab")]
    words = {"pool": grown_pool(tmp_path / "pool", 3), "test": (f"a={tests[0]}",), "k": 4, "reference": (tests[1],)}
    run(words, tmp_path / "s")
    run({**words, "test": (f"b={tests[1]}",)}, tmp_path / "s", add=True)
    before = made.stamps_below(str(tmp_path / "s" / "pool" / "a"))
    grown_pool(tmp_path / "pool", 5)
    summary = run(words, tmp_path / "s")
    after = made.stamps_below(str(tmp_path / "s" / "pool" / "a"))
    assert {name: after[name] for name in before} == before
    assert len(after) == 5
    assert summary.read == 150
    assert sorted(rundir.read_manifest(str(tmp_path / "s"), "score")["tests"]) == ["a"]  # b lacks the new parts
    run({**words, "test": (f"b={tests[1]}",)}, tmp_path / "s", add=True)
    for name, test in zip("ab", tests, strict=True):  # one at a time: the product's last bits depend on its shape
        run({**words, "test": (f"{name}={test}",)}, tmp_path / name)
        expected = outputs(tmp_path / name)
        assert {path: outputs(tmp_path / "s")[path] for path in expected} == expected
    assert sorted(rundir.read_manifest(str(tmp_path / "s"), "score")["tests"]) == ["a", "b"]


def test_a_scored_part_that_changed_is_refused(tmp_path: Path) -> None:
    test = write_embeddings(tmp_path / "test", [unit_rows(9, 50)])
    words = {"pool": grown_pool(tmp_path / "pool", 3), "test": (f"a={test}",), "k": 4}
    run(words, tmp_path / "s")
    grown_pool(tmp_path / "pool", 4, seed=1)
    with pytest.raises(StaleOutputError, match=r"scores other rows: 3 of 3 scored parts"):
        run(words, tmp_path / "s")


def test_violations_are_counted_exactly(tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    run(made.score_words(tiny_embeddings, ("val",)), tmp_path / "s", violations=True)
    table = pool_table(str(tmp_path / "s"), "val")
    rows = EmbeddingSet.open(tiny_embeddings["pool"]).all_images()
    tests = EmbeddingSet.open(tiny_embeddings["val"]).all_images()
    tau = store.read_table(f"{tiny_scores}/queries/val.parquet").column("tau").to_numpy()
    expected = (twins.similarities(rows, tests) > tau).sum(axis=1)
    assert table.column("violations").to_pylist() == expected.tolist()
    assert 0 < (expected > 0).mean() < 1
    assert table.drop_columns("violations").equals(pool_table(tiny_scores, "val"))
