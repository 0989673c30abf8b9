"""Embed through Ray: the bytes of the Ray-free twin, every planted fault in the ledger, resume, append, refuse."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import BudgetError, ConfigError, StaleOutputError
from clipgap_ray.stages import embed, embed_metrics, progress
from tests import made
from tests.conftest import CLIP_SCORE_TOLERANCE, STORED_NORM_TOLERANCE
from tests.driver import until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def settings(source: str, out: str, **more: object) -> EmbedSettings:
    # Workers asked for by number: jobs as small as these would be done in the driver.
    words = {"source": source, "out": out, "model": "projection", "batch_size": made.BATCH_SIZE, "workers": 2}
    return EmbedSettings(**{**words, **more})  # type: ignore[arg-type]


@dataclass
class Embedded:
    pool: EmbeddingSet
    summary: rundir.Summary
    ledger: list[dict[str, object]]


@pytest.fixture(scope="module")
def embedded(ray_session: None, tiny_world: made.World, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    out = str(tmp_path_factory.mktemp("stage") / "pool")
    summary = embed.run(settings(tiny_world.path("pool"), out))
    names = store.list_names(f"{out}/ledger")
    ledger = [row for name in names for row in store.read_table(f"{out}/ledger/{name}").to_pylist()]
    return Embedded(EmbeddingSet.open(out), summary, ledger)


def test_files_equal_those_of_the_twin_without_ray(embedded: Embedded, tiny_embeddings: dict[str, str]) -> None:
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        stage = made.files_below(f"{embedded.pool.uri}/{kind}")
        assert stage == made.files_below(f"{tiny_embeddings['pool']}/{kind}")
        assert len(stage) == 11
    assert embedded.pool.digest == EmbeddingSet.open(tiny_embeddings["pool"]).digest


def test_a_small_job_starts_no_actors_and_makes_the_same_files(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data, "read_datasource", None)
    out = str(tmp_path / "pool")
    summary = embed.run(settings(tiny_world.path("pool"), out, workers=0))
    assert summary.parts == 11
    assert summary.read == summary.kept + sum(summary.dropped.values())
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")


def test_a_job_that_was_taken_for_small_is_left_to_actors(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    by_actors = embed._chunks
    monkeypatch.setattr(embed, "HERE_S", 0.0)
    monkeypatch.setattr(embed, "_chunks", lambda window, *rest: left.extend(window) or by_actors(window, *rest))
    out = str(tmp_path / "pool")
    embed.run(settings(tiny_world.path("pool"), out, workers=0))
    assert len(left) == 10  # the first shard is done
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")


def test_rows_follow_the_shards_and_are_described(embedded: Embedded, tiny_world: made.World) -> None:
    pool = embedded.pool
    for part in pool.parts:
        meta = pool.metadata(part.number)
        assert meta.schema == schema.METADATA
        assert meta.column("row_id").to_pylist() == schema.row_ids(part.number, part.num_rows).tolist()
        assert set(meta.column("shard").to_pylist()) <= {part.shard}
        images, texts = np.asarray(pool.images(part.number)), np.asarray(pool.texts(part.number))
        assert images.shape == texts.shape == (part.num_rows, pool.dim)
        assert np.abs(np.linalg.norm(images.astype(np.float64), axis=1) - 1).max(initial=0) < STORED_NORM_TOLERANCE
        scores = np.einsum("nd,nd->n", images.astype(np.float64), texts.astype(np.float64))
        with open(tiny_world.path("pool", part.shard), "rb") as tar:
            for i, row in enumerate(meta.to_pylist()):
                tar.seek(row["image_offset"])
                assert store.sha256(tar.read(row["image_bytes"])) == row["sha256"]
                assert (row["caption"] is None) == (not texts[i].any()) == (row["clip_score"] is None)
                if row["clip_score"] is not None:
                    assert abs(row["clip_score"] - scores[i]) < CLIP_SCORE_TOLERANCE
    order = [row["uid"] for row in tiny_world.of("pool") if row["fault"] not in (
        "broken_image", "truncated_image", "truncated_shard", "empty_shard")]  # fmt: skip
    assert pool.all_metadata(["uid"]).column("uid").to_pylist() == order


def test_every_planted_fault_is_in_the_ledger_with_its_reason(embedded: Embedded, tiny_world: made.World) -> None:
    found = {(row["shard"], row["key"], row["reason"], row["dropped"]) for row in embedded.ledger}
    pool = embedded.pool.all_metadata(["uid"]).column("uid").to_pylist()
    seen = set()
    for row in tiny_world.of("pool"):
        shard, key = row["shard"].removeprefix("pool/"), row["key"]
        seen.add(row["fault"])
        match row["fault"]:
            case "broken_image" | "truncated_image":
                assert (shard, key, "broken_image", True) in found
            case "odd_suffix" | "missing_caption":
                assert (shard, key, row["fault"], False) in found
            case "repeated_key" | "doubled_key":
                assert (shard, f"{key}#2", "repeated_key", False) in found
            case "repeated_uid":
                assert pool.count(row["uid"]) == 2
            case "truncated_shard":
                assert row["uid"] not in pool
            case "empty_shard":
                assert (shard, "", "empty_shard", False) in found
    assert seen == {"", "broken_image", "truncated_image", "odd_suffix", "missing_caption", "repeated_key",
                    "doubled_key", "repeated_uid", "truncated_shard", "empty_shard"}  # fmt: skip
    assert [row["shard"] for row in embedded.ledger if row["reason"] == "truncated_shard"] == ["00009.tar"]


def test_counts_reconcile_with_ledger_and_truth(embedded: Embedded, tiny_world: made.World) -> None:
    summary = embedded.summary
    dropped = Counter(row["reason"] for row in embedded.ledger if row["dropped"])
    assert summary.dropped == dropped == {"broken_image": 2, "truncated_shard": 1}  # the cut went through one image
    assert summary.notes == Counter(row["reason"] for row in embedded.ledger if not row["dropped"])
    assert summary.read == summary.kept + sum(dropped.values())
    assert summary.kept == embedded.pool.num_rows
    faults = Counter(row["fault"] for row in tiny_world.of("pool"))
    assert summary.kept == 600 - faults["truncated_shard"] - 2
    assert summary.parts == 11


def test_running_again_touches_no_part(embedded: Embedded, tiny_world: made.World) -> None:
    out = embedded.pool.uri
    folders = ("img_emb", "text_emb", "metadata", "ledger", "commits")
    before = {name: made.stamps_below(f"{out}/{name}") for name in folders}
    summary = embed.run(settings(tiny_world.path("pool"), out))
    assert {name: made.stamps_below(f"{out}/{name}") for name in folders} == before
    assert (summary.parts_skipped, summary.read, summary.kept) == (11, embedded.summary.read, embedded.summary.kept)


def test_an_appended_shard_is_embedded_alone_and_takes_the_next_number(tiny_world: made.World, tmp_path: Path) -> None:
    source, out = tmp_path / "pool", str(tmp_path / "emb")
    source.mkdir()
    for name in ("00000.tar", "00002.tar"):
        shutil.copy(tiny_world.path("pool", name), source / name)
    embed.run(settings(str(source), out))
    before = made.stamps_below(f"{out}/img_emb")
    shutil.copy(tiny_world.path("pool", "00001.tar"), source / "00001.tar")
    summary = embed.run(settings(str(source), out))
    assert (summary.parts, summary.parts_skipped) == (3, 2)
    after = made.stamps_below(f"{out}/img_emb")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"img_emb_00002.npy"}
    parts = {part.shard: part.number for part in EmbeddingSet.open(out).parts}
    assert parts == {"00000.tar": 0, "00002.tar": 1, "00001.tar": 2}

    with pytest.raises(StaleOutputError, match="batch_size was 16, now 32"):
        embed.run(settings(str(source), out, batch_size=32))
    assert made.stamps_below(f"{out}/img_emb") == after


def test_a_sample_is_the_same_rows_at_any_share_and_marked(tiny_world: made.World, tmp_path: Path) -> None:
    source = tiny_world.path("pool", "00000.tar")
    uids = {}
    for share in (0.2, 0.6):
        out = str(tmp_path / str(share))
        summary = embed.run(settings(source, out, sample=share, text=False))
        uids[share] = set(EmbeddingSet.open(out).all_metadata(["uid"]).column("uid").to_pylist())
        assert summary.dropped["not_sampled"] == summary.read - summary.kept - summary.dropped.get("broken_image", 0)
        assert EmbeddingSet.open(out).manifest["partial"]["sample"] == share
        assert not Path(out, "text_emb").exists()
    assert uids[0.2] < uids[0.6]
    assert 0 < len(uids[0.2]) < 30 < len(uids[0.6]) < 55


def test_what_a_takedown_list_names_is_left_out_and_counted(
    embedded: Embedded, tiny_world: made.World, tmp_path: Path
) -> None:
    source, out = tiny_world.path("pool", "00000.tar"), str(tmp_path / "emb")
    rows = [row for row in embedded.pool.all_metadata().to_pylist() if row["shard"] == "00000.tar"]
    by_uid, by_hash, by_url = rows[0], rows[5], next(row for row in rows[6:] if row["url"])
    entries = [by_uid["uid"], by_hash["sha256"], by_url["url"]]
    takedown = tmp_path / "takedown.txt"
    takedown.write_text("# asked for by a person\n" + "\n".join(entries) + "\n")
    summary = embed.run(settings(source, out, blocklist=str(takedown)))
    gone = {row["image_path"] for row in rows if {row["uid"], row["sha256"], row["url"]} & set(entries)}
    assert {by_uid["image_path"], by_hash["image_path"], by_url["image_path"]} <= gone
    assert summary.dropped["blocklist"] == len(gone)
    opened = EmbeddingSet.open(out)
    assert opened.all_metadata(["image_path"]).column(0).to_pylist() == [
        row["image_path"] for row in rows if row["image_path"] not in gone
    ]
    ledger = store.read_table(f"{out}/ledger/ledger_00000.parquet").to_pylist()
    assert {row["key"] for row in ledger if row["reason"] == "blocklist" and row["dropped"]} == gone
    described = opened.manifest["blocklist"]
    assert (described["uids"], described["sha256"], described["urls"]) == (1, 1, 1)
    for path in Path(out).rglob("*.json*"):
        assert not any(entry in path.read_text() for entry in entries), path

    takedown.write_text("\n".join(reversed(entries)))  # the same list in other words
    assert embed.run(settings(source, out, blocklist=str(takedown))).parts_skipped == 1
    takedown.write_text(entries[0])
    with pytest.raises(StaleOutputError, match="blocklist was"):
        embed.run(settings(source, out, blocklist=str(takedown)))


@pytest.mark.slow
def test_an_image_only_encoder_leaves_the_text_rows_out(tiny_world: made.World, tmp_path: Path) -> None:
    out = str(tmp_path / "emb")
    words = {"model": "timm:test_vit.r160_in1k", "pretrained": "random"}
    summary = embed.run(settings(tiny_world.path("pool", "00000.tar"), out, **words))
    opened = EmbeddingSet.open(out)
    assert (opened.num_rows, opened.dim) == (summary.kept, 64)
    assert opened.manifest["text"] is False
    assert not Path(out, "text_emb").exists()
    meta = opened.all_metadata(["caption", "clip_score"])
    assert meta.column("caption").null_count < opened.num_rows == meta.column("clip_score").null_count


@pytest.mark.slow
def test_several_encoders_share_a_read_and_write_what_each_writes_alone(
    embedded: Embedded, tiny_world: made.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a death between the commits of the two, and a third begun later: what is whole is not computed again."""
    source, words = tiny_world.path("pool"), {"shards": "0:3"}
    a, b, alone = (str(tmp_path / name) for name in ("a", "b", "alone"))
    timm = "timm:test_vit.r160_in1k,random"
    embed.run(settings(source, alone, model=timm, **words))
    append = rundir.CommitLog.append

    def die(log: rundir.CommitLog, records: list[dict[str, object]]) -> None:
        if log.uri.startswith(b) and len(log.records) == 1:
            raise KeyboardInterrupt
        append(log, records)

    both = settings(source, a, also=(f"{b}={timm}",), **words)
    with monkeypatch.context() as dying:
        dying.setattr(rundir.CommitLog, "append", die)
        with pytest.raises(KeyboardInterrupt):
            embed.run(both)
    assert (len(rundir.CommitLog(a).records), len(rundir.CommitLog(b).records)) == (2, 1)
    (committed,) = (f"img_emb_{part:05d}.npy" for part in rundir.CommitLog(b).records)
    stamp = made.stamps_below(f"{b}/img_emb")[committed]
    summary = embed.run(both)
    assert (summary.parts, summary.parts_skipped) == (3, 2)
    assert (summary.extra["also"][b]["parts"], summary.extra["also"][b]["parts_skipped"]) == (3, 1)
    assert summary.extra["also"][b]["dropped"] == summary.dropped
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        whole = made.files_below(f"{embedded.pool.uri}/{kind}")
        mine = made.files_below(f"{a}/{kind}")
        assert len(mine) == 3
        assert mine.items() <= whole.items()
        assert made.files_below(f"{b}/{kind}") == made.files_below(f"{alone}/{kind}")
    assert made.stamps_below(f"{b}/img_emb")[committed] == stamp
    assert store.read_json(f"{a}/parts.json") == store.read_json(f"{b}/parts.json")
    assert store.read_json(f"{b}/settings.json") == store.read_json(f"{alone}/settings.json")
    assert EmbeddingSet.open(b).digest == EmbeddingSet.open(alone).digest
    assert embed.run(settings(source, b, model=timm, **words)).parts_skipped == 3  # each goes on alone

    store.write_json(f"{alone}/parts.json", {"00002.tar": 0})
    with pytest.raises(ConfigError, match=r"gives part 0 to shard 00002.tar, .*/a gives it"):
        embed.run(settings(source, a, also=(f"{alone}={timm}",), **words))


