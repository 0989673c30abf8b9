"""Dedup on rows with known geometry: partitions against all pairs, who stays, thresholds, groups, what is resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels.vectors import normalise, to_storage
from clipgap_ray.stages import dedup, edges, partitions
from clipgap_ray.stages.keep import read_keep
from tests import made, twins

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
T = 0.9


def uid_texts(count: int, seed: int = 0) -> list[str]:
    words = np.random.default_rng(seed).integers(0, 1 << 62, (count, 2))
    return [f"{a:016x}{b:016x}" for a, b in words.tolist()]


def crowded_rows(count: int, dim: int, seed: int) -> np.ndarray:
    """(count, dim) float16 unit rows, half of them close to another one: pairs on both sides of 0.9."""
    rng = np.random.default_rng(seed)
    rows = normalise(rng.standard_normal((count, dim)))
    copies = rng.integers(0, count // 2, count - count // 2)
    rows[count // 2 :] = normalise(rows[copies] + 0.5 / np.sqrt(dim) * rng.standard_normal((len(copies), dim)))
    return to_storage(rows)


def pool_of(
    out: Path, rows: np.ndarray, uids: list[str], sizes: list[int] | None = None, **columns: list[Any]
) -> EmbeddingSet:
    """A pool in parts of these sizes (default: two uneven ones)."""
    sizes = sizes or [len(rows) // 3, len(rows) - len(rows) // 3]
    cuts = np.cumsum(sizes)[:-1].tolist()
    bounds = list(zip([0, *cuts], [*cuts, len(rows)], strict=True))
    split = {name: [values[a:b] for a, b in bounds] for name, values in columns.items()}
    return made.write_embeddings(str(out), [rows[a:b] for a, b in bounds], [uids[a:b] for a, b in bounds], **split)


def run(pool: EmbeddingSet, out: Path, **more: Any) -> list[dict[str, Any]]:
    """Run a dedup and return its keep table."""
    words = {"min_similarity": T, "check_rows": 0, **more}
    summary = dedup.run(DedupSettings(pool=pool.uri, out=str(out), **words))
    assert summary.read == pool.num_rows == summary.kept + sum(summary.dropped.values())
    return keep_rows(out)


def keep_rows(out: Path, folder: str = "keep") -> list[dict[str, Any]]:
    tables = [store.read_table(str(path)) for path in sorted((out / folder).iterdir())]
    assert all(table.schema == schema.KEEP for table in tables)
    return pa.concat_tables(tables).to_pylist()


def groups_of(out: Path, name: str = "groups") -> list[dict[str, Any]]:
    table = store.read_table(str(out / f"{name}.parquet"))
    assert table.schema == schema.GROUPS
    return table.to_pylist()


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def checked(out: Path) -> dict[str, Any]:
    """The miss rate that a run reports, without its interval, which must hold it."""
    check: dict[str, Any] = summary_of(out)["check"]
    for counts in check["at"].values():
        low, high = counts.pop("miss_rate_95")
        assert low - 1e-12 < counts["miss_rate"] < high + 1e-12  # Wilson's own rounding
    return check


def kept_uids(rows: list[dict[str, Any]]) -> set[str]:
    return {row["uid"] for row in rows if row["keep"]}


# --- rules and groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"mode": "exact"}, {"mode": "partitioned", "partitions": 2, "probes": 2}])
@pytest.mark.parametrize(
    ("rule", "kept", "groups"),
    [
        ("semdedup", {"a", "d"}, [("a", "a", None), ("b", "a", "ab"), ("c", "a", "bc")]),
        ("greedy", {"a", "c", "d"}, [("a", "a", None), ("b", "a", "ab")]),
        ("components", {"a", "d"}, [("a", "a", None), ("b", "a", "ab"), ("c", "a", None)]),
    ],
)
def test_a_chain_gives_the_three_known_answers(
    tmp_path: Path, mode: dict[str, Any], rule: str, kept: set[str], groups: list[tuple[str, str, str | None]]
) -> None:
    """a ~ b ~ c at 20 degrees, a and c at 40; d is far away (train_test_similarity.md 2.3)."""
    angles = {"a": 0, "b": 20, "c": 40, "d": 150}
    rows = to_storage(np.array([[np.cos(np.radians(x)), np.sin(np.radians(x)), 0, 0] for x in angles.values()]))
    uids = [name * 32 for name in angles]
    pool = pool_of(tmp_path / "p", rows, uids)
    assert kept_uids(run(pool, tmp_path / "d", rule=rule, **mode)) == {name * 32 for name in kept}
    table = twins.similarities(rows, rows).astype(np.float32)
    at = {name: i for i, name in enumerate(angles)}
    expected = [
        {
            "uid": uid * 32,
            "kept_uid": kept_uid * 32,
            "similarity": None if pair is None else float(table[at[pair[0]], at[pair[1]]]),
            "group": int(made.all_row_ids(pool)[at[kept_uid]]),
        }
        for uid, kept_uid, pair in groups
    ]  # fmt: skip
    assert groups_of(tmp_path / "d") == expected


def test_groups_are_the_keep_tables_groups_of_two_and_more(tmp_path: Path) -> None:
    rows = crowded_rows(90, 8, 0)
    sha = [f"{i // 2:064x}" for i in range(90)]  # pairs of equal bytes, whatever the rows say
    pool = pool_of(tmp_path / "p", rows, uid_texts(90), sha256=sha)
    keep = run(pool, tmp_path / "d")
    assert {row["reason"] for row in keep} == {"", "sha256", "similarity"}
    members: dict[int, list[dict[str, Any]]] = {}
    for row in keep:
        members.setdefault(row["group"], []).append(row)
    expected = [row for group in members.values() if len(group) > 1 for row in group]
    found = groups_of(tmp_path / "d")
    assert len({row["group"] for row in found}) < len(found) == len(expected)
    key = ("uid", "kept_uid", "similarity", "group")
    assert sorted(tuple(row[k] for k in key[:2]) for row in found) == sorted(
        (r["uid"], r["kept_uid"]) for r in expected
    )
    by_uid = {row["uid"]: row for row in keep}
    assert all(row[k] == by_uid[row["uid"]][k] for row in found for k in key)
    heads = [row["uid"] == row["kept_uid"] for row in found]
    firsts = [i == 0 or found[i - 1]["group"] != row["group"] for i, row in enumerate(found)]
    assert heads == firsts  # the row that stays opens its group


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), threshold=st.floats(0.5, 0.95))
def test_greedy_leaves_no_close_pair_and_a_second_pass_removes_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, threshold: float
) -> None:
    folder = tmp_path_factory.mktemp("greedy")
    rows, uids = crowded_rows(60, 6, seed), uid_texts(60, seed)
    keep = run(pool_of(folder / "p", rows, uids), folder / "d", min_similarity=threshold)
    kept = np.array([row["keep"] for row in keep])
    table = twins.similarities(rows[kept], rows[kept])
    assert (table[~np.eye(len(table), dtype=bool)] < threshold).all()
    again = pool_of(folder / "q", rows[kept], [uid for uid, k in zip(uids, kept, strict=True) if k])
    assert all(row["keep"] for row in run(again, folder / "e", min_similarity=threshold))


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), eps=st.floats(0.05, 0.5))
def test_first_in_source_order_with_semdedup_reproduces_the_authors_rule(
    tmp_path_factory: pytest.TempPathFactory, seed: int, eps: float
) -> None:
    folder = tmp_path_factory.mktemp("authors")
    rows = crowded_rows(60, 6, seed)
    keep = run(pool_of(folder / "p", rows, uid_texts(60, seed)), folder / "d",
               min_similarity=1 - eps, rule="semdedup", order="source", stays="first")  # fmt: skip
    lower = np.tril(twins.similarities(rows, rows), -1)
    assert [row["keep"] for row in keep] == [bool(row.max() <= 1 - eps) for row in lower]


# --- partitions ------------------------------------------------------------------------------------------


def brute_keep(
    rows: np.ndarray, uids: list[str], centroids: np.ndarray, probes: int, rule: str
) -> tuple[set[str], int, int]:
    """Kept uids, edges compared and edges there are, from whole matrices."""
    order = sorted(range(len(rows)), key=lambda i: uids[i])
    ordered = rows[order]
    close = np.triu(twins.similarities(ordered, ordered) >= T, 1)
    seen = close & twins.compared(ordered, centroids, probes)
    pairs = {(int(a), int(b)) for a, b in zip(*np.nonzero(seen), strict=True)}
    if rule == "components":
        keep = [label == i for i, label in enumerate(twins.components(len(rows), pairs))]
    else:
        keep = getattr(twins, rule)(len(rows), pairs)
    return {uids[i] for i, k in zip(order, keep, strict=True) if k}, int(seen.sum()), int(close.sum())


@pytest.mark.parametrize("probes", [1, 2, 3])
@pytest.mark.parametrize("unit_bytes", [pytest.param(1, marks=pytest.mark.slow), 3000, 1 << 27])
@pytest.mark.parametrize("rule", ["greedy", "components"])
def test_partitions_equal_brute_force_whatever_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: int, unit_bytes: int, rule: str
) -> None:
    rows, uids = crowded_rows(80, 4, 5), uid_texts(80)
    pool = pool_of(tmp_path / "p", rows, uids, [30, 1, 0, 49])
    monkeypatch.setattr(partitions, "UNIT_BYTES", unit_bytes if unit_bytes > 1 else 200)  # 200: slices of a few rows
    monkeypatch.setattr(partitions, "ASSIGN_BYTES", 1 if unit_bytes < 1 << 27 else 1 << 28)
    keep = run(pool, tmp_path / "d", mode="partitioned", partitions=7, probes=probes, rule=rule, check_rows=1000)
    centroids = np.load(tmp_path / "d" / "partitions" / "centroids.npy")
    assert len(centroids) == 7
    expected, seen, total = brute_keep(rows, uids, centroids, probes, rule)
    assert kept_uids(keep) == expected
    summary = summary_of(tmp_path / "d")
    assert summary["edges"] == seen  # each pair once
    missed = total - seen
    assert checked(tmp_path / "d") == {  # 1000 rows asked for: the sample is the whole pool
        "rows": 80, "at": {"0.9": {"pairs": total, "missed": missed, "miss_rate": missed / total}},
    }  # fmt: skip
    assert 0 < missed < total or probes > 1
    assert not [name for name in store.list_names(str(tmp_path / "d" / "partitions")) if name.startswith("rows-")]


@pytest.mark.parametrize("stays", ["first", "hard", "easy", "random"])
def test_probing_every_partition_is_the_exact_mode(tmp_path: Path, stays: str) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(120, 6, 1), uid_texts(120))
    words: dict[str, Any] = {"partitions": 5, "stays": stays, "seed": 3}
    exact = run(pool, tmp_path / "e", mode="exact", **words)
    assert run(pool, tmp_path / "q", mode="partitioned", probes=5, **words) == exact
    assert groups_of(tmp_path / "q") == groups_of(tmp_path / "e")


def test_planted_duplicates_across_partitions_are_found_by_probing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count, near = 800, 0.96
    sources = normalise(rng.standard_normal((count, 12)))
    copies = normalise(sources + 0.04 * rng.standard_normal((count, 12)))
    rows, uids = to_storage(np.concatenate([sources, copies])), uid_texts(2 * count)
    close = np.argwhere(np.triu(twins.similarities(rows, rows), 1) >= near)
    assert close.tolist() == [[i, i + count] for i in range(count)]  # the planted pairs, and no other
    pool = pool_of(tmp_path / "p", rows, uids)
    missed: dict[int, int] = {}
    for probes in (1, 2):
        out = tmp_path / f"probes-{probes}"
        kept = kept_uids(run(pool, out, mode="partitioned", partitions=40, probes=probes, min_similarity=near,
                             check_rows=10_000))  # fmt: skip
        centroids = np.load(out / "partitions" / "centroids.npy")
        home = twins.nearest(rows, centroids, np.arange(len(centroids)), 1)[1][:, 0]
        across = home[:count] != home[count:]
        assert across.sum() >= 5, "the world must plant pairs across partitions"
        both = np.array([{uids[i], uids[i + count]} <= kept for i in range(count)])
        assert not both[~across].any()
        missed[probes] = int(both.sum())
        check = checked(out)["at"][str(near)]
        assert check == {"pairs": count, "missed": missed[probes], "miss_rate": missed[probes] / count}
        assert missed[probes] == (int(across.sum()) if probes == 1 else 0)


@pytest.mark.parametrize(
    "mode", [{"mode": "exact"}, {"mode": "partitioned", "partitions": 6, "probes": 2, "check_rows": 20}]
)
@pytest.mark.parametrize("stays", ["first", "hard", "random"])
def test_defect_13_shards_and_their_order_do_not_change_what_stays(
    tmp_path: Path, mode: dict[str, Any], stays: str
) -> None:
    rows, uids = crowded_rows(90, 6, 2), uid_texts(90)
    one = pool_of(tmp_path / "p", rows, uids, [40, 50])
    order = np.random.default_rng(7).permutation(90)
    other = pool_of(tmp_path / "q", rows[order], [uids[i] for i in order], [5, 30, 20, 35])
    first = {row["uid"]: row for row in run(one, tmp_path / "d", stays=stays, **mode)}
    second = {row["uid"]: row for row in run(other, tmp_path / "e", stays=stays, **mode)}
    for uid, row in first.items():
        assert all(row[name] == second[uid][name] for name in ("keep", "kept_uid", "similarity", "reason")), uid
    assert summary_of(tmp_path / "d").get("check") == summary_of(tmp_path / "e").get("check")
    if mode["mode"] == "partitioned":
        found = [np.load(tmp_path / name / "partitions" / "centroids.npy") for name in "de"]
        assert np.array_equal(*found)


@pytest.mark.parametrize("mode", [{"mode": "exact"}, {"mode": "partitioned", "partitions": 4, "probes": 2}])
def test_defect_14_no_matrix_of_similarities_reaches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    count, dim = 1500, 16
    monkeypatch.setattr(partitions, "remove_rows", lambda uri: None)  # look at what a run has at its largest
    pool = pool_of(tmp_path / "p", made.unit_rows(count, dim, 3), uid_texts(count))
    run(pool, tmp_path / "d", min_similarity=0.8, check_rows=50, **mode)
    written = sum(len(data) for data in made.files_below(str(tmp_path / "d")).values())
    assert written < count * count / 4  # one bit for a pair would be more than half of this
    assert written < 600 * count  # keep table, regrouped rows, edges: all linear in the rows


# --- who stays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", ["hard", "easy"])
def test_hard_and_easy_are_semdedups_order_by_similarity_to_the_centroid(tmp_path: Path, stays: str) -> None:
    rows, uids = crowded_rows(100, 6, 4), uid_texts(100)
    pool = pool_of(tmp_path / "p", rows, uids)
    keep = run(pool, tmp_path / "d", stays=stays, mode="exact", partitions=4, rule="semdedup")
    centroids = np.load(tmp_path / "d" / "partitions" / "centroids.npy")
    to_own = twins.similarities(rows, centroids).max(axis=1)
    sign = 1 if stays == "hard" else -1
    order = sorted(range(100), key=lambda i: (sign * to_own[i], uids[i]))
    ordered = rows[order]
    close = twins.similarities(ordered, ordered) >= T
    expected = twins.semdedup(100, {(int(a), int(b)) for a, b in zip(*np.nonzero(np.triu(close, 1)), strict=True)})
    assert kept_uids(keep) == {uids[i] for i, k in zip(order, expected, strict=True) if k}
    assert kept_uids(keep) != kept_uids(run(pool, tmp_path / "f", rule="semdedup"))


def test_random_is_a_draw_by_seed_and_uid(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(100, 6, 4), uid_texts(100))
    draws = [kept_uids(run(pool, tmp_path / f"d{i}", stays="random", seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert draws[0] == draws[1] != draws[2]


def test_the_largest_value_of_a_column_stays_and_unknown_ones_go(tmp_path: Path) -> None:
    rows = np.repeat(np.eye(8, dtype=np.float16)[:3], 3, axis=0)  # three groups of three
    uids = [f"{i:032x}" for i in range(9)]
    columns: dict[str, list[Any]] = {
        "clip_score": [0.1, 0.3, 0.2, None, None, -0.5, 0.2, 0.2, None],
        "width": [10, 20, 30, 5, 5, 5, 1, 2, 3],
        "height": [10, 4, 3, 5, 6, 7, 9, 3, 1],
    }
    pool = pool_of(tmp_path / "p", rows, uids, **columns)
    for stays, expected in {"clip_score": [1, 5, 6], "resolution": [0, 5, 6], "width": [2, 3, 8]}.items():
        assert kept_uids(run(pool, tmp_path / stays, stays=stays)) == {uids[i] for i in expected}
    copies = pool_of(tmp_path / "q", rows, uids, sha256=[f"{i // 3:064x}" for i in range(9)], **columns)
    keep = run(copies, tmp_path / "sha", stays="clip_score", min_similarity=2.0)
    assert kept_uids(keep) == {uids[i] for i in (1, 5, 6)}  # of equal bytes, too
    assert {row["reason"] for row in keep} == {"", "sha256"}


def test_unknown_words_and_repeated_thresholds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--stays 'best' is neither one of first, hard, easy, random"):
        DedupSettings.load({"pool": "p", "out": "o", "stays": "best"}, "")
    with pytest.raises(ConfigError, match=r"repeat a threshold"):
        DedupSettings.load({"pool": "p", "out": "o", "min_similarity": 0.9, "also": [0.9]}, "")


# --- thresholds, choice of mode, limits ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"mode": "exact"}, {"mode": "partitioned", "partitions": 5, "probes": 2}])
def test_several_thresholds_from_one_pass_equal_a_run_each(tmp_path: Path, mode: dict[str, Any]) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(120, 6, 6), uid_texts(120))
    together = run(pool, tmp_path / "all", min_similarity=0.9, also=(0.85, 0.96), **mode)
    counts = {}
    for value in (0.85, 0.9, 0.96):
        alone = run(pool, tmp_path / str(value), min_similarity=value, **mode)
        suffix = "" if value == 0.9 else f"-{value}"
        assert (together if value == 0.9 else keep_rows(tmp_path / "all", f"keep{suffix}")) == alone
        assert groups_of(tmp_path / "all", f"groups{suffix}") == groups_of(tmp_path / str(value))
        masks = read_keep(str(tmp_path / "all") if value == 0.9 else str(tmp_path / "all" / f"keep{suffix}"), pool)
        expected = read_keep(str(tmp_path / str(value)), pool)
        assert all(np.array_equal(masks[part], expected[part]) for part in expected)
        counts[str(value)] = sum(row["keep"] for row in alone)
    reported = summary_of(tmp_path / "all")["thresholds"]
    assert {value: entry["kept"] for value, entry in reported.items()} == counts
    assert len(set(counts.values())) == 3
    with pytest.raises(DataError, match="does not exist"):
        read_keep(str(tmp_path / "all" / "keep-0.5"), pool)


def test_auto_says_what_it_chose_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(60, 6, 0), uid_texts(60))
    with caplog.at_level(logging.INFO, "clipgap"):
        run(pool, tmp_path / "small")
        monkeypatch.setattr(dedup, "EXACT_ROWS", 50)
        monkeypatch.setattr(dedup, "ROWS_PER_PARTITION", 10)
        run(pool, tmp_path / "large", check_rows=1000)
    assert "dedup: exact (all pairs): 60 rows are at most 200,000" in caplog.text
    assert "dedup: partitioned (6 partitions, 2 probed per row): 60 rows are more than 50" in caplog.text
    assert "were not compared: miss rate" in caplog.text
    assert [summary_of(tmp_path / name)["mode"] for name in ("small", "large")] == ["exact", "partitioned"]
    assert summary_of(tmp_path / "large")["partitions"] == 6


@pytest.mark.parametrize("mode", ["exact", "partitioned"])
def test_too_many_pairs_are_refused_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(60, 6, 0), uid_texts(60))
    monkeypatch.setattr(edges, "MAX_EDGES", 10)
    with pytest.raises(ConfigError, match=r"more than 10 pairs of rows[\s\S]*raise --min-similarity"):
        run(pool, tmp_path / "d", mode=mode, min_similarity=0.1)


# --- resume ----------------------------------------------------------------------------------------------


def test_a_partitioned_run_resumes_unit_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(120, 6, 1), uid_texts(120), [50, 30, 40])
    monkeypatch.setattr(partitions, "ASSIGN_BYTES", 1)
    monkeypatch.setattr(partitions, "UNIT_BYTES", 800)
    monkeypatch.setattr(partitions, "remove_rows", lambda uri: None)
    words: dict[str, Any] = {"mode": "partitioned", "partitions": 5, "probes": 2, "check_rows": 40}
    whole = run(pool, tmp_path / "d", **words)
    digest = rundir.read_manifest(str(tmp_path / "d"), "dedup")["digest"]
    before = made.stamps_below(str(tmp_path / "d"))
    units = sorted(name for name in before if name.startswith("edges/"))
    assert len(units) > 5
    lost = [units[0], units[-1], "check/00001-00001.npz", "partitions/assigned-00002-00002.npz"]
    for name in [*lost, "manifest.json", "summary.json", "found.json"]:
        (tmp_path / "d" / name).unlink()
    for path in (tmp_path / "d" / "commits").iterdir():
        path.unlink()
    assert run(pool, tmp_path / "d", **words) == whole
    assert rundir.read_manifest(str(tmp_path / "d"), "dedup")["digest"] == digest
    after = made.stamps_below(str(tmp_path / "d"))
    work = {name for name in before if name.split("/")[0] in ("edges", "check", "partitions")}
    changed = {name for name in work if before[name] != after[name]}
    assert changed == {*lost, "partitions/rows-00002-00002.bin"}


def test_settings_that_a_mode_does_not_use_may_change_and_others_may_not(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "p", crowded_rows(60, 6, 0), uid_texts(60))
    run(pool, tmp_path / "d", mode="exact")
    run(pool, tmp_path / "d", mode="auto", probes=3, partitions=9, seed=4)
    for other in ({"also": (0.95,)}, {"stays": "random"}, {"mode": "partitioned"}):
        with pytest.raises(Exception, match="was written with other settings"):
            run(pool, tmp_path / "d", **other)
