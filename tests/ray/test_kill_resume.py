"""SIGKILL at the worst moment, run again, compare with a run that nobody disturbed (contract 6).

The driver of embed, score, dedup and export kills itself between the files of its second part and that part's
commit: one part is committed, one is written and must be written again, the rest is missing. Train's is in
test_train_stage, beside the run that it must equal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import subsets
from clipgap_ray.stages import dedup, embed, export, score
from tests import made
from tests.driver import Driver, kill_then_resume, ray_folder, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_embed(drive: Any, tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "emb")
    words = {"model": "projection", "batch_size": made.BATCH_SIZE, "workers": 2}  # a job as small would start none
    settings = EmbedSettings(source=tiny_world.path("pool"), out=out, **words)
    assert kill_then_resume(drive, embed, settings) == 1
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")
    assert json.loads(Path(out, "summary.json").read_text())["parts"] == 11


def test_score(drive: Any, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    settings = ScoreSettings(
        **made.score_words(tiny_embeddings), out=str(tmp_path / "s"), group_bytes=1, query_share=1e9
    )
    assert kill_then_resume(drive, score, settings) == 1
    for kind in ("pool", "queries", "thresholds"):
        assert made.files_below(str(tmp_path / "s" / kind)) == made.files_below(f"{tiny_scores}/{kind}")
    manifests = [rundir.read_manifest(uri, "score")["digest"] for uri in (str(tmp_path / "s"), tiny_scores)]
    assert manifests[0] == manifests[1]


def test_sigterm_ends_a_command_as_ctrl_c_does(tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    words = [f"--pool={tiny_embeddings['pool']}", f"--test=val={tiny_embeddings['val']}", "--group-bytes=1"]
    for attempt in range(4):  # the other parts may be done before the signal comes
        out = str(tmp_path / f"s{attempt}")
        command = [sys.executable, "-m", "clipgap_ray.cli", "score", *words, f"--out={out}"]
        with ray_folder() as folder:
            process = Driver(command, {**os.environ, "CLIPGAP_RAY_TMP": folder}, tmp_path / "errors")
            until(lambda: rundir.CommitLog(out).records or process.poll() is not None, "the first part")  # noqa: B023
            process.send_signal(signal.SIGTERM)
            code = process.finish()
        if code:
            break
    assert code == 130, process.said()
    assert "the same command continues" in process.said()
    assert "***" not in process.said()


PARTITIONED = {"mode": "partitioned", "partitions": 8, "also": [0.9], "stays": "hard"}


@pytest.mark.parametrize("mode", [{}, pytest.param(PARTITIONED, marks=pytest.mark.slow)])
def test_dedup(drive: Any, tiny_embeddings: dict[str, str], tmp_path: Path, mode: dict[str, Any]) -> None:
    words = {"pool": tiny_embeddings["pool"], "min_similarity": 0.97, **mode}
    dedup.run(DedupSettings(**words, out=str(tmp_path / "whole")))
    assert kill_then_resume(drive, dedup, DedupSettings(**words, out=str(tmp_path / "cut"))) == 1
    cut, whole = made.files_below(str(tmp_path / "cut")), made.files_below(str(tmp_path / "whole"))
    written = {name for name in whole if name.startswith(("keep", "groups", "found.json"))}
    assert len(written) == (2 * 11 + 3 if mode else 11 + 2)
    assert all(cut[name] == whole[name] for name in written)
    manifests = [rundir.read_manifest(str(tmp_path / name), "dedup")["digest"] for name in ("cut", "whole")]
    assert manifests[0] == manifests[1]


def test_export(drive: Any, tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    uids = EmbeddingSet.open(tiny_embeddings["pool"]).all_metadata(["uid"]).column("uid")
    split = str(tmp_path / "half.npy")
    store.write_bytes(split, store.array_bytes(subsets.sorted_unique(schema.pack_uids(uids))[::2]))
    words = {"split": split, "source": tiny_world.path("pool"), "shard_size": 70, "write_uid": True}
    export.run(ExportSettings(**words, out=str(tmp_path / "whole")))
    cut = ExportSettings(**words, out=str(tmp_path / "cut"))
    dead = drive(export, cut, kill="index/commits")  # first while the source is indexed, then between two outputs
    assert dead.finish() == -signal.SIGKILL, dead.said()
    assert len(rundir.CommitLog(f"{cut.out}/index").records) == 1
    assert kill_then_resume(drive, export, cut) == 1
    expected, found = (made.files_below(str(tmp_path / name)) for name in ("whole", "cut"))
    outputs = [
        name for name in expected if name.startswith("0") or name in ("sizes.json", "sample_ids.npy", "meta.json")
    ]
    assert len(outputs) == 2 * 5 + 3
    assert [name for name in outputs if expected[name] != found[name]] == []
    assert [name for name in found if name.endswith(".tmp") or name.endswith(".tar")] == [
        name for name in outputs if name.endswith(".tar")
    ]