def test_a_labelled_set_keeps_its_classes(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "val")
    embed.run(settings(tiny_world.path("tests/val"), out))
    opened = EmbeddingSet.open(out)
    assert opened.digest == EmbeddingSet.open(tiny_embeddings["val"]).digest
    truth = {row["key"]: row for row in tiny_world.of("val")}
    for row in opened.all_metadata().to_pylist():
        assert (row["label"], row["class_name"]) == (
            truth[row["image_path"]]["label"],
            truth[row["image_path"]]["class_name"],
        )
        assert row["caption"] == f"a photo of a {row['class_name']}."
    assert opened.manifest["class_names"][0] == truth[min(truth, key=lambda k: truth[k]["label"])]["class_name"]


def test_hours_on_cpus_are_refused_before_any_output(
    tiny_world: made.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tiny_world.path("pool"), str(tmp_path / "emb")
    monkeypatch.setattr(embed.budget, "LIMIT_S", 0.0)
    with pytest.raises(BudgetError, match=r"about 660 rows at .* images/s: ETA \d+ s; more than 0 s needs --yes"):
        embed.run(settings(source, out))
    assert not Path(out).exists()
    with caplog.at_level(logging.INFO, logger="clipgap"):
        assert embed.run(settings(source, out, yes=True, shards="0:1")).parts == 1
    assert any("embed on cpu: about 60 rows at" in line for line in caplog.messages)
    assert embed.run(settings(source, out, shards="0:1")).parts_skipped == 1  # nothing left, nothing to agree to


def test_impossible_settings_end_before_any_output(tiny_world: made.World, tmp_path: Path) -> None:
    out = str(tmp_path / "emb")
    for more, message in (
        ({"model": "ViT-B-23", "pretrained": "x"}, "unknown model"),
        ({"source": "/nowhere"}, "does not exist"),
        ({"shards": "50:60"}, "selects none"),
        ({"device": "cuda"}, "no node of the cluster has a GPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            embed.run(settings(**{"source": tiny_world.path("pool"), "out": out, **more}))  # type: ignore[arg-type]
    assert not Path(out).exists()


@pytest.mark.slow  # Ray's agents collect every 10 s
def test_what_a_run_measures_is_in_its_summary_and_on_the_nodes_prometheus_port(
    tiny_world: made.World, tmp_path: Path
) -> None:
    summary = embed.run(settings(tiny_world.path("pool"), str(tmp_path / "emb"), shards="0:2"))
    measured = summary.as_dict()
    assert measured["decode_ms_per_image"] > 0
    assert 0 < measured["encoder_busy_share"] <= 1
    rows = EmbeddingSet.open(str(tmp_path / "emb")).all_metadata(["image_bytes"]).column(0)
    assert measured["image_bytes"] >= sum(rows.to_pylist()) > 0  # broken ones were looked at too
    assert measured["cross_node_bytes"] == 0
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {f"ray_{name}_total" for name in embed_metrics.COUNTERS if "cross_node" not in name}
    wanted |= {f"ray_{name}" for name in embed_metrics.GAUGES}
    wanted |= {f"ray_{name}_total" for name in progress.COUNTERS} | {f"ray_{name}" for name in progress.GAUGES}

    def page() -> str:
        return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text

    def missing() -> set[str]:
        return wanted - set(re.findall(r"^(ray_clipgap_\w+)\{", page(), re.M))

    def none_left() -> bool:  # the names may be those of an earlier run, while this one's last value is still to come
        return bool(re.search(r'ray_clipgap_stage_units_left\{[^}]*stage="embed"[^}]*\} 0.0', page()))

    until(lambda: not missing() and none_left(), f"export of {missing()} and of nothing left", 60)
    assert re.search(r'ray_clipgap_embed_rows_total\{[^}]*outcome="kept"', page())
