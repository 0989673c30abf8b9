"""Audit: planted copies are found, a verdict never says more than was looked for, other encoders are refused."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import cli, store
from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.embeddings import EmbeddingSet, identity
from clipgap_ray.errors import BudgetError, ConfigError, DataError, IndexMismatchError
from clipgap_ray.reporting import contamination
from clipgap_ray.stages import audit
from tests.unit.study_fixture import CLASSES, Built, build_study


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build_study(tmp_path_factory.mktemp("study"))


def settings(built: Built, out, **more) -> AuditSettings:
    embed = built.root / "embed"
    values = {"pool": str(embed / "pool"), "out": str(out), "duplicate": 0.98,
              "test": (f"val={embed / 'val'}", f"sketch={embed / 'sketch'}")}  # fmt: skip
    return AuditSettings(**{**values, **more})


def test_planted_leaks_are_found_and_counts_match_brute_force(built, tmp_path) -> None:
    reference = str(built.root / "embed" / "reference")
    predictions = f"val={built.root / 'eval' / 'full-s0' / 'val.parquet'}"
    summary = audit.run(settings(built, tmp_path, reference=reference, predictions=(predictions,)))
    result = json.loads((tmp_path / "audit.json").read_text())
    val, sketch = result["tests"]
    assert val["verdict"] == "CONTAMINATED"
    assert val["duplicates"]["exact"]["count"] == 2
    assert {pair["test_key"] for pair in val["pairs"][:2]} == {"000000", "000001"}
    assert all(pair["same_bytes"] for pair in val["pairs"][:2])
    assert sketch["verdict"] == "NO DUPLICATES FOUND AT SIMILARITY >= 0.98"
    assert "dimensions" in sketch["why_no_control"]  # drawn rows: no encoder makes them again
    assert sketch["hash_rate"] is None
    for test in result["tests"]:
        best = built.similarity[test["test"]].max(axis=1)
        for near in test["duplicates"]["near"]:
            assert near["count"] == (best >= near["similarity"]).sum()
        assert test["gap"]["closer_to_pool"]["count"] == (best > built.tau[test["test"]]).sum()
        assert test["gap"]["pool"]["50"] == pytest.approx(np.median(best))
    assert val["accuracy"]["clean"]["num_images"] == 78
    assert val["accuracy"]["interval_pp"][0] <= val["accuracy"]["whole_minus_clean_pp"]
    assert summary.extra["exit_code"] == 0
    html = (tmp_path / "index.html").read_text()
    assert "CONTAMINATED" in html
    assert "400 of 400 pool rows examined" in html


def with_metadata(built: Built, target, parts, **columns) -> str:
    """Copy the pool, or a test set, with columns of some parts written anew: name = value of every row."""
    shutil.copytree(built.root / "embed" / target.name, target)
    for part in parts:
        path = str(target / "metadata" / f"metadata_{part:05d}.parquet")
        table = store.read_table(path)
        for name, value in columns.items():
            column = pa.array([value] * table.num_rows, pa.string() if isinstance(value, str) else pa.int64())
            at = table.column_names.index(name) if name in table.column_names else -1
            table = table.set_column(at, name, column) if at >= 0 else table.append_column(name, column)
        store.write_table(path, table)
    return str(target)


def test_unknown_bytes_are_no_rate_of_zero(built, tmp_path) -> None:
    pool = with_metadata(built, tmp_path / "pool", [0], sha256="")  # the part that holds the two leaks
    audit.run(settings(built, tmp_path / "o", pool=pool))
    val = json.loads((tmp_path / "o" / "audit.json").read_text())["tests"][0]
    assert val["duplicates"]["exact"] is None
    assert val["exact_rate"] is None
    assert val["unknown"]["pool_bytes"] == 150
    assert val["verdict"] == "CONTAMINATED"  # by similarity
    assert "no sha256 of 150 pool rows and 0 test images" in (tmp_path / "o" / "index.html").read_text()
    with pytest.raises(ConfigError, match=r"exact_rate>0' for val needs the sha256.*150"):
        audit.run(settings(built, tmp_path / "o", pool=pool, fail_on=("exact_rate>0",)))


def test_hashes_of_a_part_of_the_pool_are_no_rate_but_what_they_find_counts(built, tmp_path) -> None:
    telling = 0x5555555555555555
    pool = with_metadata(built, tmp_path / "pool", [1], phash=telling, phash_flipped=telling)
    sketch = with_metadata(built, tmp_path / "sketch", [0], phash=telling, phash_flipped=telling)
    own = {"pool": pool, "test": (f"sketch={sketch}",)}
    audit.run(settings(built, tmp_path / "o", **own))
    found = json.loads((tmp_path / "o" / "audit.json").read_text())["tests"][0]
    assert found["hash_rate"] is None
    assert (found["unknown"]["pool_hash"], found["unknown"]["test_hash"]) == (250, 0)
    assert found["verdict"] == "CONTAMINATED"
    assert found["duplicates"]["duplicated"]["count"] == 80
    with pytest.raises(ConfigError, match="needs perceptual hashes of all images"):
        audit.run(settings(built, tmp_path / "o", **own, fail_on=("hash_rate>0",)))


def test_fail_on_gives_exit_code_4(built, tmp_path) -> None:
    summary = audit.run(settings(built, tmp_path, fail_on=("dup_rate>0.001",)))
    assert summary.extra["exit_code"] == 4
    assert summary.extra["failed_rules"] == ["val: dup_rate is 0.025, rule dup_rate>0.001"]
    assert audit.run(settings(built, tmp_path, fail_on=("exact_rate>0.025",))).extra["exit_code"] == 0
    assert audit.run(settings(built, tmp_path, fail_on=("exact_rate>=0.025",))).extra["exit_code"] == 4
    with pytest.raises(ConfigError, match="is no rule"):
        AuditSettings.load({**settings(built, tmp_path).model_dump(), "fail_on": ("dups>1",)}, "audit")
    with pytest.raises(ConfigError, match="needs --reference"):
        audit.run(settings(built, tmp_path, fail_on=("closer_rate>0.5",)))


def test_thresholds_file_gives_the_same_gap_as_the_reference_and_must_be_its_own(built, tmp_path) -> None:
    test = EmbeddingSet.open(str(built.root / "embed" / "val"))
    table = store.read_table(str(built.root / "scores" / "queries" / "val.parquet"))
    table = table.select(["row_id", "uid", "tau", "reference_uid"]).take(list(range(79, -1, -1)))
    marks = {"clipgap.encoder": store.digest(identity(test.encoder)), "clipgap.test": test.digest}
    store.write_table(str(tmp_path / "tau.parquet"), table.replace_schema_metadata(marks))
    one = {"test": (f"val={test.uri}",), "thresholds": (str(tmp_path / "tau.parquet"),)}
    audit.run(settings(built, tmp_path / "o", **one))
    found = json.loads((tmp_path / "o" / "audit.json").read_text())["tests"][0]
    expected = (built.similarity["val"].max(axis=1) > built.tau["val"]).sum()
    assert found["gap"]["closer_to_pool"]["count"] == expected
    store.write_table(str(tmp_path / "tau.parquet"), table.replace_schema_metadata({**marks, "clipgap.test": "other"}))
    with pytest.raises(DataError, match=r"clipgap\.test differs"):
        audit.run(settings(built, tmp_path / "o", **one))


def test_rows_that_were_not_embedded_make_it_incomplete(built, tmp_path) -> None:
    shutil.copytree(built.root / "embed" / "pool", tmp_path / "pool")
    log = next((tmp_path / "pool" / "commits").iterdir())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[0]["dropped"] = {"bad_image": 3}
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    sketch = (f"sketch={built.root / 'embed' / 'sketch'}",)
    summary = audit.run(settings(built, tmp_path / "o", pool=str(tmp_path / "pool"), test=sketch))
    assert summary.extra["verdicts"] == {"sketch": "INCOMPLETE"}
    assert (summary.read, summary.kept, summary.dropped) == (403, 400, {"bad_image": 3})
    summary.check()


def test_test_images_that_were_not_embedded_make_it_incomplete(built, tmp_path) -> None:
    shutil.copytree(built.root / "embed" / "sketch", tmp_path / "sketch")
    log = next((tmp_path / "sketch" / "commits").iterdir())
    record = json.loads(log.read_text().splitlines()[0])
    log.write_text(json.dumps({**record, "dropped": {"bad_image": 2}}) + "\n")
    both = (f"sketch={tmp_path / 'sketch'}", f"counter={built.root / 'embed' / 'counteranimal'}")
    summary = audit.run(settings(built, tmp_path / "o", test=both))
    assert summary.extra["verdicts"]["sketch"] == "INCOMPLETE"
    assert summary.extra["verdicts"]["counter"] != "INCOMPLETE"
    found = json.loads((tmp_path / "o" / "audit.json").read_text())["tests"][0]["coverage"]
    assert (found["examined"], found["total"], found["unexamined"]) == (80, 82, {"bad_image": 2})
    assert "sketch: 80 of 82 test images examined; 2 bad_image." in (tmp_path / "o" / "index.html").read_text()


def test_a_sample_of_the_pool_makes_it_incomplete(built, tmp_path) -> None:
    shutil.copytree(built.root / "embed" / "pool", tmp_path / "pool")
    manifest = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    manifest["partial"] = {"shards": None, "sample": 0.5}
    (tmp_path / "pool" / "manifest.json").write_text(json.dumps(manifest))
    sketch = (f"sketch={built.root / 'embed' / 'sketch'}",)
    summary = audit.run(settings(built, tmp_path / "o", pool=str(tmp_path / "pool"), test=sketch))
    assert summary.extra["verdicts"] == {"sketch": "INCOMPLETE"}
    assert "only sample 0.5 was embedded" in (tmp_path / "o" / "index.html").read_text()


def test_a_row_per_test_set_and_the_digests_of_everything_read(built, tmp_path) -> None:
    predictions = str(built.root / "eval" / "full-s0" / "val.parquet")
    reference = str(built.root / "embed" / "reference")
    audit.run(settings(built, tmp_path, reference=reference, predictions=(f"val={predictions}",)))
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["inputs"] == {
        predictions: store.sha256(store.read_bytes(predictions)),
        reference: EmbeddingSet.open(reference).digest,
    }
    rows = list(csv.DictReader((tmp_path / "tests.csv").open()))
    assert [row["test"] for row in rows] == ["val", "sketch"]
    assert (rows[0]["exact_count"], rows[0]["verdict"], rows[0]["accuracy_clean_num_images"]) == (
        "2", "CONTAMINATED", "78",
    )  # fmt: skip
    assert float(rows[0]["duplicated_rate"]) == result["tests"][0]["dup_rate"]
    assert float(rows[1]["pool_similarity_p50"]) == result["tests"][1]["gap"]["pool"]["50"]
    assert rows[1]["accuracy_whole_rate"] == ""


def test_a_page_over_the_limit_is_refused(built, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(audit.page, "LARGEST_BYTES", 1000)
    with pytest.raises(BudgetError, match="MB, more than 20 MB"):
        audit.run(settings(built, tmp_path))
    assert not (tmp_path / "index.html").exists()


def test_blocked_and_hidden_samples_are_not_shown(built, tmp_path) -> None:
    one = (f"val={built.root / 'embed' / 'val'}",)
    audit.run(settings(built, tmp_path / "open", test=one, pairs=2))
    shown = (tmp_path / "open" / "index.html").read_text()
    leaked = "a photo of a " + CLASSES[built.pool.labels[3]]
    assert shown.count("data:image/jpeg") == 4  # two test images and their copies
    assert leaked in shown
    (tmp_path / "takedown.txt").write_text("\n".join(built.pool.uids[row] for row in (3, 4)) + "\n")
    audit.run(settings(built, tmp_path / "blocked", test=one, pairs=2, blocklist=str(tmp_path / "takedown.txt")))
    blocked = (tmp_path / "blocked" / "index.html").read_text()
    assert "on the blocklist" in blocked
    assert blocked.count("data:image/jpeg") == 2
    audit.run(settings(built, tmp_path / "hidden", test=one, pairs=2, hide=("caption~photo",)))
    hidden = (tmp_path / "hidden" / "index.html").read_text()
    assert "hidden by caption~photo" in hidden
    assert "data:image/jpeg" not in hidden
    assert leaked not in hidden
    with pytest.raises(ConfigError, match="punsafe"):
        audit.run(settings(built, tmp_path / "o", hide=("punsafe>0.5",)))


def test_a_rule_that_holds_is_exit_code_4_of_the_command(built, tmp_path, capsys) -> None:
    embed = built.root / "embed"
    words = ["audit", "--pool", str(embed / "pool"), "--test", f"val={embed / 'val'}", "--duplicate", "0.98",
             "--canaries", "0", "--no-images"]  # fmt: skip
    assert cli.main([*words, "--out", str(tmp_path / "a"), "--fail-on", "dup_rate>0.001"]) == 4
    assert json.loads(capsys.readouterr().out)["failed_rules"] == ["val: dup_rate is 0.025, rule dup_rate>0.001"]
    assert cli.main([*words, "--out", str(tmp_path / "b"), "--fail-on", "dup_rate>0.9"]) == 0
    assert "data:image/jpeg" not in (tmp_path / "a" / "index.html").read_text()


def test_another_encoder_is_refused(built, tmp_path) -> None:
    shutil.copytree(built.root / "embed" / "val", tmp_path / "val")
    manifest = json.loads((tmp_path / "val" / "manifest.json").read_text())
    manifest["encoder"]["model"] = "ViT-B-32"
    (tmp_path / "val" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexMismatchError, match="ViT-B-32"):
        audit.run(settings(built, tmp_path / "o", test=(f"val={tmp_path / 'val'}",)))


def test_the_control_counts_what_would_have_been_found_by_hand() -> None:
    similarity = {"flipped": np.array([0.99, 0.94, 0.90, 0.5]), "grey": np.array([0.97, 0.96, 0.96, 0.5])}
    bits = {"flipped": np.array([40, 2, 9, 3]), "grey": np.array([40, 40, 40, 40])}
    found = contamination.control(similarity, bits, np.array([0.96, 0.2]), (0.9, 0.95), 0.95, 2)
    flipped, grey = found["alterations"]
    assert [near["count"] for near in flipped["near"]] == [3, 1]
    assert (flipped["hash"]["count"], flipped["found"]["count"], grey["found"]["count"]) == (1, 2, 3)
    assert found["recall"] == (2 / 4 + 3 / 4) / 2
    assert found["weakest"] == {"name": "flipped", "recall": 0.5}
    assert [item["count"] for item in found["unrelated"]] == [1, 1]
    without = contamination.control(similarity, None, np.zeros(0), (0.9,), 0.95, 2)
    assert without["alterations"][0]["hash"] is None
    assert without["alterations"][0]["found"]["count"] == 1


def test_verdicts_never_claim_more_than_was_looked_for() -> None:
    measured = {"recall": 0.93, "similarity": 0.95}
    assert contamination.verdict(1, 0.95, 5, measured) == "CONTAMINATED"
    assert contamination.verdict(0, 0.95, 5, measured) == "INCOMPLETE"
    assert contamination.verdict(0, 0.95, 0, measured) == "CLEAN AT RECALL 0.93"
    # Copies were found at 0.95; looking only from 0.99 on finds fewer, so that recall does not count.
    assert contamination.verdict(0, 0.99, 0, measured) == "NO DUPLICATES FOUND AT SIMILARITY >= 0.99"
    assert contamination.verdict(0, 0.95, 0, None) == "NO DUPLICATES FOUND AT SIMILARITY >= 0.95"


def test_clean_accuracy_with_an_empty_part() -> None:
    rng = np.random.default_rng(0)
    whole = contamination.clean_accuracy(np.array([True, False]), np.array([True, True]), 10, rng)
    assert whole["clean"] is None
    assert whole["whole_minus_clean_pp"] is None
    both = contamination.clean_accuracy(np.array([True, False, True, False]), np.array([1, 0, 0, 0], bool), 500, rng)
    assert both["whole_minus_clean_pp"] == pytest.approx(100 * (1 / 2 - 1 / 3))
