"""The whole house on the tiny world: one command, a report, the planted truth, a second run in seconds, the service."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from clipgap_ray import store
from clipgap_ray.embeddings import EmbeddingSet
from tests import made

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("CLIPGAP_FAULT_SEED", "0"))
SECOND_RUN_S = 90  # finished stages only check themselves; most of it is Python importing torch on a busy machine

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def _command(*words):
    environment = {**os.environ, "CLIPGAP_RAY_TMP": tempfile.mkdtemp(prefix="cg-")}
    environment.pop("RAY_ADDRESS", None)
    return {"args": [sys.executable, "-m", "clipgap_ray.cli", *words], "cwd": ROOT, "env": environment, "text": True}


def _clipgap(*words):
    return subprocess.run(**_command(*words), capture_output=True, timeout=900)


def _kill_at(place, *words):
    """Start a command and kill it as its n-th step begins; returns that step's line."""
    with subprocess.Popen(**_command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        steps = (line.strip() for line in process.stderr if line.startswith("-- "))
        step = next(line for number, line in enumerate(steps, 1) if number == place)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return step


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    result = _clipgap("demo", "--fast", "--out", os.path.relpath(out, ROOT))  # relative, as in the Makefile
    assert result.returncode == 0, result.stderr[-4000:]
    return out, json.loads(result.stdout)


@pytest.mark.timeout(900)
def test_the_report_is_there_and_stands_alone(study):
    out, summary = study
    page = (out / "report" / "index.html").read_text()
    assert Path(ROOT, summary["report"]).samefile(out / "report" / "index.html")
    assert 100_000 < len(page) < 20_000_000
    assert "<img" in page or "<svg" in page
    assert 'src="http' not in page
    assert (out / "report" / "tables").is_dir()


def test_the_reported_gap_equals_the_references(study):
    _, summary = study
    gap = next(f for f in summary["findings"] if f["finding"].startswith("gap-sketch: the gap"))
    assert gap["holds"]
    assert gap["numbers"] == {"test_points": 120, "above_tau": 0}


def test_every_stage_reconciles(study):
    out, _ = study
    summaries = list(out.rglob("summary.json"))
    assert len(summaries) >= 15
    for path in summaries:
        summary = json.loads(path.read_text())
        assert summary["read"] == summary["kept"] + sum(summary["dropped"].values()), path


def test_planted_exact_duplicates_are_exactly_those_dropped_by_sha256(study):
    out, _ = study
    truth = store.read_table(str(out / "world" / "truth.parquet")).to_pylist()
    pool = EmbeddingSet.open(str(out / "embed" / "pool"))
    key = {(row["shard"], row["image_path"]): row["row_id"] for row in pool.all_metadata().to_pylist()}
    groups = {}
    for row in truth:
        if row["set"] == "pool" and row["duplicate_kind"] in ("source", "exact"):
            groups.setdefault(row["duplicate_group"], []).append(key[row["shard"].removeprefix("pool/"), row["key"]])
    planted = [members for members in groups.values() if len(members) > 1]
    keep = {}
    for path in sorted((out / "dedup" / "keep").iterdir()):
        keep.update({row["row_id"]: row for row in store.read_table(str(path)).to_pylist()})
    dropped = {row_id for row_id, row in keep.items() if row["reason"] == "sha256"}
    # Leaks that show one test image twice are equal bytes, too, but no planted duplicates: none in this world.
    assert len(dropped) == sum(len(members) - 1 for members in planted)
    for members in planted:
        assert sum(member not in dropped for member in members) == 1


def test_planted_leaks_are_the_nearest_pool_rows_of_their_test_images(study):
    out, _ = study
    truth = store.read_table(str(out / "world" / "truth.parquet")).to_pylist()
    pool = EmbeddingSet.open(str(out / "embed" / "pool")).all_metadata(["uid", "sha256"]).to_pylist()
    bytes_of = {row["uid"]: row["sha256"] for row in pool}
    groups = store.read_table(str(out / "dedup" / "groups.parquet"), ["uid", "kept_uid"]).to_pylist()
    stands_for = {row["uid"]: bytes_of[row["kept_uid"]] for row in groups}  # this metric finds much alike
    found = 0
    for row in truth:
        if row["set"] != "pool" or row["leak_kind"] != "exact" or row["leak_of_set"] not in ("val", "sketch", "r"):
            continue
        test = EmbeddingSet.open(str(out / "embed" / row["leak_of_set"])).all_metadata(["image_path", "sha256"])
        position = test.column("image_path").to_pylist().index(row["leak_of_key"])
        scores = store.read_table(str(out / "scores" / "queries" / f"{row['leak_of_set']}.parquet"))
        nearest = scores.column("nearest_uid").to_pylist()[position]
        own = test.column("sha256").to_pylist()[position]
        leaks = [uid for uid, sha256 in bytes_of.items() if sha256 == own]
        assert bytes_of[nearest] in {own, *(stands_for.get(uid) for uid in leaks)}
        assert scores.column("similarity").to_pylist()[position] == pytest.approx(1.0, abs=2e-3)
        found += 1
    assert found >= 3


def test_a_second_run_skips_everything(study):
    out, _ = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    started = time.monotonic()
    result = _clipgap("demo", "--fast", "--out", os.path.relpath(out, ROOT))  # relative, as in the Makefile
    assert result.returncode == 0, result.stderr[-4000:]
    assert time.monotonic() - started < SECOND_RUN_S
    embeddings = {path: mtime for path, mtime in before.items() if "embed" in path.parts}
    assert embeddings
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in embeddings.items())
    assert "ETA" not in result.stderr.replace("index", "")
    assert "report is there already" in result.stderr


