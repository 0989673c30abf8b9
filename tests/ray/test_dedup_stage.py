"""Dedup finds exactly the planted copies, by one rule that no layout can change."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import StaleOutputError
from clipgap_ray.stages import dedup
from tests import made, twins

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
THRESHOLD = 0.97


def run(pool: str, out: Path, **more: object) -> list[dict]:
    summary = dedup.run(DedupSettings(pool=pool, out=str(out), **more))  # type: ignore[arg-type]
    tables = [store.read_table(str(path)) for path in sorted((out / "keep").iterdir())]
    table = pa.concat_tables(tables)
    assert table.schema == schema.KEEP
    rows = table.to_pylist()
    assert summary.read == len(rows) == EmbeddingSet.open(pool).num_rows
    assert summary.kept == sum(row["keep"] for row in rows)
    assert sum(summary.dropped.values()) == summary.read - summary.kept
    return rows


def test_planted_exact_copies_are_found_and_nothing_else(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    rows = run(tiny_embeddings["pool"], tmp_path / "d", min_similarity=2.0)  # nothing is that similar: bytes alone
    removed = {row["uid"] for row in rows if not row["keep"]}
    assert all(row["reason"] == "sha256" for row in rows if not row["keep"])
    alive = {row["uid"] for row in rows}
    # a group of copies: the source and its exact copies that could be read
    groups = defaultdict(set)
    for row in tiny_world.of("pool"):
        if row["duplicate_kind"] in ("source", "exact") and row["uid"] in alive and row["fault"] != "truncated_shard":
            groups[row["duplicate_group"]].add(row["uid"])
    # leaks and their originals are in different sets, but two pool rows may leak the same test image
    for row in tiny_world.of("pool"):
        if row["leak_kind"] == "exact" and row["uid"] in alive:
            groups[row["leak_of_set"], row["leak_of_key"]].add(row["uid"])
    expected = {uid for group in groups.values() for uid in sorted(group)[1:]}  # the lowest uid stays
    assert len(expected) >= 10
    assert removed == expected
    stands = {row["uid"]: row["kept_uid"] for row in rows}
    for group in groups.values():
        assert {stands[uid] for uid in group} == {min(group)}


@pytest.mark.parametrize("rule", ["greedy", "semdedup", "components"])
def test_rules_equal_brute_force_in_uid_order(
    tiny_embeddings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    rows = run(pool.uri, tmp_path / "one", min_similarity=THRESHOLD, rule=rule)
    monkeypatch.setattr(dedup, "GROUP_BYTES", 20_000)
    assert run(pool.uri, tmp_path / "many", min_similarity=THRESHOLD, rule=rule) == rows  # groups do not matter
    assert len(list((tmp_path / "many" / "edges").iterdir())) > 3

    meta = pool.all_metadata(["uid", "sha256", "row_id"]).to_pylist()
    order = sorted(range(len(meta)), key=lambda i: (meta[i]["uid"], meta[i]["row_id"]))
    first: dict[str, int] = {}
    distinct = [i for i in order if first.setdefault(meta[i]["sha256"], i) == i]
    table = twins.similarities(pool.all_images()[distinct], pool.all_images()[distinct])
    edges = {(a, b) for a, b in zip(*np.nonzero(np.triu(table, 1) >= THRESHOLD), strict=True)}
    if rule == "components":
        keep = [label == i for i, label in enumerate(twins.components(len(distinct), edges))]
    else:
        keep = getattr(twins, rule)(len(distinct), edges)
    assert 0 < sum(keep) < len(distinct)
    expected = {meta[i]["row_id"] for i, stays in zip(distinct, keep, strict=True) if stays}
    assert {row["row_id"] for row in rows if row["keep"]} == expected
    by_uid = {row["row_id"]: row for row in rows}
    for row in rows:
        if row["keep"]:
            assert (row["kept_uid"], row["group"], row["reason"], row["similarity"]) == (
                row["uid"],
                row["row_id"],
                "",
                None,
            )
        else:
            assert by_uid[row["group"]]["keep"]
            assert by_uid[row["group"]]["uid"] == row["kept_uid"]


def test_near_copies_that_were_planted_stand_for_each_other(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    rows = {
        row["uid"]: row for row in run(tiny_embeddings["pool"], tmp_path / "d", min_similarity=0.9, rule="components")
    }
    truth = {row["uid"]: row for row in tiny_world.of("pool") if row["fault"] == ""}
    source = {row["duplicate_group"]: uid for uid, row in truth.items() if row["duplicate_kind"] == "source"}
    reencoded = [uid for uid, row in truth.items() if row["duplicate_kind"] == "reencode" and uid in rows
                 and source.get(row["duplicate_group"]) in rows]  # fmt: skip
    assert len(reencoded) >= 4
    assert all(rows[uid]["group"] == rows[source[truth[uid]["duplicate_group"]]]["group"] for uid in reencoded)


def test_running_again_does_nothing_and_other_settings_are_refused(
    tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    run(tiny_embeddings["pool"], tmp_path / "d", min_similarity=THRESHOLD)
    before = made.stamps_below(str(tmp_path / "d" / "keep"))
    run(tiny_embeddings["pool"], tmp_path / "d", min_similarity=THRESHOLD)
    assert made.stamps_below(str(tmp_path / "d" / "keep")) == before
    with pytest.raises(StaleOutputError, match=r"min_similarity was 0\.97, now 0\.9"):
        run(tiny_embeddings["pool"], tmp_path / "d", min_similarity=0.9)