def test_the_index_answers_exactly(study):
    out, _ = study
    from clipgap_ray.index import LocalIndex

    index = LocalIndex.open(str(out / "index"))
    pool = EmbeddingSet.open(str(out / "embed" / "pool"))
    rows = pool.all_images()
    similarities, _ = index.search(rows[:5], 3)
    exact = np.sort(rows[:5].astype(np.float64) @ rows.astype(np.float64).T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(similarities, exact, atol=1e-5)


ANALYSES = {
    "prompts": ["openai"],
    "candidates_k": 5,
    "linear_probe": True,
    "backgrounds": "backgrounds-miniature",
    "join": True,
    "masks": "world",
    "discover": True,
    "min_photos": 2,
    "second_encoder": {"run": "gap-sketch-with-reference"},
}


@pytest.mark.fault("driver", stage="run")
@pytest.mark.timeout(1800)
def test_analyses_that_are_asked_for_later_are_added_through_a_death_and_then_skipped(study, tmp_path, record_property):
    out, _ = study
    values = yaml.safe_load((ROOT / "studies" / "tiny.yaml").read_text())
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({**values, "analyses": ANALYSES}))
    trained = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.pt")}
    words = ("run", str(tmp_path / "more.yaml"), "--out", os.path.relpath(out, ROOT))
    seed = SEED + 8
    died_in = _kill_at(random.Random(seed).randint(2, 20), *words)
    result = _clipgap(*words)
    assert result.returncode == 0, (died_in, result.stderr[-4000:])
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.pt")} == trained
    page = (out / "report" / "index.html").read_text()
    for anchor in ("asked", "few-shot", "neighbours-neighbours", "selection", "encoders"):
        assert f'<section id="{anchor}"' in page, anchor
    assert "not those of this study" not in page
    made = (
        "join/neighbours/join.json",
        "join/neighbours/parts.csv",
        "discover/discover.json",
        "agreement/agreement.json",
        "second-embed/pool/img_emb/img_emb_00000.npy",
        "labels/pool/labels/part-00000.parquet",
    )
    before = {path: path.stat().st_mtime_ns for path in (out / name for name in made)}
    again = _clipgap(*words)
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stderr.count("is there already") == 4  # the report, too
    assert {path: path.stat().st_mtime_ns for path in before} == before
    record_property("fault", ("run", "driver", f"rerun (seed {seed})"))


@pytest.mark.fault("driver", stage="report")
@pytest.mark.timeout(600)
def test_a_report_that_died_is_the_same_after_the_same_command(study, tmp_path, record_property):
    out, _ = study
    began = time.monotonic()
    done = _clipgap("report", str(out), "--out", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr[-4000:]
    seed = SEED + 9
    words = ("report", str(out), "--out", str(tmp_path / "struck"))
    with subprocess.Popen(**_command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(random.Random(seed).uniform(0.2, 0.6) * (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "struck" / "manifest.json").exists()
    again = _clipgap(*words)
    assert again.returncode == 0, again.stderr[-4000:]
    whole, struck = (made.files_below(str(tmp_path / name)) for name in ("whole", "struck"))
    for files in (whole, struck):
        del files["summary.json"], files["manifest.json"]  # seconds, and where the page went
    struck["index.html"] = struck["index.html"].replace(b"/struck", b"/whole")  # it shows its settings
    assert sorted(whole) == sorted(struck)
    assert [name for name, data in whole.items() if struck[name] != data] == []
    record_property("fault", ("report", "driver", f"rerun (seed {seed})"))
